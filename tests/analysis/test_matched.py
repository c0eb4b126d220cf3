"""Matched loss against a loop, by hand, and without reading what it does not return."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, one_run

from analysis.alignment import alignment
from analysis.matched import at_loss
from pipeline.errors import InputError


def rows_with_losses(losses, steps=None):
    """A numpy sweep with one run per list of losses; `row` numbers its rows."""
    names = [f"r{i}" for i, values in enumerate(losses) for _ in values]
    step = np.concatenate(steps if steps is not None else [np.arange(len(values)) for values in losses])
    return xr.Dataset(
        {"row": ("snapshot", np.arange(len(names))), "constant": ("sample", [1.0, 2.0])},
        coords={
            "run": ("snapshot", names),
            "status": ("snapshot", ["complete"] * len(names)),
            "step": ("snapshot", step),
            "loss": ("snapshot", np.concatenate(losses)),
        },
    )


def test_the_first_row_at_or_below_the_level_is_taken_and_nothing_is_interpolated():
    ds = rows_with_losses([[1.0, 0.5, 0.1, 0.6, 0.05], [0.3, 0.2]])
    matched = at_loss(ds, 0.5)
    assert list(matched.row) == [1, 5]
    assert list(matched.loss) == [0.5, 0.3]
    assert list(matched.step) == [1, 0]
    assert list(matched.reached) == [True, True]


def test_a_run_that_never_gets_there_is_blank_and_keeps_its_status(sweep):
    matched = at_loss(sweep, 0.2).compute()
    assert list(matched.run.values) == [
        "lr-0.1_seed-0", "lr-0.1_seed-1", "lr-0.4_seed-0", "lr-0.4_seed-1", "lr-0.8_seed-0",
    ]  # fmt: skip
    assert list(matched.reached) == [True] * 4 + [False]
    assert list(matched.step) == [10, 10, 10, 10, -1]
    assert matched.step.dtype == np.int64
    np.testing.assert_allclose(matched.loss, [0.125, 0.1375, 0.125, 0.1375, np.nan])
    assert list(matched.status) == ["complete"] * 4 + ["diverged"]
    np.testing.assert_allclose(matched.learning_rate, [0.1, 0.1, 0.4, 0.4, 0.8])
    assert list(matched.seed) == [0, 1, 0, 1, 0]
    for name in ("ntk", "eigenvalue", "target_energy", "target"):
        assert np.isnan(matched[name].isel(run=-1)).all(), name
        expected = sweep[name].sel(learning_rate=0.4, seed=1, step=10)
        np.testing.assert_array_equal(matched[name].isel(run=3), expected, err_msg=name)
        assert matched[name].dtype == sweep[name].dtype
        assert matched[name].attrs == sweep[name].attrs


def test_matching_goes_before_or_after_a_measure(sweep):
    xr.testing.assert_allclose(alignment(at_loss(sweep, 0.2)).compute(), at_loss(alignment(sweep), 0.2).compute())


@settings(deadline=None, max_examples=50)
@given(
    losses=st.lists(st.lists(st.floats(1e-3, 10) | st.just(np.nan), min_size=1, max_size=6), min_size=1, max_size=4),
    level=st.floats(1e-3, 10),
    seed=st.integers(0, 2**31),
)
def test_any_losses_in_any_order_of_rows(losses, level, seed):
    ds = rows_with_losses(losses)
    matched = at_loss(ds.isel(snapshot=np.random.default_rng(seed).permutation(ds.sizes["snapshot"])), level)
    first = 0
    for number, values in enumerate(losses):
        expected = next((step for step, loss in enumerate(values) if loss <= level), None)
        row = matched.sel(run=f"r{number}")
        if expected is None:
            assert not row.reached
            assert row.step == -1
            assert np.isnan(row.row)
            assert np.isnan(row.loss)
        else:
            assert row.reached
            assert (row.step, row.row, row.loss) == (expected, first + expected, values[expected])
        first += len(values)


def test_only_the_rows_that_are_taken_are_ever_read(sweep):
    wanted = {2, 6, 10, 14}

    def read(block, block_info=None):
        row = block_info[0]["array-location"][0][0]
        # the blank row of the run that never gets there costs a read as well
        assert row in wanted | {16}, f"row {row} was read"
        return block

    row_by_row = sweep.ntk.variable.chunk(snapshot=1)
    watched = sweep.assign(ntk=row_by_row.copy(data=row_by_row.data.map_blocks(read, dtype=sweep.ntk.dtype)))
    assert np.isfinite(at_loss(watched, 0.2).ntk.isel(run=slice(4)).values).all()


def test_values_stay_lazy(sweep, no_compute):
    matched = at_loss(sweep, 0.2)
    assert all(array.chunks is not None for array in matched.values())
    assert matched.sizes["run"] == 5


def test_variables_without_rows_are_left_alone():
    xr.testing.assert_identical(at_loss(rows_with_losses([[1.0], [0.1]]), 0.5).constant,
                                rows_with_losses([[1.0]]).constant)  # fmt: skip


def test_losses_of_the_group_train_are_a_variable_there():
    matched = at_loss(mock_sweep("train"), 0.2)
    assert "loss" in matched.coords
    np.testing.assert_allclose(matched.loss[:4], [0.125, 0.1375, 0.125, 0.1375])


def test_one_run_of_plain_xarray(sweep):
    matched = at_loss(one_run(sweep, "lr-0.4_seed-1"), 0.2)
    assert matched.sizes["run"] == 1
    assert matched.step.item() == 10
    np.testing.assert_array_equal(matched.ntk[0], sweep.ntk.sel(learning_rate=0.4, seed=1, step=10))


def test_a_choice_of_the_sweep_by_its_axes(sweep):
    assert list(at_loss(sweep.sel(learning_rate=0.4), 0.2).seed) == [0, 1]
    assert at_loss(sweep.sel(learning_rate=0.4, seed=1), 0.2).loss.item() == pytest.approx(0.1375)


def test_what_is_new_is_described(sweep):
    matched = at_loss(sweep, 0.2)
    assert "loss <= 0.2" in matched.reached.attrs["description"]
    assert matched.loss.attrs == sweep.loss.attrs


@pytest.mark.parametrize("level", [0, -0.1, np.nan, np.inf, True, "0.1", None], ids=repr)
def test_levels_that_are_no_losses_are_refused(sweep, level):
    with pytest.raises(InputError, match=r"level = .*must be a positive finite loss, for example 0.01"):
        at_loss(sweep, level)


def test_a_dataset_without_losses_is_refused(sweep):
    with pytest.raises(InputError, match="at_loss needs `loss`"):
        at_loss(sweep.drop_vars("loss"), 0.1)
