"""Loading: committed rows as one lazy dataset, against plain xarray and the arrays themselves."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_store import mock_run, mock_store

from analysis import load
from analysis.load import open_run, open_runs, open_sweep
from pipeline import schema
from pipeline.cadence import Cadence
from pipeline.disk import Directory
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.store import list_runs, read_run, run_path

N, C, K, STEPS = 7, 2, 3, 12
ROWS = {"hessian": 3, "snapshots": 7, "spectra": 4, "scalars": 13, "train": 13}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four runs: one diverged, one that is not finished."""
    return mock_store(
        tmp_path_factory.mktemp("store"), steps=STEPS, n=N, c=C, k=K, diverged=[(1.2, 0)], growing=[(1.2, 1)]
    )


@pytest.fixture
def small(tmp_path):
    """One run that a test may change."""
    return mock_run(tmp_path, 0.1, 0, steps=4, n=5, k=2)


def plain(path, group):
    """What xarray and zarr alone make of a group."""
    return xr.open_zarr(path, group=group, chunks=None).load()


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", schema.GROUPS)
def test_rows_are_those_that_plain_xarray_reads(root, group):
    ds = open_sweep(root, group)
    assert ds.sizes["snapshot"] == 4 * ROWS[group]
    for run in list_runs(root):
        mine = ds.isel(snapshot=ds.run == run.run_id)
        theirs = plain(run.path, group)
        assert set(mine.data_vars) - {"target"} == set(theirs.data_vars) - {"digest"}
        for name in set(theirs.variables) - {"digest"}:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
            assert mine[name].dtype == theirs[name].dtype, name


def test_a_run_is_a_sweep_of_one(root):
    path = run_path(root, "lr-0.1_seed-1")
    ds = open_sweep(root)
    xr.testing.assert_identical(open_run(path).compute(), ds.isel(snapshot=ds.run == "lr-0.1_seed-1").compute())


def test_rows_are_indexed_by_the_axes_and_step(root):
    ds = open_sweep(root, "spectra")
    index = ds.indexes["snapshot"]
    assert index.names == ["learning_rate", "seed", "step"]
    assert index.is_monotonic_increasing
    assert index.is_unique
    step = ds.sel(learning_rate=1.2, seed=0).step
    np.testing.assert_array_equal(step, [0, 5, 10, 12])
    grid = ds.loss.unstack()
    assert dict(grid.sizes) == {"learning_rate": 2, "seed": 2, "step": 4}
    assert grid.sel(learning_rate=0.1, seed=1, step=5) == plain(run_path(root, "lr-0.1_seed-1"), "spectra").loss[1]


def test_learning_rates_come_in_the_order_of_numbers(tmp_path):
    mock_store(tmp_path, learning_rates=[0.02, 0.5, 0.1], seeds=[10, 9], steps=1, n=4, k=1)
    index = open_sweep(tmp_path, "train").indexes["snapshot"]
    assert list(index.droplevel("step").unique()) == [(lr, seed) for lr in (0.02, 0.1, 0.5) for seed in (9, 10)]


def test_coordinates_say_which_run_and_how_it_ended(root):
    ds = open_sweep(root)
    status = {name: set(rows.status.values) for name, rows in ds.reset_index("snapshot").groupby("run")}
    assert status == {
        "lr-0.1_seed-0": {"complete"},
        "lr-0.1_seed-1": {"complete"},
        "lr-1.2_seed-0": {"diverged"},
        "lr-1.2_seed-1": {"stale"},
    }


def test_status_of_a_run_that_is_being_written(tmp_path):
    path = mock_run(tmp_path, 0.1, 0, steps=2, n=4, k=1, end=None)
    with Directory(path).lease("LEASE", b"a test"):
        assert set(open_run(path).status.values) == {"running"}
    assert set(open_run(path).status.values) == {"stale"}


def test_loss_is_data_in_train_and_a_coordinate_elsewhere(root):
    assert "loss" in open_sweep(root, "train").data_vars
    for group in ("snapshots", "spectra", "scalars"):
        assert "loss" in open_sweep(root, group).coords


