"""Copies for other tools say what the store says."""

import duckdb
import numpy as np
import pytest
import xarray as xr
from mock_store import mock_store

from analysis import catalog, results
from analysis.export import export_store
from pipeline.errors import InputError
from pipeline.store import list_runs


@pytest.fixture
def root(tmp_path):
    store = tmp_path / "store"
    mock_store(store)
    results.analyze(store)
    catalog.sync(store)
    return store


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_come_out_whole(root, tmp_path, kind):
    paths = list(export_store(root, kind, tmp_path / "out"))
    assert {path.name for path in paths} == {f"{table}.{kind}" for table in catalog.TABLES}
    for table in catalog.TABLES:
        expected = catalog.query(root, f"select count(*) from {table}").rows[0][0]
        assert duckdb.sql(f"select count(*) from '{tmp_path / 'out' / table}.{kind}'").fetchall()[0][0] == expected
    assert catalog.query(root, "select count(*) from alignment").rows[0][0] > 0


def test_netcdf_holds_every_group_of_every_run(root, tmp_path):
    pytest.importorskip("h5netcdf")
    paths = list(export_store(root, "netcdf", tmp_path / "out"))
    runs = {run.run_id: run for run in list_runs(root)}
    assert {path.stem for path in paths} == set(runs)
    for path in paths:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            run = runs[path.stem]
            for group in run.lengths:
                for name in run.arrays(group):
                    np.testing.assert_array_equal(tree[group][name].values, run.read(f"{group}/{name}"))


def test_a_folder_that_cannot_be_made_is_refused(root, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot create"):
        list(export_store(root, "csv", tmp_path / "file" / "out"))


def test_a_failure_leaves_no_half_file(root, tmp_path, monkeypatch):
    def fail(root, table, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(catalog, "copy_table", fail)
    with pytest.raises(OSError, match="disk full"):
        list(export_store(root, "csv", tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
