"""Rows grouped by run."""

import numpy as np
import pytest
import xarray as xr
from mock_sweep import mock_sweep, one_run

from analysis.rows import one_row_per_run, require, runs_of
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
