"""Committed rows of runs as lazy datasets, and the table of runs that conditions are asked of.

A sweep has its rows along `snapshot`: the runs one after the other, each in order of step, under a MultiIndex of the
grid's axes and `step`. Nothing is padded, so runs of different length cost what they hold.

Chunks are read by `Run.read` instead of zarr-python: it opens a sweep five times faster, reads it no slower, names
the file whose bytes are damaged, and refuses a missing chunk where zarr would silently give NaN.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dask.array as da
import duckdb
import numpy as np
import pandas as pd
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import InputError, MissingError
from pipeline.store import Run, list_runs, read_run

# One task reads several rows: enough that a graph stays small, little enough that a few blocks fit in memory.
BLOCK_BYTES = 16 * 2**20

# Coordinates of a row that are its run's axes or are read at once; `digest` is for verifying only.
NOT_DATA = {"step", "learning_rate", "seed", "digest"}
SIZES = {"sample": "n", "output": "c", "eig": "k", "parameter_index": "p"}


# --- datasets ---------------------------------------------------------------------------------------------------------


def open_run(path: str | os.PathLike[str], group: str = "snapshots") -> xr.Dataset:
    """One run, in the shape of a sweep.

    Args:
        path: folder of the run, `<root>/runs/<run_id>.zarr`.
        group: snapshots, spectra, scalars or train.

    Returns:
        As `open_sweep`.

    Raises:
        MissingError: if there is no such run, or it has no committed row in `group`.
        InputError: if there is no such group.
    """
    return open_runs([read_run(path)], group)


def open_sweep(root: str | os.PathLike[str], group: str = "snapshots", where: str | None = None) -> xr.Dataset:
    """The runs of a store as one lazy dataset.

    Args:
        root: folder of the store.
        group: snapshots, spectra, scalars or train.
        where: SQL condition on the columns of the catalogue's table `runs`, such as "learning_rate > 0.1 and status =
            'complete'"; all runs by default.

    Returns:
        Rows along `snapshot`, a MultiIndex of the grid's axes and `step`; the variables of the group and
        `target` (snapshot, sample, output), lazy; `run`, `status` and `loss` of each row as coordinates in memory
        (`loss` is data in the group train).

    Raises:
        MissingError: if no run is left, or none has a committed row in `group`.
        InputError: for an unknown group, a condition that DuckDB refuses, or runs that differ in n, c, k or p.
    """
    return open_runs(list_runs(root) if where is None else _select(list_runs(root), where), group)


def open_runs(runs: Iterable[Run], group: str) -> xr.Dataset:
    """As `open_sweep`, of runs whose records were read before: rows committed later are not seen."""
    if group not in schema.GROUPS:
        raise InputError(f"group = {group!r}: must be one of {', '.join(sorted(schema.GROUPS))}")
    with_rows = [run for run in runs if run.lengths.get(group)]
    if not with_rows:
        raise MissingError(f"no run has a committed row in the group {group!r}; `ntk-eos status ROOT` lists the runs")
    _check_sizes(with_rows, group)
    axes = {run.run_id: run_axes(run) for run in with_rows}
    names = list(dict.fromkeys(name for values in axes.values() for name in values))
    points = {run.run_id: [_axis(run, axes[run.run_id], name) for name in names] for run in with_rows}
    with_rows.sort(key=lambda run: ([_order(value) for value in points[run.run_id]], run.run_id))

    lengths = [run.lengths[group] for run in with_rows]
    variables = _variables(with_rows, group)
    levels = [_level([points[run.run_id][i] for run in with_rows], lengths) for i in range(len(names))]
    step = np.concatenate([run.read(f"{group}/step") for run in with_rows])
    index = pd.MultiIndex.from_arrays([*levels, step], names=[*names, "step"])
    coords = {
        "run": ("snapshot", np.repeat([run.run_id for run in with_rows], lengths), _attrs("run", "Name of the run.")),
        "status": (
            "snapshot",
            np.repeat([run.status for run in with_rows], lengths),
            _attrs("status of the run", "complete, diverged, running, interrupted, failed or stale."),
        ),
    }
    if "loss" not in variables:
        loss = np.concatenate([run.read(f"{group}/loss") for run in with_rows])
        coords["loss"] = ("snapshot", loss, _described(schema.ROW["loss"]))
    ds = xr.Dataset(variables, attrs={"Conventions": schema.CONVENTIONS, "group": group})
    ds = ds.assign_coords(xr.Coordinates.from_pandas_multiindex(index, "snapshot")).assign_coords(coords)
    for name in ("learning_rate", "seed", "step"):
        ds[name].attrs |= _described(schema.ROW[name])
    return ds


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
        first, *rest = key
        rows = range(self.shape[0])[first]
        if isinstance(rows, int):
            return self.run.read(self.name, rows, rows + 1)[(0, *rest)]
        return self.run.read(self.name, rows.start, rows.stop)[(slice(None, None, rows.step), *rest)]


def _stored(run: Run, name: str, rows: int) -> da.Array:
    """An array of a run in blocks of `rows` rows."""
    node = run.node(name)
    # The whole record need not travel to a Dask worker with every array.
    slim = Run(run.path, {"consolidated_metadata": {"metadata": {name: node}}})
    array = _Stored(slim, name, tuple(node["shape"]), np.dtype(node["data_type"]))
    return da.from_array(
        array,
        chunks=(rows, *array.shape[1:]),
        name=f"{name}-{tokenize(str(run.path), run.head, rows)}",
        fancy=False,
        meta=np.empty((0,) * array.ndim, array.dtype),
    )


def _variables(runs: Sequence[Run], group: str) -> dict[str, tuple[Any, ...]]:
    """The lazy data variables of a group, run after run; NaN where a run did not record one that others did."""
    nodes = {name: node for run in runs for name, node in run.arrays(group).items()}
    row_bytes = max(math.prod(node["shape"][1:]) * np.dtype(node["data_type"]).itemsize for node in nodes.values())
    rows = max(1, BLOCK_BYTES // row_bytes)
    variables: dict[str, tuple[Any, ...]] = {}
    for variable in schema.GROUPS[group].values():
        if variable.name in nodes:
            node = nodes[variable.name]
            parts = [
                _stored(run, f"{group}/{variable.name}", rows)
                if variable.name in run.arrays(group)
                else da.full((run.lengths[group], *node["shape"][1:]), np.nan, chunks=(rows, *node["shape"][1:]))
                for run in runs
            ]
            dims = ("snapshot", *variable.dims[1:])
            variables[variable.name] = (dims, da.concatenate(parts), dict(node["attributes"]))
    variables["target"] = (
        ("snapshot", *schema.PROBE["target"].dims),
        da.concatenate([_repeated(run, run.lengths[group], rows) for run in runs]),
        _described(schema.PROBE["target"]),
    )
    for _, _, attributes in variables.values():
        attributes.pop("coordinates", None)
    return variables


def _repeated(run: Run, length: int, rows: int) -> da.Array:
    """The run's targets once per row (length, n, c), without a copy per row."""
    target = _stored(run, "probe/target", -1)
    blocks = da.core.normalize_chunks((rows,), (length,))[0]
    return da.broadcast_to(target, (length, *target.shape), chunks=(blocks, *target.chunks))


