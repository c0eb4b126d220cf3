"""Claims and their judging: when rows are too few, at which loss runs are compared, and what is kept of a verdict."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from mock_store import mock_run, mock_store

from analysis import catalog, results
from analysis.claims import MIN_SEEDS, Claim, Verdict, spread, too_few
from analysis.judge import judge, judge_store
from analysis.load import shared_level
from analysis.studies import PAPERS, figures, paper, papers
from analysis.studies.jiang2025 import CLAIMS, edge
from pipeline.errors import InputError
from pipeline.store import list_runs

PAPER = {"paper": "jiang2025", "claims": ["kta_rises_with_learning_rate", "c5_rises"]}


def derived(root):
    results.analyze(root)
    catalog.sync(root)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A study of two seeds per learning rate: too few for a verdict."""
    return derived(mock_store(tmp_path_factory.mktemp("claims"), steps=12, attrs=PAPER))


def rows(seeds: dict[float, int]) -> pd.DataFrame:
    return pd.DataFrame([{"learning_rate": rate, "seed": s} for rate, n in seeds.items() for s in range(n)])


def test_enough_seeds_at_every_learning_rate_are_not_too_few():
    assert too_few(rows({0.1: MIN_SEEDS, 0.2: MIN_SEEDS + 2})) is None


def test_the_first_learning_rate_that_is_short_is_named():
    assert too_few(rows({0.1: 3, 0.2: 2, 0.3: 1})) == "only 2 complete run(s) at learning rate 0.2, 3 needed"


def test_a_seed_counts_once():
    frame = pd.concat([rows({0.1: 2})] * 3)
    assert too_few(frame) == "only 2 complete run(s) at learning rate 0.1, 3 needed"


def test_no_rows_are_too_few():
    assert too_few(rows({})) == "no complete run can be compared"


@pytest.mark.parametrize(
    ("values", "expected"), [([0.25], "0.250"), ([0.1, 0.3], "0.200 ± 0.141"), ([0.2, 0.2, 0.2], "0.200 ± 0.000")]
)
def test_spread_is_mean_and_sample_deviation(values, expected):
    assert spread(pd.Series(values)) == expected


class Recorded:
    """A run with loss levels and a training loss."""

    def __init__(self, levels, losses, status="complete"):
        self.attrs = {"identity": {"record": {"loss_levels": levels}}}
        self.losses = np.array(losses, dtype=float)
        self.status = status

    def read(self, name):
        assert name == "train/loss"
        return self.losses


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([Recorded([0.1, 0.01], [1, 0.005]), Recorded([1.0, 0.1, 0.01], [2, 0.01])], 0.01),
        ([Recorded([0.1, 0.01], [1, 0.005]), Recorded([0.1, 0.01], [1, 0.0101])], 0.1),
        ([Recorded([0.1, 0.01], [1, 0.005]), Recorded([0.1], [1, 0.005])], 0.1),
        ([Recorded([0.1, 0.01], [1, 0.01, 0.5])], 0.01),
        ([Recorded([0.1, 0.01], [1, 0.001]), Recorded([0.1, 0.01], [1, 0.05], "diverged")], 0.01),
        ([Recorded([0.1, 0.01], [1, 0.001]), Recorded([0.1, 0.01], [1, 0.05], "stale")], 0.01),
        ([Recorded([0.1, 0.01], [1, 0.001]), Recorded([0.1, 0.01], [], "running")], 0.01),
    ],
    ids=["shared", "not_reached", "not_recorded", "rose_again", "diverged", "stale", "started"],
)
def test_runs_are_compared_at_the_smallest_level_that_all_complete_ones_reached(runs, expected):
    assert shared_level(runs, "anywhere") == expected
    assert shared_level(reversed(runs), "anywhere") == expected


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [Recorded([0.1], [0.01]), Recorded([], [0.01])],
        [Recorded([0.1], [0.01]), Recorded([0.1], [0.2])],
        [Recorded([0.1], [0.01]), Recorded([0.1], [])],
        [Recorded([0.1], [0.01], "diverged"), Recorded([0.1], [0.01], "interrupted")],
    ],
    ids=["no_run", "not_recorded", "not_reached", "no_row", "none_complete"],
)
def test_runs_without_a_level_in_common_cannot_be_compared(runs):
    with pytest.raises(InputError, match="the complete runs of anywhere share no loss level that they reached"):
        shared_level(runs, "anywhere")


def test_the_level_of_a_store_is_one_that_its_runs_reached(store):
    runs = list_runs(store)
    assert any(run.read("train/loss").min() > 0.1 for run in runs), "0.1 was asked for, and not reached by all"
    assert shared_level(runs, store) == 0.5


