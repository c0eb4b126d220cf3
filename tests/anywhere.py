"""Every measure, by name: what it is of a store, lazily, for tests that compute it in several places."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import xarray as xr
from mock_store import mock_store

import analysis
from analysis import evolution

# The measures of `analysis.evolution`, and the others that are lazy until asked.
GROUPS = {name: measure.groups or ("snapshots",) for name, measure in evolution.MEASURES.items()}
GROUPS |= {"alignment": ("snapshots",), "phases": ("scalars",), "phase_summary": ("scalars",)}


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