def _check_sizes(runs: Sequence[Run], group: str) -> None:
    """Runs of one dataset must have the same n, c, k and p."""
    first, *others = runs
    expected = _sizes(first, group)
    for run in others:
        sizes = _sizes(run, group)
        for letter in expected.keys() & sizes.keys():
            if sizes[letter] != expected[letter]:
                raise InputError(
                    f"runs of one dataset must share {letter}: {first.run_id} has {letter} = {expected[letter]}, "
                    f"{run.run_id} has {sizes[letter]}; choose runs with where=..., or a group without that dimension"
                )


def _sizes(run: Run, group: str) -> dict[str, int]:
    nodes = [*run.arrays(group).values(), run.node("probe/target")]
    return {
        SIZES[dim]: size
        for node in nodes
        for dim, size in zip(node["dimension_names"], node["shape"], strict=True)
        if dim in SIZES
    }


def run_axes(run: Run) -> dict[str, Any]:
    """The point of the grid at which a run stands; always has learning_rate and seed."""
    axes = run.attrs.get("axes", {})
    return {name: axes.get(name, _recorded(run, name)) for name in ("learning_rate", "seed")} | axes


def _recorded(run: Run, name: str) -> Any:
    """Learning rate or seed of a run, from the root attributes or its first row."""
    if name in run.attrs:
        return run.attrs[name]
    group = next((group for group, rows in run.lengths.items() if rows), None)
    return None if group is None else run.read(f"{group}/{name}", 0, 1)[0].item()


