"""The catalogue: tables equal to what they are derived from, always in step with the runs, and read-only."""

import csv
import logging
import os
import shutil
import threading
from unittest.mock import patch

import duckdb
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from mock_store import mock_run, mock_store

from analysis import catalog, results, tables
from analysis.catalog import TABLES, copy_table, query, sync, thinned, write_claims
from pipeline import schema
from pipeline.disk import Directory
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.store import list_runs, run_path

FIGURE_A = (
    "select learning_rate, step, avg(kta), stddev(kta), count(*) "
    "from alignment join runs using (run_id) group by 1, 2 order by 1, 2"
)
CLAIM = {
    "study": "mock", "claim": "it_rises", "statement": "It rises.", "rule": "It has to rise.", "changes": None,
    "source": "nobody", "level": 0.1, "value": "it rose by 1", "verdict": "passed", "runs": 4, "sql": "select 1",
}  # fmt: skip


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Six runs, one diverged and one that is not finished, with all results and the catalogue."""
    root = tmp_path_factory.mktemp("store")
    mock_store(
        root, learning_rates=[0.1, 1.2, 1.6], seeds=[1, 2], steps=12, n=8, k=6, diverged=[(1.6, 1)], growing=[(1.6, 2)]
    )
    results.analyze(root)
    sync(root)
    return root


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """What these tests write need not survive a power cut, and the disk is what they wait for."""
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two short runs."""
    return mock_store(tmp_path_factory.mktemp("template"), learning_rates=[0.1, 0.2], seeds=[0], steps=4, n=4, k=2)


@pytest.fixture
def root(template, tmp_path):
    """A copy of them that a test may change, by replacing files: the files are shared with the other tests."""
    return shutil.copytree(template, tmp_path / "store", copy_function=os.link)


def frame(root, sql, **options):
    table = query(root, sql, **options)
    return pd.DataFrame(table.rows, columns=table.columns)


def plain(root, run_id, group):
    """What xarray and zarr alone make of a group of a run."""
    return xr.open_zarr(run_path(root, run_id), group=group, chunks=None).load()


def everything(root):
    """All tables that are derived from the runs, without what says when and from which files."""
    with duckdb.connect(root / catalog.NAME, read_only=True) as connection:
        return {name: sorted(connection.table(name).fetchall(), key=repr) for name in TABLES.keys() - {"sync", "meta"}}


# --- content ----------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_registry(analysed):
    found = frame(
        analysed,
        "select table_name, column_name, data_type, comment from duckdb_columns() where not internal "
        "order by table_name, column_index",
    )
    expected = [(name, column) for name, layout in sorted(TABLES.items()) for column in layout.columns]
    assert list(zip(found.table_name, found.column_name, found.data_type, strict=True)) == [
        (name, column.name, column.type) for name, column in expected
    ]
    for comment, (_, column) in zip(found.comment, expected, strict=True):
        assert comment.startswith(column.description)


