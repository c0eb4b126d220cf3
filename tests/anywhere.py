"""For tests that compute in several places: clusters, and every measure by name."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import dask
import numpy as np
import xarray as xr
from distributed import LocalCluster
from mock_store import mock_store

import analysis
from analysis import evolution

# The measures of `analysis.evolution`, and the others that are lazy until asked.
GROUPS = {name: measure.groups or ("snapshots",) for name, measure in evolution.MEASURES.items()}
GROUPS |= {"alignment": ("snapshots",), "phases": ("scalars",), "phase_summary": ("scalars",)}


@contextmanager
def lasting_cluster(losses: int) -> Iterator[LocalCluster]:
    """Two worker processes, which their nannies start again; a task may be lost with so many of them.

    A worker that wants the result of one that is gone waits for as long as it may take to connect: not half a minute.
    """
    options = {
        "distributed.scheduler.allowed-failures": losses,
        "distributed.comm.timeouts.connect": "5s",
        # A quarter of a minute after a loss a cluster of this kind gives the worker up if it is lost again just then.
        "distributed.deploy.lost-worker-timeout": "1h",
    }
    with (
        dask.config.set(options),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL + 1
        ) as cluster,
    ):
        yield cluster


def store_with_everything(root: Path) -> Path:
    """A store that has the variables of every measure, one run of it diverged."""
    return mock_store(
        root, learning_rates=(0.1, 1.2), seeds=(0,), diverged=[(1.2, 0)], steps=20, n=12, c=2, k=5,
        layers=True, full=True, test=6,
    )  # fmt: skip


def measure_of(name: str, root: Path) -> Callable[[], xr.Dataset]:
    """What computes a measure of all runs of a store."""

    def compute() -> xr.Dataset:
        opened = [analysis.open_sweep(root, group) for group in GROUPS[name]]
        found = getattr(analysis, name)(prepared(name, reduce(analysis.join, opened)))
        return (found.to_dataset(name=name) if isinstance(found, xr.DataArray) else found).compute()

    return compute


def prepared(name: str, ds: xr.Dataset) -> xr.Dataset:
    """Summaries are made of phases."""
    return analysis.phases(ds) if name == "phase_summary" else ds


def assert_same_bits(one: xr.Dataset, other: xr.Dataset) -> None:
    """Every value of every variable, with its NaN."""
    xr.testing.assert_identical(one, other)
    for name in one.data_vars:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name
