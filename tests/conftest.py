"""A fixture of several folders; and tests of promises say what they measured, shown at the end and kept on request."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from promises import PROMISES, figures_text
from study_files import MINIMAL

KEPT = "measured"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", metavar="FILE", help="keep what tests of promises measured in this file")


@pytest.fixture
def measured(request, record_property):
    """Says what a test of a promise measured; to be called after its asserts."""

    def say(promise: str, case: str, *, met: bool = True, why: str = "", **figures: Any) -> None:
        assert promise in PROMISES
        assert met or why, "say why the target is missed"
        size = request.node.callspec.id.split("-")[-1] if hasattr(request.node, "callspec") else ""
        record = {
            "promise": promise, "case": case, "size": size if size in ("short", "full", "soak") else "",
            "figures": figures, "met": met, "why": why, "test": request.node.nodeid,
        }  # fmt: skip
        json.dumps(record)
        record_property(KEPT, record)

    return say


@pytest.fixture
def study(tmp_path):
    """Writes a study file and loads it."""
    from pipeline.config import load_study

    def load(text: str | bytes = MINIMAL, *overrides: str) -> Any:
        path = tmp_path / "study.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_study(path, overrides)

    return load


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the figures of all tests, those of other processes too, and keep them."""
    stats = terminalreporter.stats
    reports = [report for outcome in ("passed", "failed") for report in stats.get(outcome, ()) if report.when == "call"]
    records = [
        {**record, "failed": report.failed, "seconds": round(report.duration, 1)}
        for report in reports
        for name, record in report.user_properties
        if name == KEPT
    ]
    if records:
        terminalreporter.section("promises: what was measured")
    for record in sorted(records, key=lambda record: (int(record["promise"][1:]), record["case"])):
        verdict = " FAILED" if record["failed"] else "" if record["met"] else f" (missed: {record['why']})"
        terminalreporter.write_line(f"{record['promise']} {record['case']}: {figures_text(record['figures'])}{verdict}")
    if file := config.getoption("measured"):
        keep(Path(file), records, {report.nodeid for report in reports if report.failed})


def keep(file: Path, records: list[dict[str, Any]], failed: set[str]) -> None:
    """Replace what the same tests measured before; a test that failed leaves its last figures, marked so."""
    before = json.loads(file.read_text())["records"] if file.exists() else []
    tests = {record["test"] for record in records}
    rest = [{**one, "failed": one["failed"] or one["test"] in failed} for one in before if one["test"] not in tests]
    document = {
        "machine": {
            "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "zarr", "numpy")},
        },
        "records": sorted([*rest, *records], key=lambda one: (int(one["promise"][1:]), one["test"], one["case"])),
    }  # fmt: skip
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
