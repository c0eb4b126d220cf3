"""The rules of the claims, on frames whose verdict is known."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.claims import gains, interval, trend
from analysis.studies.jiang2025 import CLAIMS


def grid(value, rates=(0.1, 0.2, 0.4), seeds=3, **columns):
    """Rows of a sweep; `value` is a function of (rate, seed), `columns` are constants."""
    rows = [{"learning_rate": rate, "seed": seed, "value": value(rate, seed), "crossed": True, **columns}
            for rate, seed in product(rates, range(seeds))]  # fmt: skip
    return pd.DataFrame(rows)


def verdict(claim, frame):
    return CLAIMS[claim].judge(frame).verdict


# --- statistics -------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(3, 30))
def test_the_interval_of_many_values_is_that_of_a_normal_mean(seed, size):
    values = pd.Series(np.random.default_rng(seed).normal(size=20 * size))
    low, high = interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_interval_of_equal_values_is_one_of_them():
    assert interval(pd.Series([2.5, 2.5, 2.5])) == (2.5, 2.5)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_only_one_way_to_deal_out_is_as_good_as_a_perfect_trend(seeds):
    frame = grid(lambda rate, seed: rate + seed, seeds=seeds)
    tau, chance = trend(frame, "value")
    assert tau == 1
    assert chance == pytest.approx(1 / 6**seeds)
    assert trend(frame.assign(value=-frame["value"]), "value") == (-1, 1)


def test_of_many_learning_rates_the_ways_are_drawn():
    rates = (1, 2, 3, 4, 5)
    tau, chance = trend(grid(lambda rate, seed: (rate + 2 * seed) % 5, rates), "value")
    # Kendall's τ by counting pairs.
    pairs = [np.sign((b + 2 * s) % 5 - (a + 2 * s) % 5) for s in range(3) for a in rates for b in rates if a < b]
    assert tau == pytest.approx(np.mean(pairs))
    assert 0.05 < chance < 0.95


def test_a_seed_that_lacks_an_end_has_no_gain():
    frame = grid(lambda rate, seed: rate * seed)
    frame = frame[(frame["seed"] != 1) | (frame["learning_rate"] < 0.4)]
    assert gains(frame, "value").to_dict() == pytest.approx({0: 0.0, 2: 0.6})


# --- trends and gains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["kta", "c5"])
def test_a_trend_with_batches_is_over_all_learning_rates(column):
    rises = grid(lambda rate, seed: rate).rename(columns={"value": column}).assign(crossed=False)
    assert verdict(f"{column}_trend_with_batches", rises) == "passed"
    assert verdict(f"{column}_trend_with_batches", rises.assign(**{column: 1.0})) == "failed"


@pytest.mark.parametrize("column", ["kta", "c5"])
def test_a_trend_passes_fails_or_lacks_runs(column):
    rises = grid(lambda rate, seed: rate + 0.01 * seed).rename(columns={"value": column})
    assert verdict(f"{column}_trend", rises) == "passed"
    assert verdict(f"{column}_trend", rises.assign(**{column: -rises[column]})) == "failed"
    assert verdict(f"{column}_trend", rises[rises["seed"] < 2]) == "underpowered"
    two_rates = rises.assign(crossed=rises["learning_rate"] > 0.3)
    assert verdict(f"{column}_trend", two_rates) == "underpowered", "its p could not be 0.05"
    assert verdict(f"{column}_trend", rises.assign(crossed=False)) == "underpowered"


def test_a_trend_looks_at_the_edge_and_one_learning_rate_below():
    # It falls below the edge, which says nothing.
    frame = grid(lambda rate, seed: abs(rate - 0.25) + 0.001 * seed, (0.01, 0.1, 0.2, 0.3, 0.4, 0.5))
    frame = frame.rename(columns={"value": "kta"}).assign(crossed=frame["learning_rate"] > 0.25)
    assert verdict("kta_trend", frame) == "passed"
    assert verdict("kta_trend", frame.assign(crossed=True)) == "failed"


COMPANIONS = {
    "kta_gain": ("kta", "kta_centred"), "c5_gain": ("c5", "c20"), "easy_target_shifts": ("c5", "kta"),
    "summed_kta_gain": ("kta", "kta_centred"), "full_kta_gain": ("kta_full",), "summed_c5_gain": ("c5", "c20"),
    "held_out_kta_gain": ("kta_test", "kta"), "held_out_c5_gain": ("c5_test", "c5"),
}  # fmt: skip


@pytest.mark.parametrize("claim", COMPANIONS)
def test_a_gain_counts_for_its_first_column_alone(claim):
    first, *others = COMPANIONS[claim]
    frame = grid(lambda rate, seed: rate + 0.01 * seed * rate).rename(columns={"value": first})
    frame = frame.assign(**{other: -frame[first] for other in others})
    assert verdict(claim, frame) == "passed"
    assert verdict(claim, frame.assign(**{first: 0.5})) == "failed"
    mixed = frame[first] * np.where(frame["seed"] == 0, -3, 1)
    assert verdict(claim, frame.assign(**{first: mixed})) == "failed"
    assert verdict(claim, frame[frame["seed"] < 2]) == "underpowered"
    assert verdict(claim, frame[frame["learning_rate"] < 0.2]) == "underpowered"


def test_changes_oppose_if_their_correlation_is_surely_negative():
    frame = grid(lambda rate, seed: -0.5 + 0.1 * seed).rename(columns={"value": "correlation"})
    assert verdict("changes_oppose", frame) == "passed"
    assert verdict("changes_oppose", frame.assign(correlation=frame["correlation"] + 0.4)) == "failed"
    assert verdict("changes_oppose", frame[frame["seed"] < 2]) == "underpowered"


def test_one_run_above_the_line_is_too_many():
    frame = grid(lambda rate, seed: 0.8).rename(columns={"value": "ratio"})
    assert verdict("stays_below_the_line", frame) == "passed"
    frame.loc[4, "ratio"] = 1.01
    assert verdict("stays_below_the_line", frame) == "failed"


# --- two-layer linear networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "limit"),
    [("recursions_hold", 1e-12), ("rank_one_stays", 1e-12), ("gap_within_bound", 1), ("shift_is_monotone", 1e-10)],
)
def test_what_holds_of_every_step_may_fail_at_none(claim, limit):
    frame = grid(lambda rate, seed: 0.99 * limit, seeds=1).rename(columns={"value": "largest"}).assign(steps=10)
    assert verdict(claim, frame) == "passed"
    frame.loc[1, "largest"] = 1.1 * limit
    assert verdict(claim, frame) == "failed"
    assert verdict(claim, frame[:0]) == "underpowered"


@pytest.mark.parametrize(
    ("claim", "column", "prediction", "tolerance"),
    [
        ("kta_closed_form", "kta", "kta_closed_form", 0.01),
        ("length_predicted", "squared_length", "squared_length_predicted", 0.07),
    ],
)
def test_a_prediction_holds_within_its_tolerance_in_every_run(claim, column, prediction, tolerance):
    frame = grid(lambda rate, seed: rate).rename(columns={"value": prediction})
    near = frame.assign(**{column: frame[prediction] * (1 + 0.9 * tolerance)})
    assert verdict(claim, near) == "passed"
    near.loc[0, column] *= 1.01
    assert verdict(claim, near) == "failed"
    assert verdict(claim, near[near["seed"] < 2]) == "underpowered"
    assert verdict(claim, near.assign(**{prediction: np.nan})) == "failed", "no prediction is not a good one"


def test_gradient_flow_ends_where_small_steps_do():
    steps = grid(lambda rate, seed: 0.3).rename(columns={"value": "kta"}).assign(process="discrete")
    flow = steps.assign(process="gradient_flow", kta=0.301)
    assert verdict("flow_ends_alike", pd.concat([steps, flow])) == "passed"
    assert verdict("flow_ends_alike", pd.concat([steps, flow.assign(kta=0.31)])) == "failed"
    assert verdict("flow_ends_alike", steps) == "underpowered"


# --- the central flow -------------------------------------------------------------------------------------------------


def family(rate=0.2, seed=0, crossed_at=10, steps=41, critical=1, drift=0.0):
    """All processes of one initialisation: the flow is on the midpoints, gradient flow apart."""
    step = np.arange(steps)
    common = {"learning_rate": rate, "seed": seed, "step": step, "crossed_at": crossed_at, "ntk_sharpness": 2 / rate}
    loss = np.exp(-step / 20)
    oscillation = np.where(step >= crossed_at, 0.01, 0)
    rows = {
        "discrete": {"loss": loss + oscillation / rate, "kta": 0.3 + 0.01 * (-1.0) ** step},
        "midpoint": {"loss": loss, "kta": 0.3 + 0.001 * step, "oscillation": oscillation},
        "central_flow": {"loss": loss, "kta": 0.3 + (0.001 + drift) * step, "oscillation": oscillation,
                         "critical": np.where(step >= crossed_at, critical, 0)},
        "gradient_flow": {"loss": loss, "kta": 0.3 - 0.001 * step},
    }  # fmt: skip
    frames = [pd.DataFrame({**common, "process": name, **values}) for name, values in rows.items()]
    return pd.concat(frames, ignore_index=True).assign(c5=lambda frame: frame["kta"] / 2)


def families(**options):
    return pd.concat([family(seed=seed, **options) for seed in range(3)], ignore_index=True)


FLOW = [
    "kta_follows_the_central_flow", "c5_follows_the_central_flow", "loss_predicted", "oscillation_predicted",
    "flow_loss_falls",
]  # fmt: skip


@pytest.mark.parametrize("claim", FLOW)
def test_a_flow_that_explains_gradient_descent(claim):
    assert verdict(claim, families()) == "passed"
    if claim != "flow_loss_falls":
        assert verdict(claim, family()) == "underpowered"
        assert verdict(claim, families(crossed_at=np.nan)) == "underpowered", "no run met its line"


def test_a_flow_that_goes_elsewhere():
    assert verdict("kta_follows_the_central_flow", families(drift=-0.001)) == "failed"
    assert verdict("c5_follows_the_central_flow", families(drift=0.001)) == "failed"
    frame = families()
    flow = frame["process"] == "central_flow"
    frame.loc[flow, "oscillation"] *= 3
    assert verdict("loss_predicted", frame) == "failed"
    assert verdict("oscillation_predicted", frame) == "failed"
    frame.loc[flow & (frame["step"] == 7), "loss"] *= 1.1
    assert verdict("flow_loss_falls", frame) == "failed"


def test_what_comes_before_the_window_does_not_count():
    frame = families()
    frame.loc[(frame["process"] == "central_flow") & (frame["step"] < 20), "kta"] += 1
    assert verdict("kta_follows_the_central_flow", frame) == "passed"
    frame.loc[(frame["process"] == "discrete") & (frame["step"] < 10), "loss"] += 1
    assert verdict("loss_predicted", frame) == "passed"
    frame.loc[(frame["process"] == "discrete") & (frame["step"] == 12), "loss"] += 10
    assert verdict("loss_predicted", frame) == "failed"


def test_one_critical_eigenvalue_is_not_several():
    assert verdict("several_critical", families()) == "failed"
    assert verdict("several_critical", families(critical=2)) == "passed"
    assert verdict("several_critical", families()[lambda frame: frame["process"] == "midpoint"]) == "underpowered"


# --- held-out examples ------------------------------------------------------------------------------------------------


def test_the_kernel_speaks_for_the_network_where_it_agrees_nearly_always():
    frame = grid(lambda rate, seed: 0.95 - 0.01 * seed).rename(columns={"value": "regression_agreement"})
    assert verdict("kernel_predicts_the_network", frame) == "passed"
    assert verdict("kernel_predicts_the_network", frame.assign(regression_agreement=0.85)) == "failed"


def test_training_helps_the_kernel_where_its_errors_get_fewer():
    frame = grid(lambda rate, seed: 0.2 - 0.1 * rate).rename(columns={"value": "regression_error_rate"})
    frame = frame.assign(first_regression_error_rate=0.21, test_error_rate=0.1)
    assert verdict("training_helps_the_kernel", frame) == "passed"
    assert verdict("training_helps_the_kernel", frame.assign(first_regression_error_rate=0.17)) == "failed"