@pytest.mark.parametrize("group", schema.GROUPS)
def test_targets_stand_beside_every_row(root, group):
    ds = open_sweep(root, group)
    assert ds.target.dims == ("snapshot", "sample", "output")
    for run in list_runs(root):
        target = plain(run.path, "probe").target.values
        block = ds.target.isel(snapshot=ds.run == run.run_id).values
        np.testing.assert_array_equal(block, np.broadcast_to(target, block.shape))


def test_targets_take_the_memory_of_one_row(root):
    target = open_sweep(root, "scalars").target.data
    strides = target.map_blocks(lambda block: np.array([[[block.strides[0]]]]), chunks=((1,) * 4, (1,), (1,)))
    np.testing.assert_array_equal(strides.compute().ravel(), 0)


def test_every_variable_has_a_unit_and_a_name(root):
    for group in schema.GROUPS:
        ds = open_sweep(root, group)
        for name in set(ds.variables) - {"snapshot"}:
            assert {"units", "long_name", "description"} <= ds[name].attrs.keys(), (group, name)
            assert "coordinates" not in ds[name].attrs


# --- laziness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", schema.GROUPS)
def test_opening_computes_nothing_and_reads_no_data(root, group, no_compute, monkeypatch):
    read = []
    original = load.Run.read
    monkeypatch.setattr(load.Run, "read", lambda run, name, *rows: read.append(name) or original(run, name, *rows))
    ds = open_sweep(root, group)
    assert set(read) <= {f"{group}/step", f"{group}/loss"}
    for name, array in ds.data_vars.items():
        assert array.chunks is not None, name
    for name, array in ds.coords.items():
        assert array.chunks is None, name


def test_a_task_reads_several_rows(root):
    assert open_sweep(root).ntk.chunks[0] == (ROWS["snapshots"],) * 4


def test_a_block_stays_below_its_limit(root, monkeypatch):
    monkeypatch.setattr(load, "BLOCK_BYTES", 3 * N * N * 4)
    ds = open_sweep(root)
    assert ds.chunks["snapshot"] == (3, 3, 1) * 4  # the same for every variable
    whole = np.concatenate([plain(run.path, "snapshots").ntk.values for run in list_runs(root)])
    np.testing.assert_array_equal(ds.ntk, whole)


def test_a_row_larger_than_a_block_is_a_task_of_its_own(root, monkeypatch):
    monkeypatch.setattr(load, "BLOCK_BYTES", 1)
    assert set(open_sweep(root).ntk.chunks[0]) == {1}


@settings(max_examples=60)
@given(
    rows=st.slices(4 * ROWS["snapshots"]) | st.integers(-4 * ROWS["snapshots"], 4 * ROWS["snapshots"] - 1),
    first=st.slices(N) | st.integers(0, N - 1) | st.lists(st.integers(0, N - 1), max_size=4),
    second=st.slices(N) | st.integers(-N, N - 1),
)
def test_any_part_is_that_part_of_the_whole(root, rows, first, second):
    ds = open_sweep(root)
    expected = ds.ntk.compute().values[rows, first, second]
    np.testing.assert_array_equal(ds.ntk[rows, first, second].compute(), expected)


def test_rows_larger_than_a_block_come_in_their_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "BAND_BYTES", 3 * N * 4)
    path = mock_run(tmp_path, 0.1, 0, steps=4, n=N, k=2)
    whole = open_run(path)
    monkeypatch.setattr(load, "BLOCK_BYTES", N * N * 4 - 1)
    ds = open_run(path)
    assert whole.ntk.chunksizes["sample"] == (N,)
    assert ds.ntk.chunksizes["sample"] == (3, 3, 1)
    xr.testing.assert_identical(ds.ntk.compute(), whole.ntk.compute())
    np.testing.assert_array_equal(ds.ntk[2, 4:6, ::2], plain(path, "snapshots").ntk[2, 4:6, ::2])


def test_one_row_of_a_run_reads_one_chunk(root, monkeypatch):
    ds = open_run(run_path(root, "lr-0.1_seed-0"))
    read = []
    original = load.Run.read
    monkeypatch.setattr(load.Run, "read", lambda run, name, *rows: read.append(rows) or original(run, name, *rows))
    ds.ntk[3].compute()
    assert read == [(3, 4, [(0, 7), (0, 7)])]