def test_figure_a(analysed):
    """The query that README and `demo` show, against the stored scalars."""
    rows = []
    for run in list_runs(analysed):
        ds = plain(analysed, run.run_id, "scalars")
        y = plain(analysed, run.run_id, "probe").target.values.astype(float)
        kta = ds.target_energy / ds.frobenius_norm / np.linalg.norm(y) ** 2
        rows += [
            (float(ds.learning_rate[0]), int(step), float(value)) for step, value in zip(ds.step, kta, strict=True)
        ]
    expected = pd.DataFrame(rows, columns=["learning_rate", "step", "kta"]).groupby(["learning_rate", "step"]).kta
    found = frame(analysed, FIGURE_A)
    assert list(zip(found.learning_rate, found.step, strict=True)) == list(expected.mean().index)
    np.testing.assert_allclose(found["avg(kta)"], expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(found["stddev(kta)"], expected.std(), rtol=1e-9)
    np.testing.assert_array_equal(found["count_star()"], 2)


def test_runs_are_in_the_table(analysed):
    expected = tables.run_table(analysed)
    found = frame(analysed, "select * from runs order by run_id")
    assert list(found.columns) == list(expected.columns)
    for name in found.columns:
        assert [None if pd.isna(value) else value for value in found[name]] == [
            None if pd.isna(value) else value for value in expected[name]
        ], name
    assert list(found.status) == ["complete"] * 4 + ["diverged", "stale"]


def test_snapshots_are_in_the_table(analysed):
    found = frame(analysed, "select * from snapshots where run_id = 'lr-0.1_seed-2' order by position")
    ds = plain(analysed, "lr-0.1_seed-2", "snapshots")
    np.testing.assert_array_equal(found.position, range(ds.sizes["step"]))
    for name in set(found.columns) - {"run_id", "position"}:
        np.testing.assert_array_equal(found[name], ds[name], err_msg=name)
    assert query(analysed, "select count(*) from snapshots").rows == [(6 * ds.sizes["step"],)]


def test_training_is_in_the_table(analysed, root, monkeypatch):
    found = frame(analysed, "select * from train where run_id = 'lr-1.2_seed-1' order by step")
    ds = plain(analysed, "lr-1.2_seed-1", "train")
    for name in set(found.columns) - {"run_id"} - schema.OF_PROCESS.keys():
        np.testing.assert_array_equal(found[name], ds[name], err_msg=name)
    assert found[list(schema.OF_PROCESS)].isna().all(axis=None)
    monkeypatch.setattr(catalog, "TRAIN_ROWS", 3)
    assert query(root, "select step from train order by run_id, step").rows == [(0,), (2,), (4,)] * 2


@given(length=st.integers(0, 5000), most=st.integers(2, 2000))
def test_thinned_keeps_first_and_last_and_order(length, most):
    kept = thinned(length, most)
    assert len(kept) == min(length, most)
    assert kept == sorted(set(kept))
    assert kept[:1] == [0][:length]
    assert kept[-1:] == [length - 1][:length]
    if length > most:
        gaps = np.diff(kept)
        assert gaps.max() - gaps.min() <= 1


def test_alignment_is_the_result(analysed):
    for run_id in ("lr-0.1_seed-1", "lr-1.6_seed-2"):
        ds = results.result(analysed, "alignment", run_id)
        found = frame(analysed, f"select * from alignment where run_id = '{run_id}' order by step")
        np.testing.assert_array_equal(found.step, ds.step)
        for name in ds.data_vars:
            np.testing.assert_array_equal(found[name].astype(float), ds[name], err_msg=name)
        assert set(found.columns) - set(ds.data_vars) == {"run_id", "step", "c10", "c20"}
        assert found[["c10", "c20"]].isna().all(axis=None)  # only six eigenpairs were recorded


def test_phases_are_the_result(analysed):
    run_id = "lr-1.2_seed-1"
    ds = results.result(analysed, "phases", run_id)
    found = frame(analysed, f"select * from phases where run_id = '{run_id}' order by step")
    for name in set(found.columns) - {"run_id", "phase"}:
        np.testing.assert_array_equal(found[name].astype(float), ds[name], err_msg=name)
    words = ds.phase.attrs["flag_meanings"].split()
    assert list(found.phase) == [words[flag] for flag in ds.phase.values]
    (row,) = frame(analysed, f"select * from phase_changes where run_id = '{run_id}'").to_dict("records")
    assert row.pop("run_id") == run_id
    for name, value in row.items():
        if ds[name].isnull() or (name == "crossing_step" and not ds.crossed):
            assert value is None or np.isnan(value), name
        else:
            assert value == ds[name].item(), name


def test_a_run_that_never_crossed_has_no_crossing_step(analysed):
    found = query(analysed, "select crossed, crossing_step from phase_changes where run_id = 'lr-0.1_seed-1'").rows
    assert found == [(False, None)]


def test_other_measures_are_in_long_form(analysed):
    ds = results.result(analysed, "modes", "lr-0.1_seed-1")
    found = frame(analysed, "select * from measures where run_id = 'lr-0.1_seed-1'")
    wide = found.pivot(index="step", columns="measure", values="value")
    assert set(wide.columns) == {f"{name}_{i}" for name in ds.data_vars for i in range(1, 7)}
    for name in ds.data_vars:
        np.testing.assert_array_equal(wide[[f"{name}_{i}" for i in range(1, 7)]], ds[name])


def test_a_measure_with_one_value_per_step_keeps_its_name(root, monkeypatch):
    ds = xr.Dataset({"rank": ("step", [1.0, np.nan])}, {"step": [0, 3]})
    found = catalog._long(list_runs(root)[0], ds)
    assert found.values.tolist()[0] == ["lr-0.1_seed-0", 0, "rank", 1.0]


def test_missing_is_null_and_never_nan(analysed):
    for name, layout in TABLES.items():
        columns = [column.name for column in layout.columns if column.type == "DOUBLE"]
        counts = ", ".join(f"count(*) filter (isnan({column}))" for column in columns) or "0"
        assert not any(query(analysed, f"select {counts} from {name}", sync=False).rows[0]), name
    assert query(analysed, "select count(*) from phases where kta_mean is null").rows == [(6,)]  # last row of each run
    assert query(analysed, "select count(*) > 0 from alignment where effective_rank is null").rows == [(True,)]


def test_meta_tells_what_this_is(analysed):
    ((version, layout, root, built_at, _),) = query(analysed, "select * from meta").rows
    assert (version, layout, root) == (1, catalog.LAYOUT, str(analysed))
    assert abs((pd.Timestamp.now("UTC").tz_localize(None) - built_at).total_seconds()) < 600


# --- syncing ----------------------------------------------------------------------------------------------------------


def test_nothing_new_writes_nothing_and_reads_no_finished_run(root, monkeypatch):
    results.analyze(root)
    path = sync(root)
    before = path.stat()
    monkeypatch.setattr(catalog, "read_run", lambda folder: pytest.fail(f"{folder} was read"))
    sync(root)
    query(root, "select 1")
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_only_runs_that_changed_are_read(root, monkeypatch):
    mock_run(root, 0.3, 0, steps=2, n=4, k=2, end=None)
    sync(root)
    mock_run(root, 0.3, 0, steps=4, n=4, k=2)
    read = []
    original = tables.run_row
    monkeypatch.setattr(tables, "run_row", lambda run: read.append(run.run_id) or original(run))
    assert query(root, "select run_id, steps, status from runs order by 1").rows == [
        ("lr-0.1_seed-0", 4, "complete"),
        ("lr-0.2_seed-0", 4, "complete"),
        ("lr-0.3_seed-0", 4, "complete"),
    ]
    assert read == ["lr-0.3_seed-0"]
    assert query(root, "select count(*), count(distinct (run_id, step)) from train").rows == [(15, 15)]


def test_a_status_that_changes_without_a_commit_is_seen(root):
    path = mock_run(root, 0.3, 0, steps=2, n=4, k=2, end=None)
    status = "select status from runs where learning_rate > 0.25"
    with Directory(path).lease("LEASE", b"a test"):
        assert query(root, status).rows == [("running",)]
    assert query(root, status).rows == [("stale",)]


def test_new_results_are_seen(root):
    count = "select count(*) from alignment"
    assert query(root, count).rows == [(0,)]
    results.analyze(root)
    assert query(root, count).rows == [(10,)]


def test_a_run_that_is_gone_leaves_every_table(root):
    results.analyze(root)
    sync(root)
    shutil.rmtree(run_path(root, "lr-0.1_seed-0"))
    sync(root)
    for name, layout in TABLES.items():
        if layout.columns[0].name == "run_id":
            assert query(root, f"select distinct run_id from {name}").rows == [("lr-0.2_seed-0",)], name


def test_deleting_it_loses_nothing(root):
    results.analyze(root)
    mock_run(root, 0.3, 0, steps=2, n=4, k=2, end=None)
    sync(root)
    mock_run(root, 0.3, 0, steps=4, n=4, k=2)
    results.analyze(root)
    path = sync(root)
    before = everything(root)  # built in two steps
    assert all(before[name] for name in before.keys() - {"claims"})
    path.unlink()
    query(root, "select 1", sync=False)
    assert everything(root) == before


@pytest.mark.parametrize("damage", ["text", "truncated", "other_layout", "other_database"])
def test_a_file_that_cannot_be_used_is_built_anew(root, damage):
    path = sync(root)
    if damage == "text":
        path.write_text("not a database")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "other_layout":
        with duckdb.connect(path) as connection:
            connection.execute("update meta set layout = 'older'")
    else:
        path.unlink()
        duckdb.connect(path).close()
    assert query(root, "select count(*) from runs", sync=damage != "text").rows == [(2,)]


def test_an_empty_store_has_an_empty_catalogue(tmp_path):
    (tmp_path / "runs").mkdir()
    assert query(tmp_path, "select count(*) from runs").rows == [(0,)]
    assert query(tmp_path, FIGURE_A).rows == []


def test_a_run_without_rows_is_listed(root):
    mock_run(root, 0.3, 0, steps=-1, n=4, k=2, end=None)
    found = query(root, "select steps, final_loss, n_train from runs where learning_rate = 0.3").rows
    assert found == [(None, None, 0)]


def test_while_another_process_writes_the_previous_version_is_used(root, caplog):
    sync(root)
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)
    with Directory(root).lease(catalog.LOCK, b"somebody"), caplog.at_level(logging.WARNING):
        assert query(root, "select count(*) from runs").rows == [(2,)]
    assert "is being written by another process: using the previous version" in caplog.text
    assert query(root, "select count(*) from runs").rows == [(3,)]


