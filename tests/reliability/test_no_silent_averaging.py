"""A diverged run in a sweep changes no number of another run, says what it is, and enters no mean unseen."""

import shutil

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from mock_store import mock_store

import analysis
from analysis import catalog, results
from analysis.evolution import MEASURES
from analysis.plots import numbers
from pipeline.store import run_path

RATES, DIVERGED = (0.1, 0.3), (0.3, 1)
# Public functions that give values of every row, and the groups whose rows they take.
OF_ROWS = {"alignment": ("snapshots",), "phases": ("scalars",)} | {
    name: measure.groups or ("snapshots",) for name, measure in MEASURES.items()
}
# Those that give one value for many rows, tested below; and those that choose rows or are no functions of them.
SUMMARIES = {"phase_summary", "at_loss"}
OTHERS = {"computing", "gap_bound", "held_out", "join", "kernel", "layers", "open_run", "open_sweep"}
# Values that need the following row of the run, so that the last one has none; phases need one on each side.
NEED_THE_NEXT = {"kernel_velocity", "kernel_velocity_flow", "overlap_following"}
# Values that need class labels, which the targets here are not.
NEED_LABELS = {"test_error_rate", "regression_error_rate"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Runs of two learning rates and two seeds, one of them diverged."""
    root = tmp_path_factory.mktemp("sweep")
    options = {"n": 6, "c": 2, "k": 4, "steps": 20, "conjugate": True, "layers": True, "full": True, "test": 3}
    return mock_store(root, learning_rates=RATES, diverged=[DIVERGED], **options)


def rows_of(store, groups, where=None):
    """Rows of a sweep that all these groups have."""
    one, *others = (analysis.open_sweep(store, group, where).load() for group in groups)
    for other in others:
        one = analysis.join(one, other)
    return one


def test_every_public_function_is_here():
    assert OF_ROWS.keys() | SUMMARIES | OTHERS == set(analysis.__all__)


def as_dataset(found):
    return found if isinstance(found, xr.Dataset) else found.to_dataset(name="value")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "alignment" else pytest.mark.reliability) for name in OF_ROWS]
)
def test_a_diverged_run_changes_no_number_of_another_and_says_so(store, measured, name):
    measure = getattr(analysis, name)
    found = as_dataset(measure(rows_of(store, OF_ROWS[name]))).compute()
    whole = as_dataset(measure(rows_of(store, OF_ROWS[name], "status = 'complete'"))).compute()
    assert set(found.status.values) == {"complete", "diverged"}
    assert (found.run.values[found.status == "diverged"] == "lr-0.3_seed-1").all()
    kept = found.isel(snapshot=np.flatnonzero(found.status == "complete"))
    missing = 0
    for variable in found.data_vars:
        np.testing.assert_array_equal(kept[variable].values, whole[variable].values)
        gaps = found[variable].isnull() if found[variable].dtype.kind == "f" else xr.zeros_like(found[variable], bool)
        # Pairs of rows are NaN where the run has no such row, which the coordinate says.
        gaps = gaps & (found.other_step >= 0) if "other_step" in found[variable].coords else gaps
        rows = gaps.any([dim for dim in gaps.dims if dim != "snapshot"]).values
        if variable in NEED_THE_NEXT or name == "phases":
            rows &= ~ends(found, first=name == "phases")
        if variable not in NEED_LABELS:
            missing += int((rows & (found.status == "complete").values).sum())
        assert missing == 0, variable
    measured(
        "R14", f"{name} of a sweep with a diverged run", values=len(found.data_vars), rows=found.sizes["snapshot"],
        rows_diverged=int((found.status == "diverged").sum()), rows_changed=0, rows_missing_without_a_word=missing,
    )  # fmt: skip


def ends(found, first):
    """The last row of each run; with `first` also the first one."""
    runs = found.run.values
    last = np.append(runs[1:] != runs[:-1], True)
    return last | np.append(True, runs[1:] != runs[:-1]) if first else last


def test_a_summary_counts_its_rows_and_names_the_status(store, measured):
    ds = analysis.open_sweep(store, "scalars").load()
    summary, rows = analysis.phase_summary(ds), analysis.phases(ds)
    assert list(summary.status.values) == ["complete", "complete", "complete", "diverged"]
    for run in summary.run.values:
        counted = rows.isel(snapshot=np.flatnonzero(rows.run == run))
        edge = np.isin(counted.phase, [counted.phase.attrs["flag_meanings"].split().index(f"eos_{way}")
                                       for way in ("rising", "falling")])  # fmt: skip
        assert summary.n_valid.sel(run=run) == (edge & counted.kta_change.notnull().values).sum()
    matched = analysis.at_loss(analysis.open_sweep(store), 0.25)
    assert (matched.loss.isnull().values == ~matched.reached.values).all()
    assert "status" in matched.coords
    for name, values in matched.data_vars.items():
        if "run" in values.dims and values.dtype.kind == "f":
            blank = values.isnull().any([dim for dim in values.dims if dim != "run"]).values
            np.testing.assert_array_equal(blank, ~matched.reached.values, err_msg=str(name))
    measured("R14", "phase_summary and at_loss", runs=summary.sizes["run"], summaries_without_n_valid=0,
             runs_not_reached=int((~matched.reached).sum()))  # fmt: skip


@pytest.mark.reliability
def test_means_over_seeds_leave_a_diverged_run_out_and_say_of_how_many_they_are(store, tmp_path, measured):
    without = shutil.copytree(store, tmp_path / "without")
    shutil.rmtree(run_path(without, "lr-0.3_seed-1"))
    rows = 0
    for root in (store, without):
        results.analyze(root, ["alignment", "phases"])
        catalog.sync(root)
    for name in ("BY_STEP", "BY_LOSS", "CROSSINGS"):
        query = getattr(numbers, name)
        found, expected = numbers.frame(store, query), numbers.frame(without, query)
        pd.testing.assert_frame_equal(found, expected)
        rows += len(found)
        if name != "CROSSINGS":
            assert dict(found.groupby("learning_rate").seeds.max()) == {0.1: 2, 0.3: 1}
    measured("R14", "means over seeds in the figures", rows=rows, rows_changed_by_a_diverged_run=0)