def test_tasks_travel_without_the_whole_record(root):
    tasks = pickle.dumps(dict(open_run(run_path(root, "lr-0.1_seed-0")).ntk.__dask_graph__()))
    assert len(tasks) < 5000 < run_path(root, "lr-0.1_seed-0").joinpath("zarr.json").stat().st_size


def test_arrays_of_changed_runs_have_other_names(tmp_path):
    path = mock_run(tmp_path, 0.1, 0, steps=2, n=4, k=1, end=None)
    before = open_run(path).ntk.data.name
    assert open_run(path).ntk.data.name == before
    mock_run(tmp_path, 0.1, 0, steps=3, n=4, k=1)
    assert open_run(path).ntk.data.name != before


# --- runs that differ -------------------------------------------------------------------------------------------------


def test_further_axes_are_levels(tmp_path):
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0], axes={"model.width": [8, 4]}, steps=2, n=4, k=1)
    ds = open_sweep(tmp_path, "spectra")
    assert ds.indexes["snapshot"].names == ["learning_rate", "seed", "model.width", "step"]
    assert set(ds.sel({"model.width": 4}).run.values) == {"lr-0.1_seed-0_model.width-4"}


def test_a_run_without_an_axis_stands_at_its_own_value(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1, axes={"model.width": 4, "model.name": "other"})
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1)
    index = open_sweep(tmp_path, "train").indexes["snapshot"]
    assert list(index.droplevel("step").unique()) == [(0.1, 0, "mlp", 8), (0.1, 0, "other", 4)]


def test_a_place_that_is_not_known_comes_last(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1, axes={"data.noise": 0.5})
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1)
    ds = open_sweep(tmp_path, "train")
    assert list(ds.run.values[[0, -1]]) == ["lr-0.1_seed-0_data.noise-0.5", "lr-0.1_seed-0"]
    np.testing.assert_array_equal(ds["data.noise"], [0.5, 0.5, np.nan, np.nan])


@pytest.mark.parametrize(
    ("other", "group", "letter"),
    [({"n": 5}, "scalars", "n = 4"), ({"c": 2}, "train", "c = 1"), ({"k": 2}, "spectra", "k = 1")],
    ids=["n", "c", "k"],
)
def test_runs_of_other_sizes_are_refused(tmp_path, other, group, letter):
    mock_run(tmp_path, 0.1, 0, **{"steps": 1, "n": 4, "k": 1})
    mock_run(tmp_path, 0.2, 0, **{"steps": 1, "n": 4, "k": 1, **other})
    with pytest.raises(InputError, match=rf"lr-0.1_seed-0 has {letter}, lr-0.2_seed-0 has .*; choose runs with where="):
        open_sweep(tmp_path, group)
    assert open_sweep(tmp_path, group, where="learning_rate < 0.15").sizes["sample"] == 4


def test_networks_of_several_widths_make_one_sweep_without_their_parameters(tmp_path):
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0], axes={"model.width": [8, 4]}, steps=1, n=4, k=1)
    both = open_sweep(tmp_path, "snapshots")
    assert "parameter" not in both
    assert set(both["model.width"].values) == {4, 8}
    assert np.isfinite(both.ntk.values).all()
    one = open_sweep(tmp_path, "snapshots", where="p = 16")
    assert one.parameter.shape[1] == 16


def test_a_variable_that_one_run_lacks_is_nan_there(tmp_path, monkeypatch):
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1)
    train = {name: variable for name, variable in schema.TRAIN.items() if name != "accuracy"}
    monkeypatch.setitem(schema.GROUPS, "train", train)
    mock_run(tmp_path, 0.2, 0, steps=1, n=4, k=1)
    monkeypatch.undo()
    accuracy = open_sweep(tmp_path, "train").accuracy
    np.testing.assert_array_equal(np.isnan(accuracy), [False, False, True, True])


