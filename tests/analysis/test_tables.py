"""The registry of the catalogue's tables, the page that lists them, and the table of runs."""

import json
import re
from datetime import datetime
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from mock_store import mock_run, mock_store

from analysis import tables
from analysis.tables import TABLES
from pipeline.store import read_run

PAGE = Path(__file__).parents[2] / "docs" / "catalogue.md"


def test_the_page_lists_the_tables_as_they_are():
    _, marker, listed = PAGE.read_text().partition("<!-- tables -->\n\n")
    assert marker
    assert listed.strip() == tables.reference().strip(), "run `python -m analysis.tables` and paste it below the marker"


def test_the_page_shows_queries_that_work(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=1, n=4, k=1)
    (examples,) = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with duckdb.connect() as connection:
        for name in TABLES:
            tables.create_table(connection, name)
        queries = [query for query in examples.split(";") if query.strip()]
        assert len(queries) == 6
        for query in queries:
            assert connection.execute(query).fetchall() == []


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_described(name):
    layout = TABLES[name]
    assert layout.description.endswith(".")
    assert len({column.name for column in layout.columns}) == len(layout.columns)
    for column in layout.columns:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", column.name)
        assert column.description.endswith("."), column.name
        assert column.type in {"VARCHAR", "JSON", *tables.DTYPES}
        if column.type == "DOUBLE":
            assert column.unit, column.name


def test_facts_of_a_run_and_of_a_step_are_told_apart():
    """A join of `alignment` and `runs` by run_id needs no prefixes."""
    columns = {name: {column.name for column in layout.columns} for name, layout in TABLES.items()}
    for name in ("snapshots", "train", "alignment", "phases", "phase_changes", "measures"):
        assert columns[name] & columns["runs"] == {"run_id"}
    assert columns["phases"] & columns["alignment"] == {"run_id", "step"}


def test_a_table_is_created_with_its_comments():
    with duckdb.connect() as connection:
        tables.create_table(connection, "runs")
        found = connection.execute(
            "select column_name, data_type, comment from duckdb_columns() where not internal order by column_index"
        ).fetchall()
    for (name, kind, comment), column in zip(found, TABLES["runs"].columns, strict=True):
        assert (name, kind) == (column.name, column.type)
        assert comment == column.description + (f" [{column.unit}]" if column.unit else "")


def test_a_run_in_the_table(tmp_path):
    path = mock_run(tmp_path, 0.5, 3, steps=6, n=5, c=2, k=4, axes={"model.width": 6})
    run = read_run(path)
    (row,) = tables.run_table(tmp_path).to_dict("records")
    assert json.loads(row.pop("axes")) == {"learning_rate": 0.5, "seed": 3, "model.width": 6}
    assert json.loads(row.pop("config")) == run.attrs["identity"]
    assert row == {
        "run_id": "lr-0.5_seed-3_model.width-6", "path": "runs/lr-0.5_seed-3_model.width-6.zarr", "status": "complete",
        "stop_reason": "steps", "learning_rate": 0.5, "seed": 3, "study": "mock", "part": None, "size": None,
        "title": "A mock study",
        "family": "family-lr-0.5_seed-3_model.width-6", "process": "discrete", "dataset": "mock", "model": "mlp",
        "loss_function": "mse", "update_rule": "gd", "n": 5, "m": None, "c": 2, "p": 30, "k": 4, "steps": 6,
        "n_snapshots": 5,
        "n_spectra": 3, "n_scalars": 7, "n_hessian": 2,
        "n_train": 7, "final_loss": run.read("train/loss")[-1],
        "commits": 1, "head": run.head,
        "created_at": datetime(2026, 1, 2, 3, 4, 5), "git_commit": "0" * 40, "git_dirty": False,
        "device": "cpu", "threads": 1, "torch_version": "2.13.0", "host": "nowhere",
    }  # fmt: skip


def test_what_is_not_known_is_missing(tmp_path):
    """A run that somebody's own loop recorded may say little of itself."""
    path = mock_run(tmp_path, 0.5, 3, steps=-1, n=4, k=1, end=None, attrs={"provenance": {}, "created_at": None})
    run = read_run(path)
    for name in ("study", "axes", "learning_rate", "seed", "family", "title"):
        del run.attrs[name]
    run.attrs["identity"] = {"model": "my net"}
    row = tables.frame_of("runs", [tables.run_row(run)]).iloc[0]
    known = {name for name in row.index if not pd.isna(row[name])}
    expected = (
        "run_id path status axes model n c p k n_snapshots n_spectra n_scalars n_hessian n_train commits head config"
    )
    assert known == set(expected.split())
    assert row["model"] == "my net"
    assert row["status"] == "stale"


def test_learning_rate_and_seed_are_found_in_the_first_row(tmp_path):
    run = read_run(mock_run(tmp_path, 0.5, 3, steps=1, n=4, k=1))
    for name in ("axes", "learning_rate", "seed"):
        del run.attrs[name]
    assert tables.run_axes(run) == {"learning_rate": 0.5, "seed": 3}


def test_runs_are_chosen_in_their_order(tmp_path):
    mock_store(tmp_path, learning_rates=[0.1, 0.3, 0.2], seeds=[0], steps=1, n=4, k=1)
    runs = tables.list_runs(tmp_path)
    chosen = tables.select(runs[::-1], "learning_rate > 0.15")
    assert [run.run_id for run in chosen] == ["lr-0.3_seed-0", "lr-0.2_seed-0"]
