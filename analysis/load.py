"""Committed rows of runs as lazy datasets.

A sweep has its rows along `snapshot`: the runs one after the other, each in order of step, under a MultiIndex of the
grid's axes and `step`. Nothing is padded, so runs of different length cost what they hold.

Chunks are read by `Run.read` instead of zarr-python: it opens a sweep five times faster, reads it no slower, names
the file whose bytes are damaged, and refuses a missing chunk where zarr would silently give NaN.
"""

import copy
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray

from analysis.tables import at, run_axes, run_sizes, select
from pipeline import schema
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.store import Run, list_runs, read_run

log = logging.getLogger(__name__)

# One task reads several rows: enough that a graph stays small, little enough that a few blocks fit in memory.
BLOCK_BYTES = 16 * 2**20

# Runs of one dataset may be of several models: what has these dimensions is left out where they differ.
OF_A_MODEL = {"parameter_index", "layer"}

RUN = {"units": "1", "long_name": "run", "description": "Name of the run."}
STATUS = {
    "units": "1", "long_name": "status",
    "description": "complete, diverged, running, interrupted, failed, or stale: unfinished, and nobody writes it.",
}  # fmt: skip


def open_run(path: str | os.PathLike[str], group: str = "snapshots") -> xr.Dataset:
    """One run, in the shape of a sweep.

    Args:
        path: folder of the run, `<root>/runs/<run_id>.zarr`.
        group: snapshots, spectra, scalars, train or hessian.

    Returns:
        As `open_sweep`.

    Raises:
        MissingError: if there is no such run, or it has no committed row in `group`.
        InputError: if there is no such group.
    """
    return open_runs([read_run(path)], group)


def open_sweep(
    root: str | os.PathLike[str], group: str = "snapshots", where: str | None = None, *, skip_damaged: bool = False
) -> xr.Dataset:
    """The runs of a store as one lazy dataset.

    Args:
        root: folder of the store.
        group: snapshots, spectra, scalars, train or hessian.
        where: SQL condition on the columns of the catalogue's table `runs`, such as "learning_rate > 0.1 and status =
            'complete'"; all runs by default.
        skip_damaged: leave out the rows whose values on disk are not what was committed, and name them in the log;
            by default reading one is an error. Takes a look at all values.

    Returns:
        Rows along `snapshot`, a MultiIndex of the grid's axes and `step`; the variables of the group and
        `target` (snapshot, sample, output), lazy, beside what was recorded on held-out examples also `test_target`
        (snapshot, test_sample, output); `run`, `status` and `loss` of each row as coordinates in memory
        (`loss` is data in the group train). `parameter` and `ntk_layer` are left out where the models differ.

    Raises:
        MissingError: if no run is left, or none has a committed row in `group`.
        InputError: for an unknown group, a condition that DuckDB refuses, or runs that differ in n, m, c or k.
    """
    runs = list_runs(root) if where is None else select(list_runs(root), where)
    return open_runs(runs, group, skip_damaged=skip_damaged)


def open_runs(runs: Iterable[Run], group: str, *, skip_damaged: bool = False) -> xr.Dataset:
    """As `open_sweep`, of runs whose records were read before: rows committed later are not seen."""
    if group not in schema.GROUPS:
        raise InputError(f"group = {group!r}: must be one of {', '.join(sorted(schema.GROUPS))}")
    with_rows = [run for run in runs if run.lengths.get(group)]
    if skip_damaged:
        with_rows = [run for run in (_without_damage(run, group) for run in with_rows) if run.lengths[group]]
    if not with_rows:
        raise MissingError(f"no run has a committed row in the group {group!r}; `ntk-eos status ROOT` lists the runs")
    _check_sizes(with_rows, group)
    points, with_rows = _grid(with_rows)
    lengths = [run.lengths[group] for run in with_rows]
    steps = _read(with_rows, f"{group}/step")  # first, as it fails where the rows that a record claims have no files
    index = pd.MultiIndex.from_arrays(
        [*(pd.Index(values).repeat(lengths) for values in points.values()), steps],
        names=[*points, "step"],
    )
    variables = _variables(with_rows, group)
    if "loss" not in variables:
        variables["loss"] = ("snapshot", _read(with_rows, f"{group}/loss"), _described(schema.ROW["loss"]))
    variables["run"] = ("snapshot", np.repeat([run.run_id for run in with_rows], lengths), RUN)
    variables["status"] = ("snapshot", np.repeat([run.status for run in with_rows], lengths), STATUS)
    ds = xr.Dataset(
        variables,
        coords=xr.Coordinates.from_pandas_multiindex(index, "snapshot"),
        attrs={"Conventions": schema.CONVENTIONS, "group": group},
    )
    for name in ("learning_rate", "seed", "step"):
        ds[name].attrs |= _described(schema.ROW[name])
    return ds.set_coords(["run", "status", *({"loss"} - schema.GROUPS[group].keys())])