# --- choosing runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "runs"),
    [
        ("learning_rate > 1", ["lr-1.2_seed-0", "lr-1.2_seed-1"]),
        ("status = 'complete' and seed = 1", ["lr-0.1_seed-1"]),
        ("config->>'$.model.name' = 'mlp' and n = 7 and status in ('stale', 'diverged')",
         ["lr-1.2_seed-0", "lr-1.2_seed-1"]),
        ("learning_rate = (select min(learning_rate) from runs) and seed = 0", ["lr-0.1_seed-0"]),
    ],
    ids=["number", "and", "json", "subquery"],
)  # fmt: skip
def test_where_chooses_runs(root, where, runs):
    assert sorted(set(open_sweep(root, "train", where=where).run.values)) == runs


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("width = 3", 'Referenced column "width" not found'),
        ("seed =", "Parser Error"),
        ("seed = 0; drop table runs", "Parser Error"),
        ("run_id in (select content from read_text('/etc/passwd'))", "file system operations are disabled"),
        ("status", "Conversion Error"),
        ("", "Parser Error"),
    ],
    ids=["column", "syntax", "second_statement", "file", "not_a_condition", "empty"],
)
def test_a_bad_condition_is_one_line(root, where, message):
    with pytest.raises(InputError, match=message) as error:
        open_sweep(root, where=where)
    assert "\n" not in str(error.value)


def test_a_condition_that_leaves_nothing_says_so(root):
    with pytest.raises(MissingError, match=r"where = 'seed > 5' leaves none of 4 runs"):
        open_sweep(root, where="seed > 5")


# --- what is not there ------------------------------------------------------------------------------------------------


def test_only_committed_rows_are_seen(tmp_path):
    path = mock_run(tmp_path, 0.1, 0, steps=3, n=4, k=1, end=None)
    before = read_run(path)
    mock_run(tmp_path, 0.1, 0, steps=9, n=4, k=1, end=None)
    np.testing.assert_array_equal(open_runs([before], "scalars").step, range(4))
    np.testing.assert_array_equal(open_run(path, "scalars").step, range(10))
    ntk = open_runs([before], "snapshots").ntk
    np.testing.assert_array_equal(ntk, plain(path, "snapshots").ntk[: len(ntk)])


def test_runs_without_rows_are_left_out(tmp_path):
    every = {"snapshots": Cadence(every=1), "spectra": Cadence(every=1), "scalars": Cadence(every=1)}
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1)
    mock_run(tmp_path, 0.2, 0, steps=-1, n=4, k=1, cadences=every, end=None)
    assert read_run(run_path(tmp_path, "lr-0.2_seed-0")).lengths == dict.fromkeys(schema.GROUPS, 0)
    assert set(open_sweep(tmp_path).run.values) == {"lr-0.1_seed-0"}
    with pytest.raises(MissingError, match="no run has a committed row in the group 'snapshots'"):
        open_run(run_path(tmp_path, "lr-0.2_seed-0"))


def test_an_unknown_group_is_refused(root):
    with pytest.raises(
        InputError, match=r"group = 'probe': must be one of hessian, scalars, snapshots, spectra, train"
    ):
        open_sweep(root, "probe")


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        open_sweep(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a store"):
        open_sweep(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(MissingError, match="no run has a committed row"):
        open_sweep(tmp_path)


def test_a_damaged_chunk_is_named(small):
    chunk = small / "snapshots" / "ntk" / "c.2.0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    ds = open_run(small)
    assert ds.ntk[:2].compute().notnull().all()
    with pytest.raises(DamagedStore, match=rf"{chunk}: checksum does not match"):
        ds.ntk.compute()


def test_a_missing_chunk_is_never_nan(small):
    os.unlink(small / "spectra" / "eigenvalue" / "c.0.0")
    with pytest.raises(DamagedStore, match=r"eigenvalue/c\.0\.0.*does not exist"):
        open_run(small, "spectra").eigenvalue.compute()


# --- the package ------------------------------------------------------------------------------------------------------


def test_public_names_are_functions_whatever_was_imported_before():
    import analysis.alignment
    import analysis.phases

    for name in analysis.__all__:
        assert callable(getattr(analysis, name)), name
        assert name in dir(analysis)
    assert analysis.open_sweep is open_sweep
    assert pd.Series(analysis.__all__).is_monotonic_increasing


def test_importing_the_package_is_light():
    code = "import sys, analysis; print(*sorted({'numpy', 'xarray', 'dask', 'duckdb', 'pandas'} & sys.modules.keys()))"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
