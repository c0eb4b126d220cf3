"""SQL from strangers, and names from strangers: nothing is written, no file is read, and a name is never SQL."""

import pytest
from mock_store import mock_run
from study_files import assert_one_plain_line

from analysis import catalog, results
from analysis.catalog import query, sync
from analysis.tables import TABLES
from pipeline.errors import InputError
from pipeline.store import list_runs

WRITES = [
    "insert into runs select * from runs",
    "delete from runs returning *",
    "update runs set seed = 1",
    "drop table runs",
    "truncate runs",
    "alter table runs add column x int",
    "create table x as select 1",
    "create temp table x as select 1",
    "create view x as select 1",
    "create macro f(x) as x",
    "explain analyze insert into runs select * from runs",
    "with x as (select 1) delete from runs",
    "vacuum",
    "begin",
    "select 1; drop table runs",
    "prepare x as delete from runs",
]
FILES = [
    "copy runs to '{out}'",
    "copy (select 1) to '{out}'",
    "copy runs from '{file}'",
    "export database '{out}'",
    "import database '{file}'",
    "attach '{out}'",
    "attach '{file}'",
    "select * from '{file}'",
    "select * from glob('*')",
    "select * from read_csv('{file}')",
    "select * from read_text('{file}')",
    "select * from read_blob('{file}')",
    "select * from read_json('{file}')",
    "select * from read_parquet('{file}')",
    "from sniff_csv('{file}')",
    "select * from 'https://example.org/x.csv'",
    "install httpfs",
    "load httpfs",
]
SETTINGS = [
    "set enable_external_access = true",
    "set lock_configuration = false",
    "set allow_unsigned_extensions = true",
    "set memory_limit = '90GB'",
    "pragma memory_limit = '90GB'",
    "set temp_directory = '{out}'",
    "reset memory_limit",
    "use memory",
]
LABELS = [
    "x'); drop table runs; --",
    "x\"; attach 'y' as \"z",
    "{out}",
    "$1",
    "?",
    "%s",
    "a'||(select 1)||'b",
    "'; select 1",
    "null",
    "read_csv('x.csv')",
    "\u202eevil",
]


@pytest.fixture
def root(tmp_path):
    """A store of one run, with a catalogue."""
    mock_run(tmp_path / "store", 0.1, 0, steps=4, n=4, k=2)
    sync(tmp_path / "store")
    return tmp_path / "store"


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_statement_writes_or_reads_a_file(root, tmp_path, measured, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    before, statements = everything(tmp_path), WRITES + FILES + SETTINGS
    for statement in statements:
        sql = statement.replace("{out}", str(tmp_path / "out")).replace("{file}", str(tmp_path / "secret.csv"))
        with pytest.raises(InputError, match=r"^sql: ") as error:
            query(root, sql)
        assert_one_plain_line(str(error.value))
        assert everything(tmp_path) == before, statement
    assert query(root, "select count(*) from runs").rows == [(1,)]
    measured("R17", "statements that write, reach files or networks, or change what is allowed",
             statements=len(statements), refused=len(statements), writes=0, files_reached=0)  # fmt: skip


def test_names_are_values_and_never_sql(root, tmp_path, measured):
    named = []
    for number, label in enumerate(LABELS):
        attrs = {"title": label, "study": label, "part": label, "family": label}
        axes = {"model.name": label.encode("ascii", "ignore").decode()}
        path = mock_run(root, number + 1.0, 0, steps=2, n=4, k=2, attrs=attrs, axes=axes)
        named.append((path.stem, label, label, label, label, axes["model.name"]))
    results.analyze(root, ["alignment"])
    columns = "run_id, title, study, part, family, axes->>'$.\"model.name\"'"
    assert query(root, f"select {columns} from runs where learning_rate >= 1 order by learning_rate").rows == named
    ids = {run.run_id for run in list_runs(root)}
    assert {row[0] for row in query(root, "select run_id from alignment").rows} == ids
    for table in TABLES:
        catalog.copy_table(root, table, tmp_path / f"{table}.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"store", *(f"{table}.csv" for table in TABLES)}
    measured("R17", "names of runs, studies and axes that look like SQL", names=6 * len(LABELS), taken_as_sql=0)