def _axis(run: Run, axes: Mapping[str, Any], name: str) -> Any:
    """Where a run stands on an axis; one that is not an axis of its own study is looked up in its identity."""
    return axes[name] if name in axes else _at(run.attrs["identity"], *name.split("."))


def _at(document: Any, *keys: str) -> Any:
    """Value at a path of nested tables, None if it is not there."""
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def _order(value: Any) -> tuple[bool, bool, Any]:
    """Sort key of the values of an axis: numbers, then words, then absent ones."""
    return (value is None, isinstance(value, str), "" if value is None else value)


def _level(values: list[Any], lengths: list[int]) -> pd.Index:
    """One level of the index, each run's value repeated for its rows."""
    return pd.Index(values).repeat(lengths)


def _attrs(long_name: str, description: str) -> dict[str, str]:
    return {"units": "1", "long_name": long_name, "description": description}


def _described(variable: schema.Variable) -> dict[str, str]:
    return {"units": variable.units, "long_name": variable.long_name, "description": variable.description}


# --- the table of runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table of the catalogue.

    Attributes:
        name: as in SQL.
        type: DuckDB's type.
        unit: UDUNITS string, "1" if dimensionless, "" for what is not a quantity.
        description: what it says; NULL where that is not known.
    """

    name: str
    type: str
    unit: str
    description: str


RUNS = (
    Column("run_id", "VARCHAR", "", "Name of the run, unique in its store."),
    Column("path", "VARCHAR", "", "Folder of the run, relative to the root of the store."),
    Column("status", "VARCHAR", "", "complete, diverged, running, interrupted, failed, or stale: unfinished, no writer."),
    Column("stop_reason", "VARCHAR", "", "Why a finished run ended: steps, loss, or what was not finite."),
    Column("learning_rate", "DOUBLE", "1", "Step size η."),
    Column("seed", "BIGINT", "", "Seed of data, initialisation and order."),
    Column("axes", "JSON", "", "Value of each axis of the run's grid, such as axes->>'$.\"model.width\"'."),
    Column("study", "VARCHAR", "", "Name of the study that the run belongs to."),
    Column("title", "VARCHAR", "", "Title of that study."),
    Column("family", "VARCHAR", "", "Equal for runs that differ in nothing but their process."),
    Column("process", "VARCHAR", "", "What moves the parameters: discrete is gradient descent in steps."),
    Column("dataset", "VARCHAR", "", "Name of the data."),
    Column("model", "VARCHAR", "", "Name of the model."),
    Column("loss_function", "VARCHAR", "", "Name of the loss."),
    Column("update_rule", "VARCHAR", "", "Name of the update rule."),
    Column("n", "BIGINT", "1", "Probe examples."),
    Column("c", "BIGINT", "1", "Outputs."),
    Column("p", "BIGINT", "1", "Parameters."),
    Column("k", "BIGINT", "1", "Eigenpairs recorded."),
    Column("steps", "BIGINT", "1", "Last committed step, the number of updates made before it."),
    Column("n_snapshots", "BIGINT", "1", "Committed rows of the group snapshots."),
    Column("n_spectra", "BIGINT", "1", "Committed rows of the group spectra."),
    Column("n_scalars", "BIGINT", "1", "Committed rows of the group scalars."),
    Column("n_train", "BIGINT", "1", "Committed rows of the group train."),
    Column("final_loss", "DOUBLE", "1", "Training loss at the last committed step."),
    Column("commits", "BIGINT", "1", "Commits so far."),
    Column("head", "VARCHAR", "", "Head of the digest chain: equal for runs that recorded the same numbers."),
    Column("created_at", "TIMESTAMP", "", "When the run was created, UTC."),
    Column("git_commit", "VARCHAR", "", "Commit of the code that created the run."),
    Column("git_dirty", "BOOLEAN", "", "Whether that code had uncommitted changes."),
    Column("device", "VARCHAR", "", "Device of the computation."),
    Column("threads", "BIGINT", "1", "Threads of the computation."),
    Column("torch_version", "VARCHAR", "", "Version of torch."),
    Column("host", "VARCHAR", "", "Machine on which the run was created."),
    Column("config", "JSON", "", "All that determines the run's numbers, such as config->>'$.model.width'."),
)

DTYPES = {"BIGINT": "Int64", "DOUBLE": "Float64", "BOOLEAN": "boolean", "TIMESTAMP": "datetime64[us]"}


def run_table(root: str | os.PathLike[str]) -> pd.DataFrame:
    """One row per run of a store with the columns `RUNS`; what is not known is NA."""
    return frame_of(RUNS, [run_row(run) for run in list_runs(root)])


def frame_of(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with the dtypes of their columns; keys that a row lacks are NA."""
    return pd.DataFrame(
        {
            column.name: pd.Series([row.get(column.name) for row in rows], dtype=DTYPES.get(column.type, "object"))
            for column in columns
        }
    )


