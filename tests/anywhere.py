"""For tests that compute in several places: clusters, and every measure by name."""

import itertools
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path

import dask
import numpy as np
import psutil
import xarray as xr
from distributed import LocalCluster
from mock_store import mock_store

import analysis
from analysis import evolution

# The measures of `analysis.evolution`, and the others that are lazy until asked.
GROUPS = {name: measure.groups or ("snapshots",) for name, measure in evolution.MEASURES.items()}
GROUPS |= {"alignment": ("snapshots",), "phases": ("scalars",), "phase_summary": ("scalars",)}


class Workers:
    """Two `dask worker` processes of a scheduler; in the place of one that is killed another is started.

    Not those of `LocalCluster`: the nannies that start them again give up when a start takes long on a busy machine.
    """

    def __init__(self, cluster: LocalCluster, dice: random.Random) -> None:
        self.cluster, self._dice, self._numbers = cluster, dice, itertools.count()
        self._processes = dict(self._started() for _ in range(2))

    def _started(self) -> tuple[str, psutil.Popen]:
        name, address = f"worker-{next(self._numbers)}", self.cluster.scheduler_address
        options = ["--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, *options]
        return name, psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def are_there(self) -> bool:
        """Whether the scheduler knows both."""
        return {str(one.name) for one in list(self.cluster.scheduler.workers.values())} >= set(self._processes)

    def kill(self, *, machine: bool = False) -> None:
        """SIGKILL of one, at random; of a machine: of what it has started too."""
        name = self._dice.choice(list(self._processes))
        process = self._processes.pop(name)
        for one in [process, *(process.children(recursive=True) if machine else [])]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        self._processes |= [self._started()]

    def end(self) -> None:
        """Stop both."""
        for process in self._processes.values():
            process.kill()
            process.wait()


@contextmanager
def lasting_cluster(losses: int, seed: int) -> Iterator[Workers]:
    """Two workers that can be killed; a task may be lost with so many of them.

    A worker that wants the result of one that is gone waits for as long as it may take to connect: not half a minute.
    """
    options = {"distributed.scheduler.allowed-failures": losses, "distributed.comm.timeouts.connect": "5s"}
    with (
        dask.config.set(options),
        LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=logging.CRITICAL + 1) as cluster,
    ):
        workers = Workers(cluster, random.Random(seed))
        try:
            yield workers
        finally:
            workers.end()


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