def test_a_judge_sees_the_rows_of_its_query(store):
    seen = []

    def look(frame: pd.DataFrame) -> Verdict:
        seen.append(frame)
        return Verdict("passed", "seen", len(frame))

    sql = "select learning_rate, seed, {level}::double as level from runs order by 1, 2"
    judged = judge(store, "mock", Claim("look", "It is seen.", "Always.", "nobody", sql, look), list_runs(store))
    assert seen[0].to_dict("list") == {
        "learning_rate": [0.1, 0.1, 1.2, 1.2], "seed": [0, 1, 0, 1], "level": [0.5] * 4,
    }  # fmt: skip
    assert judged.sql == sql.replace("{level}", "0.5")
    assert judged.as_row()["runs"] == 4
    assert judged.as_row()["changes"] is None


def test_every_claim_can_be_asked_of_any_store(store):
    for claim in CLAIMS.values():
        assert judge(store, "mock", claim, list_runs(store)).verdict.verdict == "underpowered"


def test_a_claim_is_judged_on_the_runs_of_its_study_at_their_level(tmp_path):
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0, 1], steps=12, attrs=PAPER)
    # It gets further, and its runs have the learning rates and seeds of the first study.
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0], steps=12, axes={"x": [1]}, attrs={**PAPER, "study": "other"})
    judged = {(j.study, j.claim.name): j for j in judge_store(derived(tmp_path))}
    assert set(judged) == {(study, claim) for study in ("mock", "other") for claim in PAPER["claims"]}
    assert {key[0]: j.level for key, j in judged.items()} == {"mock": 0.5, "other": 0.1}
    assert {key[0]: j.verdict.runs for key, j in judged.items() if key[1] == "c5_rises"} == {"mock": 2, "other": 1}
    for (study, _), judgement in judged.items():
        table = catalog.query(tmp_path, judgement.sql)
        assert len(table.rows) == {"mock": 2, "other": 1}[study], "the query is that of the study, to be pasted"


SEEN = edge.CLAIMS.keys()


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_every_claim_asks_for_its_study(store, claim):
    judged = judge(
        store, "mock", replace(claim, judge=lambda frame: Verdict("passed", "seen", len(frame))), list_runs(store)
    )
    assert judged.verdict.runs == 4 or claim.name not in SEEN, "the mock store has the numbers of these"
    nobody = judged.sql.replace("'mock'", "'nobody'")
    assert nobody != judged.sql
    assert catalog.query(store, nobody).rows == []


def test_a_claim_that_compares_no_losses_needs_no_level(tmp_path):
    mock_run(
        tmp_path, 0.1, 0, steps=3, end=None, attrs={"paper": "jiang2025", "claims": ["kta_gains_while_sharpness_falls"]}
    )
    (judgement,) = judge_store(derived(tmp_path))
    assert judgement.level is None
    assert judgement.as_row()["level"] is None
    assert catalog.query(tmp_path, "select level, verdict from claims").rows == [(None, "underpowered")]


@pytest.mark.parametrize("study", ["", "it's", "a study", "x' or true --", "{level}", "mock\n"])
def test_a_name_that_is_more_than_a_name_does_not_get_into_a_query(tmp_path, study):
    mock_run(tmp_path, 0.1, 0, steps=3, attrs={**PAPER, "study": study})
    with pytest.raises(InputError, match=r"study = .*: only letters, digits, '_', '\.' and '-' are allowed"):
        judge_store(derived(tmp_path))


def test_a_store_is_judged_by_what_its_runs_name_and_the_verdicts_are_kept(store):
    judged = judge_store(store)
    assert [judgement.claim.name for judgement in judged] == PAPER["claims"]
    kept = catalog.query(store, "select claim, verdict, runs, source from claims order by claim")
    assert kept.rows == sorted(
        (j.claim.name, j.verdict.verdict, j.verdict.runs, j.claim.source) for j in judged
    )  # fmt: skip


def test_runs_that_name_no_paper_make_no_claims(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=3)
    assert judge_store(derived(tmp_path)) == []
    assert papers(tmp_path) == []


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"paper": "nobody2020", "claims": ["c5_rises"]}, r"paper 'nobody2020' has no module .* jiang2025"),
        ({"paper": "jiang2025", "claims": ["c6_rises"]}, r"claim 'c6_rises' is not one of kta_rises"),
    ],
    ids=["paper", "claim"],
)
def test_an_unknown_name_is_an_error_that_lists_the_known(tmp_path, attrs, message):
    mock_run(tmp_path, 0.1, 0, steps=3, attrs=attrs)
    with pytest.raises(InputError, match=message):
        judge_store(derived(tmp_path))


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_has_claims_figures_choices_and_a_source(name):
    module = paper(name)
    assert module.CLAIMS
    assert all(claim.name == key for key, claim in module.CLAIMS.items())
    assert all(figure.name == key for key, figure in module.FIGURES.items())
    assert all(len(choice) == 3 for choice in module.CHOICES)
    assert module.SOURCE


def test_a_store_has_the_figures_of_its_paper(store):
    assert figures(store)["kta"].title.endswith("(the paper's figure 1a)")