@dataclass(frozen=True)
class _WholeRows(Run):
    """A run as if these rows were all that one of its groups had."""

    source: Run
    group: str
    rows: tuple[int, ...]

    def read(
        self, name: str, start: int = 0, stop: int | None = None, within: Sequence[tuple[int, int]] = ()
    ) -> NDArray[Any]:
        if not name.startswith(f"{self.group}/"):
            return self.source.read(name, start, stop, within)
        parts = [self.source.read(name, row, row + 1, within) for row in self.rows[start:stop]]
        return np.concatenate(parts) if parts else self.source.read(name, 0, 0, within)


def _without_damage(run: Run, group: str) -> Run:
    """The run without the rows of a group of which a value cannot be read; these are named in the log."""
    whole = []
    for row in range(run.lengths[group]):
        try:
            for name in run.arrays(group):
                run.read(f"{group}/{name}", row, row + 1)
            whole.append(row)
        except DamagedStore as error:
            log.warning("%s: row %d of %s is left out: %s", run.run_id, row, group, error)
    if len(whole) == run.lengths[group]:
        return run
    document = copy.deepcopy(run.document)
    document["attributes"]["lengths"][group] = len(whole)
    seen = _WholeRows(run.path, document, run, group, tuple(whole))
    for node in seen.arrays(group).values():
        node["shape"][0] = len(whole)
    return seen


def _grid(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], list[Run]]:
    """The place of each run on each axis, and the runs in the order of these places.

    An axis that is not one of a run's own study is looked up in the run's identity.
    """
    axes = {run.run_id: run_axes(run) for run in runs}
    names = list(dict.fromkeys(name for own in axes.values() for name in own))

    def place(run: Run) -> list[Any]:
        own = axes[run.run_id]
        return [own[name] if name in own else at(run.attrs["identity"], *name.split(".")) for name in names]

    def order(run: Run) -> list[Any]:
        # Numbers, then words, then places that are not known.
        return [(value is None, isinstance(value, str), 0 if value is None else value) for value in place(run)]

    ordered = sorted(runs, key=lambda run: (order(run), run.run_id))
    return {name: [place(run)[i] for run in ordered] for i, name in enumerate(names)}, ordered


def _read(runs: Iterable[Run], name: str) -> NDArray[Any]:
    """An array of one value per row, of all runs, in memory."""
    return np.concatenate([run.read(name) for run in runs])


@dataclass(frozen=True)
class _Stored:
    """An array of a run as Dask takes it: known by shape and dtype, read when it is indexed."""

    run: Run
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        bounds, inside = [], []
        for axis, chosen in enumerate(key):
            indices = np.arange(self.shape[axis])[chosen]
            low, high = (int(indices.min()), int(indices.max()) + 1) if indices.size else (0, 0)
            bounds.append((low, high))
            inside.append(slice(None, None, chosen.step) if isinstance(chosen, slice) else indices - low)
        (start, stop), *within = bounds
        return self.run.read(self.name, start, stop, within)[tuple(inside)]


def _stored(run: Run, name: str, rows: int) -> da.Array:
    """An array of a run in blocks of `rows` rows; rows that are larger than a block, in their chunks as stored."""
    node = run.node(name)
    # The whole record need not travel to a Dask worker with every array.
    slim = replace(run, document={"consolidated_metadata": {"metadata": {name: node}}})
    array = _Stored(slim, name, tuple(node["shape"]), np.dtype(node["data_type"]))
    token = tokenize(str(run.path), run.head, rows, run.rows if isinstance(run, _WholeRows) else None)
    whole = math.prod(array.shape[1:]) * array.dtype.itemsize <= BLOCK_BYTES
    inner = array.shape[1:] if whole else node["chunk_grid"]["configuration"]["chunk_shape"][1:]
    return da.from_array(
        array,
        chunks=(rows, *inner),
        name=f"{name}-{token}",
        meta=np.empty((0,) * array.ndim, array.dtype),
    )