def test_without_a_previous_version_it_waits(root):
    lease = Directory(root).lease(catalog.LOCK, b"somebody")
    threading.Timer(0.3, lease.release).start()
    assert query(root, "select count(*) from runs").rows == [(2,)]


def test_a_kill_while_writing_leaves_the_previous_version(root, monkeypatch):
    path = sync(root)
    before = path.read_bytes()
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)

    def killed(connection, name, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "insert", killed)
    with pytest.raises(KeyboardInterrupt):
        sync(root)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert not (root / catalog.COPY).exists()
    path.unlink()
    (root / catalog.COPY).write_text("what a SIGKILL leaves")
    assert query(root, "select count(*) from runs").rows == [(3,)]
    assert not (root / catalog.COPY).exists()


def test_a_reader_keeps_what_it_opened(root):
    path = sync(root)
    with duckdb.connect(path, read_only=True) as reader:
        mock_run(root, 0.3, 0, steps=2, n=4, k=2)
        # Another process would publish meanwhile; in this one DuckDB shares the open file between connections.
        shutil.copyfile(path, root / "next")
        (root / "next").replace(path)
        assert reader.execute("select count(*) from runs").fetchall() == [(2,)]


def test_a_result_that_is_replaced_meanwhile_is_read_next_time(root, monkeypatch):
    results.analyze(root)
    run = list_runs(root)[0]
    gone = {"alignment": root / "gone.zarr.zip", "phases": results.files(root)[run.run_id]["phases"]}
    assert catalog._rows(run, gone).keys() == {"runs", "snapshots", "train", "phases", "phase_changes"}


