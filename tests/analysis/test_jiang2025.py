"""The judges of the paper's claims on frames made by hand: passed, failed, underpowered, and right at thresholds."""

import re
from itertools import product

import pandas as pd
import pytest

from analysis.claims import Claim
from analysis.judge import CHANGES
from analysis.plots import FIGURES as GENERAL
from analysis.studies.jiang2025 import CHOICES, CLAIMS, FIGURES
from analysis.studies.jiang2025.edge import (
    ABOVE_LINE,
    AGREEMENT,
    HELD_DOWN,
    MEAN_GAIN_C5,
    below_the_edge_agree,
    c5_rises,
    gains_while_falling,
    kta_rises,
    returns_to_the_line,
)

RATES = (0.02, 0.05, 0.2, 0.4)  # two below the edge, two above
SEEDS = (0, 1, 2)


def matched(**changes) -> pd.DataFrame:
    """Rows at matched loss of a study on which every claim holds, with whole columns changed by `changes`."""
    rows = [
        {
            "learning_rate": rate, "seed": seed, "crossed": rate > 0.1, "c5": 0.2 + rate, "ntk_sharpness": 2 / rate,
            "kta": 0.1 + 0.5 * max(rate - 0.1, 0) + seed / 100,
        }
        for rate, seed in product(RATES, SEEDS)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**changes)


def final(**changes) -> pd.DataFrame:
    rows = [
        {
            "learning_rate": rate, "seed": seed, "crossed": rate > 0.1, "final_sharpness_mean": 2 / rate,
            "matched_sharpness": 32.0 if rate < 0.1 else 2 / rate,
        }
        for rate, seed in product(RATES, SEEDS)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**changes)


def gains(falling: float = 2e-4, rising: float = -1e-4) -> pd.DataFrame:
    rows = [
        {"learning_rate": rate, "seed": seed, "crossed": True, "kta_gain_falling": falling, "kta_gain_rising": rising}
        for rate, seed in product(RATES[2:], SEEDS)
    ]
    return pd.DataFrame(rows)


def set_at(frame: pd.DataFrame, rate: float, seed: int, **values) -> pd.DataFrame:
    """The frame with other values in the row of one run."""
    frame = frame.copy()
    row = (frame["learning_rate"] == rate) & (frame["seed"] == seed)
    for name, value in values.items():
        frame.loc[row, name] = value
    return frame


def without(frame: pd.DataFrame, rate: float, seed: int) -> pd.DataFrame:
    return frame[~((frame["learning_rate"] == rate) & (frame["seed"] == seed))]


