"""The page of what was measured is the one that its figures make, and no promise is without one."""

import json
from pathlib import Path

import pytest
from promises import PROMISES, page

DOCS = Path(__file__).parents[2] / "docs"


def record(promise: str, **changes):
    return {
        "promise": promise, "case": "a case", "size": "", "figures": {"rows_lost": 0, "ratio": 0.12345}, "met": True,
        "why": "", "test": "tests/reliability/test_x.py::test_y", "failed": False, "seconds": 1.0, **changes,
    }  # fmt: skip


def document(**changes):
    machine = {"processor": "x86_64", "cores": 2, "python": "3.11", "torch": "2", "zarr": "3", "numpy": "2"}
    return {"machine": machine, "records": [record(name, **changes) for name in PROMISES]}


def test_the_page_tells_kept_missed_and_failed_apart():
    assert "| kept |" in page(document())
    assert "rows lost 0, ratio 0.123" in page(document())
    assert "| **missed**, see there |" in page(document(met=False, why="slow"))
    assert "**missed**: slow" in page(document(met=False, why="slow"))
    assert "| **failed** |" in page(document(failed=True))


def test_a_promise_without_a_figure_is_refused():
    lacking = document()
    del lacking["records"][3]
    with pytest.raises(ValueError, match=r"no figure for R4: run make reliability"):
        page(lacking)


def test_the_page_is_that_of_its_figures_and_every_test_is_there():
    kept = json.loads((DOCS / "reliability.json").read_text())
    assert (DOCS / "reliability.md").read_text() == page(kept)
    for one in kept["records"]:
        file, _, name = one["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (DOCS.parent / file).read_text(), one["test"]
