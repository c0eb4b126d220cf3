"""Phases of hand-made series with known answers, and of random ones against a loop."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, one_run

from analysis.phases import PHASES, phase_summary, phases
from pipeline.errors import InputError

LINE = 2.0  # learning rate 1
P, S, R, F, D = range(len(PHASES))


def lazy(numbers):
    """In blocks of three rows, which are not the runs."""
    numbers = np.array(numbers, dtype=float)
    return da.from_array(numbers, chunks=(3, *numbers.shape[1:]))


def series(*runs):
    """A lazy sweep of the group `scalars`: (sharpness, kta, status, steps) per run, learning rate 1, one example."""
    sharpness, kta, names, status, steps, seeds = [], [], [], [], [], []
    for seed, (run_sharpness, run_kta, run_status, run_steps) in enumerate(runs):
        sharpness += list(run_sharpness)
        kta += list(run_kta)
        names += [f"r{seed}"] * len(run_sharpness)
        status += [run_status] * len(run_sharpness)
        steps += list(run_steps)
        seeds += [seed] * len(run_sharpness)
    rows = len(names)
    ds = xr.Dataset(
        {
            "ntk_sharpness": ("snapshot", lazy(sharpness)),
            "target_energy": ("snapshot", lazy(kta)),
            "frobenius_norm": ("snapshot", lazy(np.ones(rows))),
            "target": (("snapshot", "sample", "output"), lazy(np.ones((rows, 1, 1)))),
        },
        coords={
            "learning_rate": ("snapshot", np.ones(rows)),
            "seed": ("snapshot", seeds),
            "step": ("snapshot", np.array(steps, dtype=np.int64)),
            "run": ("snapshot", names),
            "status": ("snapshot", status),
            "loss": ("snapshot", np.ones(rows)),
        },
    )
    return ds.set_index(snapshot=["learning_rate", "seed", "step"])


SAWTOOTH = (
    [0.5, 1.0, 1.5, 2.5, 3.5, 2.5, 1.5, 1.5, 2.5],
    [0.1, 0.1, 0.2, 0.2, 0.3, 0.5, 0.7, 0.7, 0.4],
    "complete",
    range(9),
)
NEVER = ([1.0, 1.5, 1.8, 1.7, 1.2, 1.0], [0.1, 0.2, 0.3, 0.3, 0.3, 0.4], "complete", range(6))
BLOWN_UP = ([1.0, 1.5, 2.5, 1.5, 2.5, 4.0, 9.0], [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.0], "diverged", range(7))
SINGLE = ([3.0], [0.5], "complete", [0])
ALL = (SAWTOOTH, NEVER, BLOWN_UP, SINGLE)


def of_run(result, number):
    return result.isel(snapshot=np.flatnonzero(result.run == f"r{number}")).compute()


def test_a_sawtooth_has_means_changes_and_phases_by_hand():
    result = of_run(phases(series(*ALL)), 0)
    nan = np.nan
    np.testing.assert_allclose(result.sharpness, SAWTOOTH[0])
    np.testing.assert_allclose(result.line, LINE)
    np.testing.assert_allclose(result.kta, SAWTOOTH[1])
    np.testing.assert_allclose(result.sharpness_mean, [0.75, 1.25, 2.0, 3.0, 3.0, 2.0, 1.5, 2.0, nan])
    np.testing.assert_allclose(result.sharpness_change, [nan, 0.5, 0.75, 1.0, 0.0, -1.0, -0.5, 0.5, nan])
    np.testing.assert_allclose(result.kta_mean, [0.1, 0.15, 0.2, 0.25, 0.4, 0.6, 0.7, 0.55, nan])
    np.testing.assert_allclose(result.kta_change, [nan, 0.05, 0.05, 0.05, 0.15, 0.2, 0.1, -0.15, nan])
    assert list(result.phase) == [P, P, P, R, F, F, F, R, R]


def test_a_run_that_never_crosses_sharpens_and_is_stable():
    assert list(of_run(phases(series(*ALL)), 1).phase) == [P, P, P, S, S, S]


def test_a_diverged_run_ends_after_its_last_upward_crossing():
    assert list(of_run(phases(series(*ALL)), 2).phase) == [P, P, F, F, D, D, D]
    complete = (*BLOWN_UP[:2], "complete", BLOWN_UP[3])
    assert list(phases(series(complete)).phase.values) == [P, P, F, F, R, R, R]


def test_a_run_that_diverged_below_its_line_has_no_diverged_rows():
    assert list(phases(series((*NEVER[:2], "diverged", NEVER[3]))).phase.values) == [P, P, P, S, S, S]


def test_a_run_above_its_line_from_the_start_has_crossed_at_its_first_row():
    result = phases(series(([3.0, 4.0, 5.0], [0.1, 0.1, 0.1], "diverged", range(3))))
    assert list(result.phase.values) == [D, D, D]
    assert int(phase_summary(result).crossing_step[0]) == 0


def test_on_the_line_is_not_above_it():
    result = phases(series(([1.0, 2.0, 2.0], [0.1] * 3, "complete", range(3))))
    assert list(result.phase.values) == [P, P, P]
    assert not phase_summary(result).crossed[0]


@pytest.mark.parametrize(("sharpness", "phase"), [([1.0], [S]), ([3.0], [F]), ([1.0, 1.5], [S, S])], ids=str)
def test_runs_too_short_for_a_trend_count_as_flat(sharpness, phase):
    result = phases(series((sharpness, [0.5] * len(sharpness), "complete", range(len(sharpness)))))
    assert list(result.phase.values) == phase
    assert np.isnan(result.sharpness_change).all()


def test_oscillation_of_period_two_is_flat_not_rising():
    result = phases(series(([2.1, 2.9, 2.1, 2.9, 2.1, 2.9], [0.5] * 6, "complete", range(6))))
    assert list(result.phase.values) == [F] * 6


def test_summary_by_hand():
    summary = phase_summary(series(*ALL)).compute()
    assert list(summary.run.values) == ["r0", "r1", "r2", "r3"]
    assert list(summary.status.values) == ["complete", "complete", "diverged", "complete"]
    assert list(summary.seed.values) == [0, 1, 2, 3]
    assert list(summary.crossed) == [True, False, True, True]
    assert list(summary.crossing_step) == [3, -1, 2, 0]
    np.testing.assert_allclose(summary.kta_change_rising, [-0.1, 0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(summary.kta_change_falling, [0.45, 0, 0.15, 0])
    np.testing.assert_allclose(summary.steps_rising, [2, 0, 0, 0])
    np.testing.assert_allclose(summary.steps_falling, [3, 0, 2, 0])
    np.testing.assert_allclose(summary.kta_gain_rising, [-0.05, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(summary.kta_gain_falling, [0.15, np.nan, 0.075, np.nan])
    np.testing.assert_allclose(summary.max_sharpness, [3.5, 1.8, 9.0, 3.0])
    np.testing.assert_allclose(summary.final_sharpness_mean, [2.0, 1.1, 6.5, np.nan])
    assert list(summary.n_valid) == [5, 0, 2, 0]
    assert summary.crossed.dtype == bool


def test_summary_takes_rows_of_phases_as_well():
    ds = series(*ALL)
    xr.testing.assert_identical(phase_summary(phases(ds)).compute(), phase_summary(ds).compute())


def test_a_sparser_cadence_counts_steps_and_says_so():
    sparse = (*SAWTOOTH[:3], [10 * step for step in range(9)])
    result = phases(series(sparse))
    summary = phase_summary(result).compute()
    assert result.kta_mean.attrs["largest_step_gap"] == 10
    assert phases(series(SAWTOOTH)).kta_mean.attrs["largest_step_gap"] == 1
    assert summary.steps_falling.item() == 30
    assert summary.kta_gain_falling.item() == pytest.approx(0.015)
    assert summary.crossing_step.item() == 30


def test_rows_in_any_order_give_each_row_the_same_answer():
    ds = series(*ALL)
    order = np.random.default_rng(0).permutation(ds.sizes["snapshot"])
    shuffled = phases(ds.isel(snapshot=order)).compute()
    xr.testing.assert_identical(shuffled, phases(ds).compute().isel(snapshot=order))


def naive_phases(sharpness, diverged):
    """The definition, row by row."""
    out, crossed, last = [], False, None
    for t, value in enumerate(sharpness):
        inside = min(max(t, 1), len(sharpness) - 2)
        change = 0.0
        if len(sharpness) > 2:
            before = (sharpness[inside - 1] + sharpness[inside]) / 2
            change = (sharpness[inside] + sharpness[inside + 1]) / 2 - before
        crossed = crossed or value > LINE
        if value > LINE and (t == 0 or sharpness[t - 1] <= LINE):
            last = t
        out.append((R if change > 0 else F) if crossed else (P if change > 0 else S))
    if diverged and last is not None:
        out[last:] = [D] * (len(out) - last)
    return out


values = st.floats(0.1, 4)
runs = st.lists(st.tuples(st.lists(st.tuples(values, values), min_size=1, max_size=12), st.booleans()),
                min_size=1, max_size=3)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(runs)
def test_random_series_agree_with_the_definition_and_changes_add_up(drawn):
    ds = series(*(
        ([s for s, _ in rows], [q for _, q in rows], "diverged" if diverged else "complete", range(len(rows)))
        for rows, diverged in drawn
    ))  # fmt: skip
    result = phases(ds).compute()
    summary = phase_summary(result)
    for number, (rows, diverged) in enumerate(drawn):
        sharpness, kta = zip(*rows, strict=True)
        phase = naive_phases(sharpness, diverged)
        assert list(of_run(result, number).phase) == phase
        # Σ of the changes over consecutive rows is the mean at the last of them minus the mean before the first
        counted = [t for t in range(1, len(rows) - 1) if phase[t] in (R, F)]
        total = float(summary.kta_change_rising[number] + summary.kta_change_falling[number])
        steps = float(summary.steps_rising[number] + summary.steps_falling[number])
        assert steps == len(counted) == int(summary.n_valid[number])
        if counted:
            first, end = counted[0], counted[-1]
            expected = (kta[end] + kta[end + 1]) / 2 - (kta[first - 1] + kta[first]) / 2
            assert total == pytest.approx(expected, abs=1e-12)
        else:
            assert total == 0


def test_lines_and_kta_of_a_sweep_are_those_of_its_runs():
    ds = mock_sweep("scalars", n=5, c=2, steps=range(6))
    result = phases(ds).compute()
    np.testing.assert_allclose(result.line, 2 / ds.learning_rate)
    kta = [
        np.einsum("ic,ij,jc->", y, k, y) / np.linalg.norm(k) / np.linalg.norm(y @ y.T)
        for k, y in zip(
            mock_sweep(n=5, c=2, steps=range(6), dtype=float).ntk.values, ds.target.values.astype(float), strict=True
        )
    ]
    np.testing.assert_allclose(result.kta, kta, rtol=1e-6)


@pytest.mark.parametrize("choose", ["sel", "plain"])
def test_one_run_gives_what_the_sweep_gives(choose):
    ds = mock_sweep("scalars", steps=range(6))
    run = ds.sel(learning_rate=0.4, seed=1) if choose == "sel" else one_run(ds, "lr-0.4_seed-1")
    result, whole = phases(run).compute(), phases(ds).sel(learning_rate=0.4, seed=1).compute()
    for name in result:
        np.testing.assert_array_equal(result[name], whole[name], err_msg=name)
    assert phase_summary(run).sizes == {"run": 1}


def test_everything_stays_lazy(no_compute):
    ds = series(*ALL)
    rows = phases(ds)
    results = [*rows.items(), *phase_summary(ds).items(), *phase_summary(rows).items()]
    # learning rates are coordinates in memory, and so are their lines
    assert [name for name, array in results if array.chunks is None] == ["line"]


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows along `snapshot`"):
        phases(series(SAWTOOTH).isel(snapshot=[]))


def test_numpy_gives_numpy():
    ds = series(*ALL)
    assert all(array.chunks is None for array in phases(ds.compute()).values())
    xr.testing.assert_identical(phases(ds.compute()), phases(ds).compute())


def test_everything_is_described_and_phases_follow_cf():
    ds = series(*ALL)
    rows, summary = phases(ds), phase_summary(ds)
    for name, array in {**rows, **summary}.items():
        assert {"long_name", "units", "description"} <= array.attrs.keys(), name
    assert rows.phase.dtype == np.int8
    meanings = dict(zip(rows.phase.attrs["flag_values"], rows.phase.attrs["flag_meanings"].split(), strict=True))
    assert meanings == {
        0: "progressive_sharpening", 1: "stable", 2: "eos_rising", 3: "eos_falling", 4: "diverged",
    }  # fmt: skip
    xr.testing.assert_identical(rows.coords.to_dataset(), ds.coords.to_dataset())
    assert set(summary.coords) == {"run", "status", "learning_rate", "seed"}


def test_results_survive_a_trip_through_zarr(tmp_path):
    rows = phases(series(*ALL)).compute().reset_index("snapshot").drop_vars(["run", "status"])
    rows.to_zarr(tmp_path / "phases.zarr", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "phases.zarr", consolidated=False) as read:
        xr.testing.assert_identical(read.drop_attrs().compute(), rows.drop_attrs())
        assert read.phase.attrs["flag_meanings"] == " ".join(PHASES)
        assert list(read.phase.attrs["flag_values"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("missing", ["ntk_sharpness", "target_energy", "target"])
def test_a_missing_variable_is_named(missing):
    with pytest.raises(InputError, match=f"needs `{missing}`"):
        phases(series(SAWTOOTH).drop_vars(missing))