FRAMES = {
    "kta_rises_with_learning_rate": matched,
    "below_the_edge_agree": matched,
    "c5_rises": matched,
    "returns_to_the_line": final,
    "kta_gains_while_sharpness_falls": gains,
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_study_on_which_it_holds_passes(name):
    verdict = CLAIMS[name].judge(FRAMES[name]())
    assert verdict.verdict == "passed"
    assert verdict.runs in (6, 12)


@pytest.mark.parametrize("name", FRAMES)
def test_two_seeds_are_too_few(name):
    frame = FRAMES[name]()
    verdict = CLAIMS[name].judge(frame[frame["seed"] < 2])
    assert verdict.verdict == "underpowered"
    assert verdict.value.startswith("only 2 complete run(s)")


@pytest.mark.parametrize("name", FRAMES)
def test_one_seed_missing_at_one_learning_rate_is_too_few(name):
    rate = 0.02 if name == "below_the_edge_agree" else 0.4
    verdict = CLAIMS[name].judge(without(FRAMES[name](), rate, 1))
    assert (verdict.verdict, verdict.value) == (
        "underpowered", f"only 2 complete run(s) at learning rate {rate:g}, 3 needed",
    )  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_no_rows_are_underpowered_not_an_error(name):
    assert CLAIMS[name].judge(FRAMES[name]().iloc[:0]).verdict == "underpowered"


def test_kta_must_rise_strictly_in_the_mean():
    frame = matched()
    equal = frame.assign(kta=0.2)
    assert kta_rises(equal).verdict == "failed"
    just = set_at(equal, 0.4, 0, kta=0.2 + 1e-12)
    assert kta_rises(just).verdict == "passed"
    assert kta_rises(set_at(equal, 0.4, 0, kta=0.1)).verdict == "failed"


def test_kta_may_fall_in_one_seed_if_the_mean_rises():
    assert kta_rises(set_at(matched(), 0.4, 0, kta=0.15)).verdict == "passed"


def test_kta_below_the_edge_does_not_count():
    frame = matched()
    frame.loc[frame["learning_rate"] == 0.02, "kta"] = 0.9
    assert kta_rises(frame).verdict == "passed"


def test_a_learning_rate_that_one_seed_did_not_cross_is_not_above_the_edge():
    frame = set_at(matched(), 0.2, 2, crossed=False)
    verdict = kta_rises(frame)
    assert (verdict.verdict, verdict.value) == ("underpowered", "fewer than two learning rates above the edge")


@pytest.mark.parametrize(("difference", "expected"), [(AGREEMENT, "passed"), (AGREEMENT * (1 + 1e-9), "failed")])
def test_agreement_below_the_edge_at_its_threshold(difference, expected):
    frame = set_at(matched(kta=0.0), 0.05, 1, kta=difference)
    assert below_the_edge_agree(frame).verdict == expected


def test_agreement_is_per_seed_and_ignores_what_lies_above_the_edge():
    spread = matched()
    assert below_the_edge_agree(spread.assign(kta=spread["seed"] * 1.0)).verdict == "passed"
    assert below_the_edge_agree(set_at(matched(), 0.4, 0, kta=9.0)).verdict == "passed"
    one_below = set_at(matched(), 0.05, 0, crossed=True)
    assert below_the_edge_agree(one_below).value == "fewer than two learning rates below the edge"


@pytest.mark.parametrize(("gain", "expected"), [(MEAN_GAIN_C5, "passed"), (MEAN_GAIN_C5 - 1e-9, "failed")])
def test_c5_must_gain_enough_in_the_mean(gain, expected):
    frame = matched(c5=0.0)
    frame.loc[frame["learning_rate"] == 0.4, "c5"] = gain
    assert c5_rises(frame).verdict == expected


def test_c5_must_gain_in_every_seed():
    frame = matched(c5=0.0)
    frame.loc[frame["learning_rate"] == 0.4, "c5"] = 0.9
    assert c5_rises(set_at(frame, 0.4, 1, c5=1e-9)).verdict == "passed"
    assert c5_rises(set_at(frame, 0.4, 1, c5=0.0)).verdict == "failed"


def test_c5_compares_only_the_ends():
    frame = matched()
    frame.loc[frame["learning_rate"] == 0.2, "c5"] = 0.0
    assert c5_rises(frame).verdict == "passed"
    assert c5_rises(frame[frame["learning_rate"] == 0.4]).value == "only one learning rate"


def test_every_run_above_the_edge_must_end_near_its_line():
    line = 2 / 0.4
    assert returns_to_the_line(set_at(final(), 0.4, 2, final_sharpness_mean=ABOVE_LINE * line)).verdict == "passed"
    over = set_at(final(), 0.4, 2, final_sharpness_mean=ABOVE_LINE * line * (1 + 1e-9))
    assert returns_to_the_line(over).verdict == "failed"


def test_the_smallest_learning_rate_must_stand_above_the_lines_in_every_seed():
    line = 2 / HELD_DOWN
    assert returns_to_the_line(set_at(final(), 0.02, 1, matched_sharpness=line + 1e-9)).verdict == "passed"
    assert returns_to_the_line(set_at(final(), 0.02, 1, matched_sharpness=line)).verdict == "failed"


def test_returning_needs_something_above_the_edge():
    assert returns_to_the_line(final(crossed=False)).verdict == "underpowered"


def test_kta_must_gain_more_per_falling_step_at_each_learning_rate():
    assert gains_while_falling(gains(falling=-1e-4, rising=-1e-4)).verdict == "failed"
    assert gains_while_falling(gains(falling=-1e-4 + 1e-12)).verdict == "passed"
    frame = gains()
    frame.loc[frame["learning_rate"] == 0.4, "kta_gain_falling"] = -2e-4
    assert gains_while_falling(frame).verdict == "failed"
    assert gains_while_falling(set_at(gains(), 0.4, 0, kta_gain_falling=-2e-4)).verdict == "passed"


def test_a_learning_rate_that_crossed_in_some_seeds_only_says_nothing_of_the_phases():
    frame = gains()
    frame.loc[frame["learning_rate"] == 0.4, "kta_gain_falling"] = -2e-4
    some = set_at(frame, 0.4, 0, crossed=False)
    assert gains_while_falling(some).verdict == "passed"
    assert gains_while_falling(some).runs == len(frame) - 3


@pytest.mark.parametrize("kind", ["falling", "rising"])
@pytest.mark.parametrize("seeds", [(1,), SEEDS], ids=["one_seed", "every_seed"])
def test_a_run_without_a_step_of_one_kind_leaves_the_phases_underpowered(kind, seeds):
    frame = gains()
    for seed in seeds:
        frame = set_at(frame, 0.2, seed, **{f"kta_gain_{kind}": float("nan")})
    verdict = gains_while_falling(frame)
    assert (verdict.verdict, verdict.runs) == ("underpowered", 6)
    assert verdict.value == f"no {kind} step after the crossing at learning rate 0.2, seed {seeds[0]}"


def test_a_column_of_nothing_but_null_is_underpowered_too():
    frame = gains().assign(kta_gain_falling=None)  # what a query gives whose every row is NULL
    assert gains_while_falling(frame).value.startswith("no falling step after the crossing at learning rate 0.2")


def test_every_change_of_a_rule_has_its_date():
    for change in [*CHANGES[:-1], *(change for claim in CLAIMS.values() for change in claim.changes)]:
        assert re.match(r"2026-11-2[456]: ", change)


def test_c5_needs_the_same_seeds_at_both_ends():
    frame = matched()
    ends = frame["learning_rate"].isin([frame["learning_rate"].min()])
    frame.loc[ends, "seed"] += 10
    assert c5_rises(frame).verdict == "underpowered"


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_a_claim_says_all_that_a_reader_needs(claim):
    assert isinstance(claim, Claim)
    for text in (claim.statement, claim.rule):
        assert text.endswith(".")
    assert re.search("[0-9]{4}.[0-9]{5}", claim.source)
    assert "level" not in claim.sql.replace("{level}", "")
    assert claim.sql.count("study = {study}") == 1


@pytest.mark.parametrize("name", FRAMES)
def test_the_frames_here_have_the_columns_of_the_query(name):
    selected = CLAIMS[name].sql.rpartition("select")[2].partition("from")[0]
    assert all(column in selected for column in FRAMES[name]().columns)


def test_the_figures_are_the_columns_of_the_papers_first_figure():
    assert [FIGURES[name].title[-3:-1] for name in GENERAL] == ["1a", "1b", "1c"]
    assert all(FIGURES[name].draw is GENERAL[name].draw for name in GENERAL)


def test_every_choice_is_the_papers_or_ours():
    assert {whose for _, _, whose in CHOICES} == {"the paper's", "ours"}
