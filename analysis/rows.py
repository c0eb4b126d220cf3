"""Rows of a dataset: the dimension they lie on, the run that each belongs to, and the variables that a measure needs.

A sweep has its rows along `snapshot`, each with the name of its run in the coordinate `run`. A group of one run that
plain xarray opened has them along `step` and names no run. Measures that look at a run as a whole take both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.schema import GROUPS, HELD_OUT, PROBE, ROW, TEST_PROBE, variables_of

ROW_DIMS = ("snapshot", "step")


@dataclass(frozen=True)
class Runs:
    """Which rows of a dataset belong to which run.

    Attributes:
        dim: dimension of the rows.
        names: runs in the order in which they first appear.
        rows: for each run the positions of its rows, in order of step.
        step: step of every row of the dataset, shape (s,).
    """

    dim: str
    names: list[str]
    rows: list[NDArray[np.intp]]
    step: NDArray[np.int64]

    def followers(self) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Position of the row that follows each row in its run, and whether there is one; else the row itself."""
        following = np.arange(len(self.step))
        for rows in self.rows:
            following[rows[:-1]] = rows[1:]
        return following, following != np.arange(len(self.step))

    def ends(self, which: Literal[0, -1]) -> NDArray[np.intp]:
        """Position of the first (0) or the last (-1) row of each row's run."""
        found = np.empty(len(self.step), dtype=np.intp)
        for rows in self.rows:
            found[rows] = rows[which]
        return found


def runs_of(ds: xr.Dataset) -> Runs:
    """Group the rows of a sweep, or of one run, by run.

    Args:
        ds: rows along `snapshot` or `step`, with the coordinate `run` where there are rows of several runs.

    Raises:
        InputError: if there are no rows, or a run has two of the same step.
    """
    dim = next((name for name in ROW_DIMS if name in ds.dims), None)
    if dim is None:
        raise InputError(
            f"this dataset has its values along {', '.join(map(str, ds.dims)) or 'no dimension'}: rows must lie along "
            "`snapshot` or `step`, as analysis.open_sweep and analysis.open_run return them"
        )
    require(ds, "grouping rows by run", "step")
    step = np.asarray(ds["step"])
    if not len(step):
        raise InputError(f"this dataset has no rows along `{dim}`: choose fewer conditions, or runs that have rows")
    labels = np.asarray(ds["run"]) if "run" in ds.coords else str(ds.attrs.get("run", "run"))
    codes, names = pd.factorize(np.broadcast_to(labels, step.shape))
    order = np.lexsort((step, codes))
    repeated = (np.diff(codes[order]) == 0) & (np.diff(step[order]) == 0)
    if repeated.any():
        first = order[repeated.argmax()]
        raise InputError(
            f"run {names[codes[first]]!r} has step {step[first]} twice, as when several runs are joined without their "
            "names: open them with analysis.open_sweep(root), which names the run of each row"
        )
    bounds = np.flatnonzero(np.diff(codes[order])) + 1
    return Runs(dim, [str(name) for name in names], np.split(order, bounds), step)


def one_row_per_run(ds: xr.Dataset, runs: Runs, positions: Sequence[int] | NDArray[np.intp]) -> xr.Dataset:
    """Take one row of each run: `snapshot` or `step` gives way to the dimension `run`, its index the runs' names.

    Args:
        ds: what `runs` was made of.
        runs: its rows by run.
        positions: the row to take of each run.
    """
    if isinstance(ds.indexes.get(runs.dim), pd.MultiIndex):
        ds = ds.reset_index(runs.dim)  # its levels become plain coordinates
    attrs = ds["run"].attrs if "run" in ds.coords else {"long_name": "run", "units": "1"}
    taken = ds.isel({runs.dim: np.asarray(positions, dtype=np.intp)})
    return taken.assign_coords(run=(runs.dim, runs.names, attrs)).swap_dims({runs.dim: "run"})


