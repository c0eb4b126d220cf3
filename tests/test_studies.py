"""Every shipped study, small: it trains, it is analysed, its claims can be asked and its figures drawn."""

import pytest

from analysis import catalog, results, studies
from analysis.judge import judge_store
from analysis.report import write_report
from analysis.verdicts import page
from pipeline.config import load_parts, load_study, shipped, sizes_of
from pipeline.store import list_runs
from pipeline.train import train

# Not trained here: its images are downloaded.
STUDIES = sorted(set(shipped()) - {"paper_cifar"})


def trained(study, root):
    """The runs of a study or a part of it, one after the other in this process, with the attributes of `run`."""
    attrs = {
        "title": study.title, "study": study.name, "part": study.part, "size": study.size, "paper": study.paper,
        "claims": list(study.claims), "figures": study.figures, "study_source": study.source,
    }  # fmt: skip
    for run in study.runs():
        assert train(run, str(root), attrs=attrs) in ("complete", "diverged")
    results.analyze(root)
    catalog.sync(root)
    return root


@pytest.mark.parametrize("name", [name for name in STUDIES if sizes_of(name)])
def test_the_size_smoke_tries_the_machinery_and_gives_no_verdict(name, tmp_path):
    for part in load_parts(name, size="smoke"):
        root = trained(part, tmp_path / (part.part or "store"))
        judged = judge_store(root)
        assert [judgement.claim.name for judgement in judged] == list(part.claims)
        for judgement in judged:
            assert (judgement.verdict.verdict, judgement.size) == ("underpowered", "smoke")
            assert "only tries the machinery" in judgement.verdict.value or not judgement.level
        for figure in studies.figures(root).values():
            if figure.name not in ("phases", "flow"):  # these want a run that met its line
                figure.draw(root, figure.axes[0])


def test_a_report_and_a_page_of_verdicts_are_of_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.report.render", lambda figure, kind: b"\x89PNG")
    root = tmp_path / "phases"
    parts = load_parts("phases", ["stop.steps=6"], size="smoke")[:2]
    for part in parts:
        trained(part, root / part.part)
    report = write_report(root).read_text()
    for part in parts:
        assert f'id="{part.part}"' in report
        assert f'id="{part.part}-claims"' in report
        assert part.title in report
        assert all(run.run_id in report for run in list_runs(root / part.part))
    assert "size smoke" in report
    assert report.count("Whose choices these are") == 1
    verdicts = page([root])
    assert "## phases, size smoke" in verdicts
    assert verdicts.count("**underpowered**") == sum(len(part.claims) for part in parts)
    assert "4 underpowered" in verdicts.lower()


def test_the_digits_are_as_they_were_before_studies_had_sizes():
    assert load_study("digits").runs()[0].run_id == "lr-0.02_seed-0_a0a786e3"
