"""Runs of a second, for tests of what trains many of them."""

from collections.abc import Iterable
from typing import Any

from pipeline.config import Compute, Digits, Mlp, Record, RunConfig, Stop


def runs(steps: int = 10, rates: Iterable[float] = (0.1, 0.2, 0.3), **changes: Any) -> list[RunConfig]:
    """One run per learning rate, with other values where they are given."""
    values = {
        "data": Digits(n=20),
        "model": Mlp(width=4, depth=1),
        "stop": Stop(steps=steps),
        "record": Record(eigenpairs=2, spectra={"every": 5}, snapshots={"log": 1}),
        "compute": Compute(commit_seconds=0.1),
    }
    return [RunConfig(**(values | {"learning_rate": rate} | changes)) for rate in rates]
