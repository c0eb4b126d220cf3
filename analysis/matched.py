"""Runs compared at matched loss: from each run the first recorded row at or below a level.

Runs with different learning rates stand at different places of the same path at equal steps; equal loss takes that
out. Nothing is interpolated: the row is one that was recorded, and its own loss and step stand beside it.
"""

import math
from numbers import Real

import numpy as np
import xarray as xr

from analysis.rows import one_row_per_run, require, runs_of
from pipeline.errors import InputError


def at_loss(ds: xr.Dataset, level: float) -> xr.Dataset:
    """One row per run: the first one, in order of step, with loss <= level.

    Which rows these are depends on the losses, so `loss` is read at once if it is not in memory (8 bytes per row; a
    sweep has it there, except in the group `train`). All other variables stay as lazy as they were; a measure of the
    matched rows, `alignment(at_loss(ds, level))`, works on these rows alone.

    Args:
        ds: a sweep (rows along `snapshot`) or one run (rows along `step`).
        level: loss to reach, positive.

    Returns:
        The dataset along `run`, in the order of the runs in `ds`, with the other axes, `step`, `loss` and `status` as
        coordinates along `run`, beside `reached`. A run that never gets there has `reached` False, step -1 and NaN as
        loss and in every variable, which makes integer variables floating point. A run without any row in `ds` is
        not listed.

    Raises:
        InputError: if the level is not a positive finite number, or there are no rows, steps or losses.
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not (math.isfinite(level) and level > 0):
        raise InputError(f"level = {level!r}: must be a positive finite loss, for example 0.01")
    require(ds, "at_loss", "loss")
    runs = runs_of(ds)
    below = np.asarray(ds["loss"]) <= float(level)
    reached = np.array([below[rows].any() for rows in runs.rows], dtype=bool)
    first = [rows[below[rows].argmax()] for rows in runs.rows]  # an unreached run's first row, blanked below

    matched = one_row_per_run(ds, runs, first)
    met = xr.DataArray(
        reached,
        dims="run",
        attrs={
            "long_name": "reached the loss level",
            "units": "1",
            "description": f"Whether the run has a recorded row with loss <= {float(level)!r}.",
        },
    )
    blanked = {name: array.where(met) for name, array in matched.data_vars.items() if "run" in array.dims}
    step = matched["step"].where(met, -1)
    return matched.assign(blanked).assign_coords(reached=met, step=step, loss=matched["loss"].where(met))
