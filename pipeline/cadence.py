"""Cadence: the steps at which a group of the store gets a row.

Loss levels, the first and the last step are recorded in every group whatever its cadence, so that runs can be
compared at matched loss; a cadence names the steps beside those.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError


@dataclass(frozen=True)
class Cadence:
    """Every `every` steps, or `log` points per factor of ten, or both.

    The log-spaced steps are round(10^(i / log)) for i = 0, 1, 2, ...: they do not depend on where a run stops, so
    a run that is continued later keeps the grid it started with.

    Args:
        every: record steps 0, m, 2m, ...
        log: record this many steps per decade, beside step 0.

    Raises:
        InputError: if a number is not positive.
    """

    every: int | None = None
    log: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "log"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"cadence {name} = {value}: must be a whole number of at least 1")

    def due(self, step: int) -> bool:
        """Whether `step` is one of the cadence's steps."""
        if step == 0:
            return True
        if self.every is not None and step % self.every == 0:
            return True
        if self.log is None:
            return False
        nearest = round(self.log * np.log10(step))
        return any(round(10 ** (i / self.log)) == step for i in (nearest - 1, nearest, nearest + 1))

    def steps(self, last: int) -> np.ndarray:
        """All steps of the cadence from 0 to `last`, ascending, each once."""
        found = {0}
        if self.every is not None:
            found.update(range(0, last + 1, self.every))
        if self.log is not None:
            points = int(np.ceil(self.log * np.log10(max(last, 1)))) + 1
            found.update(step for i in range(points + 1) if (step := round(10 ** (i / self.log))) <= last)
        return np.array(sorted(found), dtype=np.int64)

    def count(self, last: int) -> int:
        """Number of `steps(last)`, without listing the regular ones, of which there may be a billion."""
        sparse = Cadence(log=self.log).steps(last)
        if self.every is None:
            return len(sparse)
        return last // self.every + 1 + int(np.count_nonzero(sparse % self.every))


def row_capacity(cadences: Mapping[str, Cadence], levels: int, steps: int) -> dict[str, int]:
    """The most rows that each growing group of a run can get.

    Args:
        cadences: of `scalars`, `snapshots` and `spectra`, as far as they are recorded.
        levels: number of loss levels, each of which may add a row; the last step may add another.
        steps: updates planned; `train` gets a row at each step from 0 on.
    """
    every_step = steps + 1
    rows = {group: min(cadence.count(steps) + levels + 1, every_step) for group, cadence in cadences.items()}
    return rows | {"train": every_step}
