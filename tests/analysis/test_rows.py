"""Rows grouped by run."""

import dask
import numpy as np
import pytest
import xarray as xr
from mock_sweep import mock_sweep, one_run

from analysis.rows import join, one_row_per_run, require, runs_of, taken
from pipeline.errors import InputError


def test_runs_keep_their_order_and_their_rows_the_order_of_steps(sweep):
    order = np.random.default_rng(0).permutation(sweep.sizes["snapshot"])
    shuffled = sweep.isel(snapshot=order)
    runs = runs_of(shuffled)
    assert runs.dim == "snapshot"
    assert runs.names == list(dict.fromkeys(shuffled.run.values))
    assert sorted(np.concatenate(runs.rows)) == list(range(len(order)))
    for name, rows in zip(runs.names, runs.rows, strict=True):
        assert set(shuffled.run.values[rows]) == {name}
        assert list(runs.step[rows]) == ([0, 1] if name == "lr-0.8_seed-0" else [0, 1, 10, 100])


def test_a_dataset_along_step_is_one_run(sweep):
    runs = runs_of(one_run(sweep, "lr-0.1_seed-0"))
    assert (runs.dim, runs.names) == ("step", ["run"])
    np.testing.assert_array_equal(runs.rows, [[0, 1, 2, 3]])


def test_no_rows_are_refused(sweep):
    with pytest.raises(InputError, match="no rows along `snapshot`"):
        runs_of(sweep.isel(snapshot=[]))


def test_joined_runs_without_names_are_refused(sweep):
    joined = xr.concat([one_run(sweep, name) for name in ("lr-0.1_seed-0", "lr-0.4_seed-0")], "step")
    with pytest.raises(InputError, match=r"step 0 twice.* open them with analysis.open_sweep"):
        runs_of(joined)


def test_a_dataset_without_rows_is_refused(sweep):
    with pytest.raises(InputError, match=r"values along sample, .*: rows must lie along `snapshot` or `step`"):
        runs_of(sweep.isel(snapshot=0)[["ntk"]])


@pytest.mark.parametrize("select", [{}, {"learning_rate": 0.1}, {"learning_rate": 0.1, "seed": 0}], ids=str)
def test_one_row_per_run_keeps_every_axis(sweep, select):
    chosen = sweep.sel(select)
    taken = one_row_per_run(chosen, runs := runs_of(chosen), [rows[-1] for rows in runs.rows])
    assert taken.ntk.dims[0] == "run"
    assert list(taken.indexes["run"]) == runs.names
    for name in taken.run.values:
        row = taken.sel(run=name)
        assert f"lr-{float(row.learning_rate)}_seed-{int(row.seed)}" == name
        assert int(row.step) == (1 if name == "lr-0.8_seed-0" else 100)


def test_coordinates_of_rows_are_asked_for_by_name():
    with pytest.raises(InputError, match=r"phases needs `learning_rate`.* coordinate of every row"):
        require(mock_sweep("scalars").reset_index("snapshot").drop_vars("learning_rate"), "phases", "learning_rate")


def test_followers_and_ends_are_of_the_same_run(sweep):
    order = np.random.default_rng(0).permutation(sweep.sizes["snapshot"])
    shuffled = sweep.isel(snapshot=order)
    runs = runs_of(shuffled)
    following, exists = runs.followers()
    names, steps = shuffled.run.values, shuffled.step.values
    for row, (name, step) in enumerate(zip(names, steps, strict=True)):
        own = steps[names == name]
        assert names[following[row]] == names[runs.ends(0)[row]] == names[runs.ends(-1)[row]] == name
        assert steps[runs.ends(0)[row]] == own.min()
        assert steps[runs.ends(-1)[row]] == own.max()
        assert exists[row] == (step < own.max())
        assert steps[following[row]] == (own[own > step].min() if exists[row] else step)
    moved = taken(shuffled.trace, "snapshot", following)
    np.testing.assert_array_equal(moved, shuffled.trace.values[following])
    xr.testing.assert_identical(moved.coords.to_dataset(), shuffled.trace.coords.to_dataset())


def test_joined_groups_have_the_rows_of_both(sweep):
    scalars = mock_sweep("scalars", steps=(0, 10, 11)).isel(snapshot=slice(None, None, -1))
    joined = join(sweep[["ntk", "target"]], scalars)
    assert set(joined.data_vars) == {"ntk", "target", *scalars.data_vars}
    assert all(joined[name].chunks is not None for name in joined.data_vars)
    pairs = [*zip(joined.run.values, joined.step.values, strict=True)]
    both = {*zip(scalars.run.values, scalars.step.values, strict=True)}
    assert pairs == [pair for pair in zip(sweep.run.values, sweep.step.values, strict=True) if pair in both]
    assert ("lr-0.1_seed-0", 10) in pairs
    for row, (run, step) in enumerate(pairs):
        there = (scalars.run == run) & (scalars.step == step)
        assert joined.trace[row] == scalars.trace[there.values]
        here = (sweep.run == run) & (sweep.step == step)
        np.testing.assert_array_equal(joined.ntk[row], sweep.ntk[here.values][0])


def test_rows_in_the_place_of_others_keep_their_blocks_and_are_not_copied(sweep):
    """Copies of a run's first kernel, one for each of its rows, would be as large as the store."""
    positions = runs_of(sweep).ends(0)
    found = taken(sweep.ntk, "snapshot", positions)
    np.testing.assert_array_equal(found, sweep.ntk.values[positions])
    assert found.chunks == sweep.ntk.chunks
    blocks = dask.compute(*found.data.to_delayed().ravel(), scheduler="sync")
    assert {block.strides[0] for block in blocks if len(block) > 1} == {0}
    shuffled = np.random.default_rng(0).permutation(len(positions))
    np.testing.assert_array_equal(taken(sweep.ntk, "snapshot", shuffled), sweep.ntk.values[shuffled])


def test_a_join_keeps_the_values_of_the_first(sweep):
    other = sweep.assign(trace=2 * sweep.trace.variable, extra=3 * sweep.trace.variable)
    joined = join(sweep, other)
    np.testing.assert_array_equal(joined.trace, sweep.trace)
    np.testing.assert_array_equal(joined.extra, 3 * sweep.trace)


def test_groups_without_a_common_row_are_refused(sweep):
    with pytest.raises(InputError, match="share no row of the same run and step: record both at a common cadence"):
        join(sweep, mock_sweep("scalars", steps=(2, 3)))


def test_groups_opened_in_different_ways_are_refused(sweep):
    with pytest.raises(InputError, match="one group lie along `snapshot`, of the other along `step`: open both by"):
        join(sweep, one_run(sweep, "lr-0.1_seed-0"))