def test_a_store_that_cannot_be_written(root, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Directory, "lease", refuse)
    with pytest.raises(InputError, match="cannot be written: Permission denied; choose a store that you may write"):
        sync(root)


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """A function that makes a folder one that may not be written, for whoever asks, and a cache of its own."""
    closed: list[str] = []
    access = os.access
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) not in closed and access(path, mode))
    return lambda folder: closed.append(os.fspath(folder))


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_copy_of_a_store_is_as_fresh_as_the_store_and_needs_no_writing(root, tmp_path, read_only, monkeypatch):
    results.analyze(root)
    sync(root)
    copied = shutil.copytree(root, tmp_path / "copy")
    read_only(copied)
    before = tree(copied)
    monkeypatch.setattr(catalog, "_update", None)
    assert sync(copied) == copied / catalog.NAME
    assert query(copied, FIGURE_A).rows == query(root, FIGURE_A).rows
    assert tree(copied) == before
    assert not (tmp_path / "cache").exists()


def test_a_store_that_may_not_be_written_has_its_catalogue_in_the_cache(root, tmp_path, read_only, caplog):
    read_only(root)
    before = tree(root)
    assert query(root, "select count(*) from runs", sync=False).rows == [(2,)]
    (folder,) = (tmp_path / "cache" / "ntk-eos").iterdir()
    assert caplog.messages == [f"{root} cannot be written: its catalogue is kept in {folder}"]
    write_claims(root, [CLAIM])
    assert query(root, "select claim from claims").rows == [("it_rises",)]
    copy_table(root, "runs", tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text().count("\n") == 3
    assert len(caplog.messages) == 1
    assert tree(root) == before
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)  # by its owner
    assert query(root, "select count(*) from runs").rows == [(3,)]


def test_verdicts_on_a_store_that_may_not_be_written_are_not_kept_and_that_is_said(root, read_only, caplog):
    sync(root)
    read_only(root)
    write_claims(root, [CLAIM])
    assert caplog.messages == [f"{root} cannot be written: the verdicts are not kept in its catalogue"]
    assert query(root, "select * from claims").rows == []