def _variables(runs: Sequence[Run], group: str) -> dict[str, tuple[Any, ...]]:
    """The lazy data variables of a group, run after run; NaN where a run did not record one that others did."""
    nodes = {name: node for run in runs for name, node in run.arrays(group).items()}
    row_bytes = max(math.prod(node["shape"][1:]) * np.dtype(node["data_type"]).itemsize for node in nodes.values())
    rows = max(1, BLOCK_BYTES // row_bytes)
    variables: dict[str, tuple[Any, ...]] = {}
    for variable in schema.variables_of(group, nodes).values():
        if not OF_A_MODEL & set(variable.dims) or _same(runs, f"{group}/{variable.name}"):
            node = nodes[variable.name]
            kind = np.result_type(node["data_type"], np.float32)  # integers have no NaN
            parts = [
                _stored(run, f"{group}/{variable.name}", rows)
                if variable.name in run.arrays(group)
                else da.full(
                    (run.lengths[group], *node["shape"][1:]), np.nan, dtype=kind, chunks=(rows, *node["shape"][1:])
                )
                for run in runs
            ]
            dims = ("snapshot", *node["dimension_names"][1:])
            variables[variable.name] = (dims, da.concatenate(parts), dict(node["attributes"]))
    variables["target"] = _targets(runs, schema.PROBE["target"], group, rows)
    if any("test_sample" in node["dimension_names"] for node in nodes.values()):
        variables["test_target"] = _targets(runs, schema.TEST_PROBE["test_target"], group, rows)
    for _, _, attributes in variables.values():
        attributes.pop("coordinates", None)
    return variables


def _same(runs: Iterable[Run], name: str) -> bool:
    """Whether an array has one row shape, and one list of names on it, in all runs that have it."""
    group, _, variable = name.partition("/")
    nodes = [run.node(name) for run in runs if variable in run.arrays(group)]
    return len({(*node["shape"][1:], *node["attributes"].get("names", ())) for node in nodes}) == 1


def _targets(runs: Sequence[Run], variable: schema.Variable, group: str, rows: int) -> tuple[Any, ...]:
    """The targets of each run once per row of it, without a copy per row; NaN for a run that has none."""
    stored = [
        _stored(run, f"probe/{variable.name}", -1) if variable.name in run.arrays("probe") else None for run in runs
    ]
    some = next(target for target in stored if target is not None)
    parts = []
    for run, own in zip(runs, stored, strict=True):
        target = da.full(some.shape, np.nan, dtype=some.dtype, chunks=some.chunks) if own is None else own
        blocks = da.core.normalize_chunks((rows,), (run.lengths[group],))[0]
        shape = (run.lengths[group], *target.shape)
        parts.append(da.broadcast_to(target, shape, chunks=(blocks, *target.chunks)))
    return ("snapshot", *variable.dims), da.concatenate(parts), _described(variable)


def _check_sizes(runs: Sequence[Run], group: str) -> None:
    """Runs of one dataset must have the same n, m, c and k."""
    seen: dict[str, tuple[str, int]] = {}
    for run in runs:
        for letter, size in run_sizes(run, group).items():
            if letter == "p":
                continue  # see OF_A_MODEL
            other, expected = seen.setdefault(letter, (run.run_id, size))
            if size != expected:
                raise InputError(
                    f"runs of one dataset must share {letter}: {other} has {letter} = {expected}, {run.run_id} has "
                    f"{letter} = {size}; choose runs with where=..., or a group without that dimension"
                )


def _described(variable: schema.Variable) -> dict[str, str]:
    return {"units": variable.units, "long_name": variable.long_name, "description": variable.description}


def shared_level(runs: Iterable[Run], root: str | os.PathLike[str]) -> float:
    """The loss at which runs are compared: the smallest loss level that all complete ones recorded and reached.

    Args:
        runs: the runs to compare; those that are not complete do not count.
        root: their store, for messages.

    Raises:
        InputError: if there is none.
    """
    reached = []
    for run in runs:
        if run.status == "complete":
            lowest = run.read("train/loss").min(initial=math.inf)
            levels = at(run.attrs["identity"], "record", "loss_levels") or ()
            reached.append({level for level in levels if lowest <= level})
    common = set.intersection(*reached) if reached else set()
    if not common:
        raise InputError(
            f"the complete runs of {root} share no loss level that they reached; set record.loss_levels in the study "
            "to compare them"
        )
    return min(common)