def create_table(connection: duckdb.DuckDBPyConnection, name: str, columns: Sequence[Column]) -> None:
    """Create an empty table. Names and types are those of the registries, never of a store."""
    connection.execute(f"create table {name} ({', '.join(f'{column.name} {column.type}' for column in columns)})")


def run_row(run: Run) -> dict[str, Any]:
    """What the record of a run says, by column of `RUNS`."""
    attrs, axes = run.attrs, run_axes(run)
    identity, provenance = attrs["identity"], attrs.get("provenance", {})
    sizes: dict[str, int] = {}
    for group in run.lengths:
        sizes |= _sizes(run, group)
    trained = next((group for group in ("train", "scalars", "spectra", "snapshots") if run.lengths.get(group)), None)
    return {
        "run_id": run.run_id,
        "path": f"{run.path.parent.name}/{run.path.name}",
        "status": run.status,
        "learning_rate": axes["learning_rate"],
        "seed": axes["seed"],
        "axes": json.dumps(axes),
        "process": identity.get("process"),
        "dataset": _name(identity, "data"),
        "model": _name(identity, "model"),
        "loss_function": _name(identity, "loss"),
        "update_rule": _name(identity, "update"),
        **{letter: sizes.get(letter) for letter in "ncpk"},
        "steps": attrs["last_step"],
        **{f"n_{group}": run.lengths.get(group) for group in ("snapshots", "spectra", "scalars", "train")},
        "final_loss": run.read(f"{trained}/loss", run.lengths[trained] - 1)[0].item() if trained else None,
        "created_at": _utc(attrs.get("created_at")),
        "torch_version": _at(provenance, "versions", "torch"),
        "config": json.dumps(identity),
        **{name: attrs.get(name) for name in ("stop_reason", "study", "title", "family", "commits", "head")},
        **{name: provenance.get(name) for name in ("git_commit", "git_dirty", "device", "threads", "host")},
    }


def _name(identity: Mapping[str, Any], part: str) -> str | None:
    """The name of the run's data, model, loss or update rule: a table with a name, or the name itself."""
    value = identity.get(part)
    return value if isinstance(value, str) else _at(value, "name")


def _utc(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)


def _select(runs: Sequence[Run], where: str) -> list[Run]:
    """The runs that satisfy an SQL condition on the columns `RUNS`."""
    frame = frame_of(RUNS, [run_row(run) for run in runs])
    with duckdb.connect(config={"enable_external_access": False, "lock_configuration": True}) as connection:
        create_table(connection, "runs", RUNS)
        connection.register("frame", frame)
        connection.execute("insert into runs by name select * from frame")
        try:
            wanted = {row[0] for row in connection.table("runs").filter(where).project("run_id").fetchall()}
        except duckdb.Error as error:
            raise InputError(f"where = {where!r}: {first_line(error)}") from error
    if not wanted:
        raise MissingError(f"where = {where!r} leaves none of {len(runs)} runs; `ntk-eos status ROOT` lists them")
    return [run for run in runs if run.run_id in wanted]


def first_line(error: duckdb.Error) -> str:
    """DuckDB's own first line, without the excerpt of the query that follows it."""
    return str(error).strip().partition("\n")[0]