def test_a_damaged_record_is_named(root):
    record = run_path(root, "lr-0.1_seed-0") / "zarr.json"
    data = record.read_bytes().replace(b"mock", b"rock", 1)
    record.unlink()
    record.write_bytes(data)
    with pytest.raises(DamagedStore, match=str(record)):
        sync(root)


def test_a_folder_that_is_no_run_is_named(root):
    (root / "runs" / "notes.zarr").mkdir()
    with pytest.raises(MissingError, match=r"notes.zarr is not a run: it has no zarr.json"):
        sync(root)


def test_a_run_in_a_folder_of_another_name_is_refused(root):
    run_path(root, "lr-0.1_seed-0").rename(run_path(root, "copy"))
    with pytest.raises(InputError, match=r"copy.zarr holds the run lr-0.1_seed-0: give its folder that name again"):
        sync(root)


def test_runs_may_record_different_variables(root, monkeypatch):
    train = {name: variable for name, variable in schema.TRAIN.items() if name != "accuracy"}
    monkeypatch.setitem(schema.GROUPS, "train", train)
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)
    monkeypatch.undo()
    found = query(
        root,
        "select learning_rate, count(accuracy), count(*) from train join runs using (run_id) group by 1 order by 1",
    )
    assert found.rows == [(0.1, 5, 5), (0.2, 5, 5), (0.3, 0, 3)]


def test_a_root_that_is_not_a_store(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        query(tmp_path / "nowhere", "select 1")
    with pytest.raises(InputError, match="is not a store"):
        sync(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_query_of_results_says_what_was_not_analysed(root, caplog):
    with caplog.at_level(logging.WARNING):
        query(root, "select * from runs")
        assert caplog.text == ""
        query(root, "select * from ALIGNMENT")
    assert f"2 run(s) are not analysed as they stand now: `ntk-eos analyze {root}`" in caplog.text
    caplog.clear()
    results.analyze(root)
    query(root, FIGURE_A)
    assert caplog.text == ""


# --- queries ----------------------------------------------------------------------------------------------------------


def test_a_query_gives_columns_types_and_rows(root):
    table = query(root, "select run_id, seed, learning_rate, null as nothing from runs order by 1 limit 1")
    assert table.columns == ["run_id", "seed", "learning_rate", "nothing"]
    assert table.types[:3] == ["VARCHAR", "BIGINT", "DOUBLE"]
    assert table.rows == [("lr-0.1_seed-0", 0, 0.1, None)]


@pytest.mark.parametrize(
    "sql", ["describe runs", "from runs", "explain select 1", "pivot runs on status using count(*)"]
)
def test_other_ways_to_read(analysed, sql):
    assert query(analysed, sql).rows


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selec 1", 'Parser Error: syntax error at or near "selec"$'),
        ("select foo from runs", 'Binder Error: Referenced column "foo" not found in FROM clause!; Candidate'),
        ("select * from run", "Table with name run does not exist! Tables are runs, snapshots, train, alignment,"),
        ("", "must be one statement, got 0"),
        ("select 1; select 2", "must be one statement, got 2"),
        ("insert into runs select * from runs", "INSERT is refused, the catalogue is read-only"),
        ("delete from runs returning *", "DELETE is refused"),
        ("update runs set seed = 1", "UPDATE is refused"),
        ("drop table runs", "DROP is refused"),
        ("create temp table x as select 1", "CREATE is refused"),
        ("copy runs to '{out}'", "COPY is refused"),
        ("attach '{out}'", "ATTACH is refused"),
        ("set memory_limit = '90GB'", "SET is refused"),
        ("pragma memory_limit = '90GB'", "SET is refused"),
        ("load httpfs", "LOAD is refused"),
        ("explain analyze insert into runs select * from runs", "read-only"),
        ("select * from read_csv('/etc/passwd')", "file system operations are disabled"),
        ("select * from '/etc/passwd'", "does not exist"),
        ("select * from 'https://example.org/x.csv'", "file system operations are disabled"),
        ("select * from glob('*')", "file system operations are disabled"),
        ("select * from frame", "Table with name frame does not exist"),
    ],
)
def test_a_refused_query_is_one_line(analysed, tmp_path, sql, message):
    before = (analysed / catalog.NAME).read_bytes()
    with pytest.raises(InputError, match=rf"sql: .*{message}") as error:
        query(analysed, sql.replace("{out}", str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    assert (analysed / catalog.NAME).read_bytes() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sql", ["set threads = 1", "create table x as select 1", "copy runs to 'x.csv'"])
def test_the_connection_of_a_query_refuses_by_itself(analysed, sql):
    """What the words of a statement do not give away, DuckDB stops."""
    with (
        catalog._open(analysed / catalog.NAME) as connection,
        pytest.raises(duckdb.Error, match=r"locked|read-only|disabled"),
    ):
        connection.execute(sql)


def test_an_endless_query_is_stopped(analysed, monkeypatch):
    monkeypatch.setattr(catalog, "QUERY_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"sql: stopped after 0.2 s; ask for less at a time"):
        query(analysed, "select sum(a.range * b.range) from range(1000000) a, range(1000000) b")


def test_too_many_rows_are_refused(analysed, monkeypatch):
    monkeypatch.setattr(catalog, "QUERY_ROWS", 10)
    assert len(query(analysed, "select * from range(10)").rows) == 10
    with pytest.raises(InputError, match="sql: more than 10 rows; add a limit"):
        query(analysed, "select * from range(1000000000000)")


@pytest.mark.parametrize(
    "names",
    [["a", "b"], ["a", "a", "a"], ["a", "a", "a_1"], ["a_1", "a", "a"], ["a", "A"], ["a", "a_1", "a", "b", "b"]],
    ids=" ".join,
)
def test_columns_are_called_as_in_duckdbs_data_frames(analysed, names):
    sql = "select " + ", ".join(f"{i} as {name}" for i, name in enumerate(names))
    columns = query(analysed, sql).columns
    assert columns == list(duckdb.sql(sql).df().columns)
    assert len(set(columns)) == len(names)


def test_joined_runs_keep_both_names(analysed):
    table = query(analysed, "select r.run_id, a.run_id from runs r join alignment a using (run_id) limit 1")
    assert table.columns == ["run_id", "run_id_1"]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select * from runs", False),
        ("select * from claims", False),
        ("select learning_rate from train join snapshots using (run_id)", False),
        *((f"select * from {table}", True) for table in ("alignment", "phases", "phase_changes", "measures")),
        ('SELECT * FROM runs JOIN "Alignment" USING (run_id)', True),
    ],
)
def test_only_some_tables_need_results(sql, expected):
    assert catalog.derived(sql) is expected


def test_a_query_can_take_the_catalogue_as_it_is(root):
    sync(root)
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)
    assert query(root, "select count(*) from runs", sync=False).rows == [(2,)]


