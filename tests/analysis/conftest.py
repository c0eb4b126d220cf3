"""Fixtures of the analysis tests: a mock sweep, and a scheduler that refuses to compute."""

import dask
import pytest
from mock_sweep import mock_sweep


@pytest.fixture
def sweep():
    """The group `snapshots` of a mock sweep, float32 kernels, Dask-backed."""
    return mock_sweep()


@pytest.fixture
def exact_sweep():
    """The same with float64 kernels and all eigenpairs, where identities hold to rounding."""
    return mock_sweep(n=6, k=6, dtype=float)


@pytest.fixture
def no_compute():
    """While this fixture is active every Dask compute raises: what passes under it is lazy."""

    def refuse(graph, keys, **options):
        raise AssertionError("something computed a lazy array")

    with dask.config.set(scheduler=refuse):
        yield