def taken(array: xr.DataArray, dim: str, positions: NDArray[np.intp]) -> xr.DataArray:
    """Values of other rows, such as the following ones, in the place of each row's own; its coordinates stay.

    A lazy array keeps its blocks, and a block for which one row stands is a view of that row: copies of the first
    kernel of a run, which Dask is free to make before anything needs them, would fill the memory.
    """
    if not isinstance(array.data, da.Array):
        return array.copy(data=array.variable.isel({dim: positions}).data)
    axis = array.get_axis_num(dim)
    parts = []
    for rows in np.split(positions, np.cumsum(array.data.chunks[axis])[:-1]):
        part = array.variable.isel({dim: rows[:1] if (rows == rows[0]).all() else rows}).data.rechunk({axis: -1})
        shape = (*array.shape[:axis], len(rows), *array.shape[axis + 1 :])
        parts.append(da.broadcast_to(part, shape, chunks=(*part.chunks[:axis], len(rows), *part.chunks[axis + 1 :])))
    return array.copy(data=da.concatenate(parts, axis))


def join(ds: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """The rows that two groups both have, with the variables of both; lazy.

        sharpness_gap(join(open_sweep(root, "hessian"), open_sweep(root, "scalars")))

    Args:
        ds: a group of a sweep or a run.
        other: another group of the same, opened in the same way.

    Returns:
        The rows of `ds` whose run and step `other` has too, in the order of `ds`; variables that both have are those
        of `ds`.

    Raises:
        InputError: if they share no row, or their rows lie along different dimensions.
    """
    runs, others = runs_of(ds), runs_of(other)
    if runs.dim != others.dim:
        raise InputError(
            f"rows of one group lie along `{runs.dim}`, of the other along `{others.dim}`: open both by "
            "analysis.open_sweep, or both by plain xarray"
        )
    place = {
        (name, step): row
        for name, rows in zip(others.names, others.rows, strict=True)
        for row, step in zip(rows, others.step[rows], strict=True)
    }
    pairs = sorted(
        (row, place[name, runs.step[row]])
        for name, rows in zip(runs.names, runs.rows, strict=True)
        for row in rows
        if (name, runs.step[row]) in place
    )
    if not pairs:
        raise InputError("the two groups share no row of the same run and step: record both at a common cadence")
    here, there = (np.array(positions, dtype=np.intp) for positions in zip(*pairs, strict=True))
    new = [name for name in other.data_vars if name not in ds.variables]
    found = {name: other[name].variable.isel({runs.dim: there}) for name in new if runs.dim in other[name].dims}
    return ds.isel({runs.dim: here}).assign(found)


def require(ds: xr.Dataset, measure: str, *names: str) -> None:
    """Check that a dataset has what a measure needs.

    Args:
        ds: the measure's input.
        measure: its name, for the message.
        names: variables or coordinates of the schema.

    Raises:
        InputError: naming the variable, the groups of the store that hold it and how to open them.
    """
    for name in names:
        if name in ds.variables:
            continue
        has = f"{measure} needs `{name}`; this dataset has {', '.join(map(str, ds.data_vars)) or 'no variables'}."
        groups = [group for group in GROUPS if variables_of(group, [name])]
        if name in PROBE:
            hint = f"It lies in the group probe; analysis.open_sweep and open_run add it, or ds.assign({name}=...)"
        elif name in HELD_OUT or name in TEST_PROBE:
            hint = "A run has it, in the group snapshots, where its study holds out m examples: record.test = m"
        elif name in ROW:
            hint = "It is a coordinate of every row that analysis.open_sweep and open_run return"
        else:
            hint = f"Open a group that has it: analysis.open_sweep(root, group=...) with {' or '.join(groups)}"
        raise InputError(f"{has} {hint}")


def described(array: xr.DataArray, long_name: str, description: str, units: str = "1") -> xr.DataArray:
    """The array with its label, its defining equation and its unit in place of the attributes of its inputs."""
    array = array.copy(deep=False)
    array.attrs = {"long_name": long_name, "units": units, "description": description}
    return array