# --- claims and copies ------------------------------------------------------------------------------------------------


def test_claims_are_kept_until_a_run_changes(root):
    other = {**CLAIM, "claim": "it_falls", "verdict": "failed", "changes": "2026: looser, it's 'fine'"}
    write_claims(root, [CLAIM, other])  # builds the catalogue
    table = query(root, "select * from claims order by claim desc")
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows] == [CLAIM, other]
    write_claims(root, [CLAIM])
    sync(root)
    assert query(root, "select claim from claims").rows == [("it_rises",)]
    assert query(root, "select count(*) from runs").rows == [(2,)]
    mock_run(root, 0.3, 0, steps=2, n=4, k=2)
    assert query(root, "select claim from claims").rows == []


def test_no_claims_are_an_empty_table(root):
    write_claims(root, [])
    assert query(root, "select * from claims").rows == []


@pytest.mark.parametrize("table", TABLES)
def test_a_table_can_be_copied(analysed, tmp_path, table):
    expected = query(analysed, f"select * from {table}")
    copy_table(analysed, table, tmp_path / f".{table}.parquet.tmp")
    with duckdb.connect() as connection:
        relation = connection.read_parquet(str(tmp_path / f".{table}.parquet.tmp"))
        assert relation.columns == expected.columns
        assert sorted(relation.fetchall(), key=repr) == sorted(expected.rows, key=repr)
    copy_table(analysed, table, tmp_path / f"{table}.csv")
    with open(tmp_path / f"{table}.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == expected.columns
    assert len(rows) == len(expected.rows)


def test_a_copy_builds_the_catalogue_if_there_is_none(root, tmp_path):
    copy_table(root, "runs", tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text().count("\n") == 3


def test_a_table_that_is_not_one(root, tmp_path):
    with pytest.raises(MissingError, match="table 'ntk' is not one of runs, snapshots"):
        copy_table(root, "ntk", tmp_path / "x.csv")
