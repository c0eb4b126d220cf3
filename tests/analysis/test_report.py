"""The report: one page that loads nothing, escapes everything, and says what there is and what is missing."""

import base64
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mock_store import mock_run, mock_store

from analysis import report
from analysis.claims import Verdict
from analysis.judge import CHANGES, Judgement
from analysis.report import write_report
from analysis.studies.jiang2025 import CLAIMS
from pipeline.cadence import Cadence
from pipeline.errors import InputError, MissingError
from pipeline.store import list_runs

VOID = {"meta", "img", "br", "hr", "link", "input"}
PAPER = {"paper": "jiang2025", "claims": list(CLAIMS)}
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x> {{ 7 * 7 }} $\\frac{'


class Page(HTMLParser):
    """Checks that tags close in order; collects attributes, text by section, and code blocks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.code: dict[str, list[str]] = {"": [], "python": []}
        self._section, self._code = "", None
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = given["id"]
        if tag == "code":
            self._code = given.get("class", "")
            self.code[self._code].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "code":
            self._code = None

    def handle_data(self, data):
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._code is not None:
            self.code[self._code][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A study of a paper; one of its runs diverged."""
    root = tmp_path_factory.mktemp("report") / "a store"
    return mock_store(root, learning_rates=(0.1, 1.2), seeds=(0, 1), steps=30, diverged=[(1.2, 1)], attrs=PAPER)


@pytest.fixture(scope="module")
def page(store):
    return Page(write_report(store))


@pytest.fixture
def quick(monkeypatch):
    """Pages whose pictures are not looked at: drawn, and not rendered."""
    monkeypatch.setattr(report, "render", lambda figure, kind: b"\x89PNG")


def test_the_report_lies_in_its_store(store, page):
    assert (store / "report.html").is_file()
    assert not list(store.glob(".tmp*"))
    assert list(page.sections) == ["", "run", "claims", "figures", "matched", "runs", "provenance", "ask", "choices"]


def test_nothing_is_loaded_from_anywhere(page):
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_figures_are_embedded_with_captions_and_the_queries_behind_them(page):
    images = page.all("img")
    assert len(images) == 5
    for image in images:
        assert base64.b64decode(image["src"].partition(",")[2], validate=True).startswith(b"\x89PNG")
        assert image["alt"]
    text = page.sections["figures"]
    assert "One line per learning rate" in text
    assert "(the paper's figure 1c)" in text
    assert text.count("SQL behind these numbers") == 4, "KTA over step and over time is one query"
    for axes in ("over step and time", "over loss"):
        assert text.count(f"SQL behind these numbers, {axes}") == 1, "two queries under a figure are told apart"


def test_every_claim_is_there_with_its_verdict_rule_and_source(page):
    text = page.sections["claims"]
    for claim in CLAIMS.values():
        for part in (claim.name, claim.statement, claim.rule, claim.source):
            assert part in text
    assert text.count("? underpowered") == len(CLAIMS)
    assert text.count("none of its own since the first full run") == sum(not claim.changes for claim in CLAIMS.values())
    assert all(change in text for claim in CLAIMS.values() for change in claim.changes)
    assert all(page.sections["choices"].count(change) == 1 for change in CHANGES), (
        "what concerns every claim is listed once"
    )
    assert "matched loss 0.5" in text


def test_verdicts_are_words_and_changes_of_rules_are_listed(store, monkeypatch, quick):
    changed = CLAIMS["c5_rises"].__class__(**(vars(CLAIMS["c5_rises"]) | {"changes": ("2026-03-01: 0.3 became 0.25",)}))
    verdicts = {"passed": CLAIMS["below_the_edge_agree"], "failed": changed}
    judged = [
        Judgement("mock", None, None, claim, Verdict(word, "1 ± 0", 6), "select 1", 0.1)
        for word, claim in verdicts.items()
    ]
    monkeypatch.setattr(report, "judge_store", lambda root: judged)
    page = Page(write_report(store, store / "other.html"))
    text = page.sections["claims"]
    assert "✓ passed" in text
    assert "✗ failed" in text
    assert "2026-03-01: 0.3 became 0.25" in text
    assert text.count("none of its own since the first full run") == 1
    assert "claims: 1 ✓ passed, 1 ✗ failed" in " ".join(page.sections[""].split())


def test_what_was_run_says_settings_and_whose_they_are(page):
    text = page.sections["run"]
    for part in ("mlp (depth 1, width 8)", "0.1, 1.2", "n = 12", "p = 32", "k = 5"):
        assert part in text
    assert all(part in page.sections["choices"] for part in ("the paper's", "ours"))
    assert "steps (3 runs); loss is not finite (1 runs)" in text


def test_runs_are_listed_with_status_and_head_and_the_diverged_one_as_such(store, page):
    text = page.sections["runs"]
    for run in list_runs(store):
        assert run.run_id in text
        assert run.head[:8] in text
        assert run.head not in text, "32 digits do not fit beside the other columns"
        assert f'title="{run.head}"' in page.source
    assert text.count("↯ diverged") == 1
    assert text.count("complete") == 3


def test_a_diverged_run_is_not_among_those_at_matched_loss(page):
    text = page.sections["matched"]
    assert "of 1" in text
    assert "of 2" in text


def test_provenance_is_there(page):
    text = page.sections["provenance"]
    for part in ("0" * 40, "torch 2.13.0", "nowhere", "dataset digest", "threads", "CF-1.11 NTK-EOS-1", "git dirty"):
        assert part in text


def test_the_python_that_it_offers_runs(page):
    assert len(page.code["python"]) == 2
    for snippet in page.code["python"]:
        subprocess.run([sys.executable, "-c", snippet], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    shell = next(code for code in page.code[""] if code.startswith("ntk-eos sql"))
    assert "a store' \"select" in shell, "a path with a space is quoted"


def test_what_comes_from_a_store_is_text(tmp_path, quick):
    attrs = {
        "title": HOSTILE, "study": HOSTILE, "loss_convention": HOSTILE, "stop_reason": HOSTILE,
        "environment_changes": [HOSTILE], "provenance": {"host": HOSTILE, HOSTILE: HOSTILE},
    }  # fmt: skip
    mock_run(tmp_path, 0.1, 0, steps=3, attrs=attrs)
    page = Page(write_report(tmp_path))
    assert "<script" not in page.source
    assert "evil.example" not in str([attrs for _, attrs in page.tags])
    assert len(page.all("img")) == 5
    for section in ("", "run", "provenance"):
        assert HOSTILE in page.sections[section]


def test_a_run_of_no_paper_makes_no_claims(tmp_path, quick):
    mock_run(tmp_path, 0.1, 0, steps=12)
    page = Page(write_report(tmp_path))
    assert "The studies of this store make no claims." in page.sections["claims"]
    assert "Whose choices" not in page.sections["run"]
    assert len(page.all("img")) == 5


def test_an_unknown_paper_is_said_and_the_rest_is_there(tmp_path, quick):
    mock_run(tmp_path, 0.1, 0, steps=12, attrs={"paper": "nobody2020", "claims": ["x"]})
    page = Page(write_report(tmp_path))
    assert "Not judged: paper 'nobody2020' has no module" in page.sections["claims"]
    assert len(page.all("img")) == 5


def test_a_store_that_is_growing_or_empty_has_a_report(tmp_path, quick):
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    page = Page(write_report(tmp_path / "empty"))
    assert "An empty store" in page.sections[""]
    assert page.sections["figures"].count("Not drawn:") == 3
    mock_run(tmp_path / "growing", 0.1, 0, steps=4, end=None)
    page = Page(write_report(tmp_path / "growing"))
    assert "stale" in page.sections["runs"]
    assert "share no loss level that they reached" in page.sections["matched"]


def test_a_run_that_the_catalogue_does_not_have_yet_is_listed(tmp_path, monkeypatch, quick):
    mock_run(tmp_path, 0.1, 0, steps=4)
    sync = report.catalog.sync
    monkeypatch.setattr(report.catalog, "sync", lambda root: (sync(root), mock_run(root, 0.2, 0, steps=4)))
    page = Page(write_report(tmp_path))
    assert list_runs(tmp_path)[1].head[:8] in page.sections["runs"]


def test_a_store_whose_runs_all_diverged_has_a_report(tmp_path, quick):
    mock_store(tmp_path, seeds=[0], steps=6, diverged=[(0.1, 0), (1.2, 0)])
    page = Page(write_report(tmp_path))
    assert page.all("img") == []
    text = page.sections["figures"]
    assert text.count("Not drawn:") == 3
    assert "with a kernel target alignment diverged" in text
    assert "with kernel scalars diverged" in text
    assert "has kernel scalars" not in text, "there are some, of runs that diverged"
    assert "share no loss level that they reached" in text


def test_missing_inputs_are_sentences(tmp_path, quick):
    mock_run(tmp_path, 0.1, 0, steps=12, cadences={"scalars": Cadence(every=1)})
    page = Page(write_report(tmp_path))
    assert page.sections["figures"].count("Not drawn:") <= 1
    assert len(page.all("img")) >= 4


def test_the_same_store_gives_the_same_page(store, page):
    assert Page(write_report(store, store.parent / "again.html")).source == page.source


def test_progress_goes_from_start_to_end(store, tmp_path, quick):
    told = []
    write_report(store, tmp_path / "new" / "report.html", progress=lambda share, note: told.append((share, note)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert {"claims", "figure kta"} <= {note for _, note in told}


def test_roots_and_files_that_cannot_be_used_are_refused(store, tmp_path, quick):
    with pytest.raises(MissingError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a store"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        write_report(store, tmp_path)
    assert list(tmp_path.iterdir()) == []
