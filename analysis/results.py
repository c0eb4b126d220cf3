"""Derived results: what the measures say of each run, kept under `<root>/analysis/` and computed only when stale.

    <root>/analysis/<measure>/<run_id>.<key>.zarr.zip

The key is a digest of all that a result depends on: the head of the run's digest chain (its identity, probe and every
committed number), whether it diverged, the measure's version and its parameters. A result whose key is not the
current one is stale; it stays until its successor is there. Deleting the folder loses nothing.

A result is one zipped Zarr group, because one file appears, and goes, in one step: a reader sees a whole result or
none, and it costs one fsync where a folder of forty small files costs forty.
"""

import hashlib
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import evolution
from analysis.compute import task_bytes, tasks_at_once, threads_for
from analysis.tables import LEADING, at
from pipeline.disk import Door, Location, door, location
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.schema import TEST_SCALARS
from pipeline.store import Run, find_run, list_runs

if TYPE_CHECKING:  # imported where something is computed: to see that nothing is stale takes none of it
    import xarray as xr

FOLDER = "analysis"
SUFFIX = ".zarr.zip"

log = logging.getLogger(__name__)

LAYOUT = 2  # of such a file; to be raised when one of before can no longer be read
MOST_BYTES = 2**30  # of an array of a result


@dataclass(frozen=True)
class Measure:
    """A per-run result.

    Attributes:
        compute: run -> lazy datasets along `step`, with values of the run as a whole as scalars. Where two of them
            have the same variable at the same step, the first one counts.
        groups: the run needs a row in one of these.
        version: to be raised when the numbers change.
        applies: whether there is such a result of the run; it is computed of every run by default.
        parameters: further things that the numbers depend on.
    """

    compute: "Callable[[Run], list[xr.Dataset]]"
    groups: tuple[str, ...]
    version: int
    parameters: Any = None
    applies: Callable[[Run], bool] = lambda run: True


def _alignment(run: Run) -> "list[xr.Dataset]":
    """Alignment at every step that has a kernel measure of any kind; NaN where the step lacks a measure's input."""
    from analysis.alignment import alignment
    from analysis.load import open_runs

    found = []
    for group in ("scalars", "spectra", "snapshots"):
        if run.lengths.get(group):
            ds = open_runs([run], group)
            measured = alignment(ds)
            columns = {name: ds[name] for name in ("loss", *TEST_SCALARS, "ntk_sharpness") if name in ds}
            columns |= {name: measured[name] for name in ("kta", "kta_centred", "effective_rank") if name in measured}
            if "cumulative_alignment" in measured:
                leading = measured["cumulative_alignment"]
                columns |= {f"c{k}": leading.isel(eig=k - 1) for k in LEADING if k <= ds.sizes["eig"]}
            found.append(_by_step(ds, columns))
    return found


def _modes(run: Run) -> "list[xr.Dataset]":
    """Alignment and size of each leading eigenvector, at the snapshots."""
    from analysis.alignment import alignment
    from analysis.load import open_runs

    ds = open_runs([run], "snapshots")
    return [_by_step(ds, alignment(ds)[["mode_alignment", "normalised_eigenvalue"]].data_vars)]


def _phases(run: Run) -> "list[xr.Dataset]":
    """Phases per step, and what happened in them."""
    from analysis.load import open_runs
    from analysis.phases import phase_summary, phases

    by_row = phases(open_runs([run], "scalars"))
    return [_by_step(by_row, {**by_row.data_vars, **phase_summary(by_row).isel(run=0).data_vars})]


def _evolution(run: Run) -> "list[xr.Dataset]":
    """The measures of kernel evolution, each at the rows of its own groups."""
    return [_by_step(ds, columns) for ds, columns in evolution.evolution(run)]


def _is_linear(run: Run) -> bool:
    """Whether the theory of two-layer linear networks speaks of the run."""
    model = at(run.attrs["identity"], "model", "name")
    return model == "two_layer_linear" and run.node("probe/target")["shape"][1] == 1


def _linear(run: Run) -> "list[xr.Dataset]":
    """The theory of two-layer linear networks, at the snapshots."""
    import xarray as xr

    from analysis.linear import two_layer_linear
    from analysis.load import open_runs

    ds, x = open_runs([run], "snapshots"), run.read("probe/input")
    inputs = xr.DataArray(x, dims=("sample", *(f"feature{i}" for i in range(1, x.ndim))))
    return [_by_step(ds, two_layer_linear(ds, inputs).data_vars)]


MEASURES = {
    "alignment": Measure(_alignment, ("scalars", "spectra", "snapshots"), 1, LEADING),
    "modes": Measure(_modes, ("snapshots",), 1),
    "phases": Measure(_phases, ("scalars",), 1),
    "evolution": Measure(_evolution, ("scalars", "spectra", "snapshots"), 1, (LEADING, *evolution.MEASURES)),
    "linear": Measure(_linear, ("snapshots",), 1, applies=_is_linear),
}


def analyze(
    root: str | os.PathLike[str],
    measures: Iterable[str] | None = None,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> list[dict[str, Any]]:
    """Compute every result that is missing or stale, and remove those that it replaces.

    What another process adds meanwhile stays: it may be of rows that were committed since.

    Args:
        root: folder of the store.
        measures: names of `MEASURES`; all by default.
        progress: told the share done and what comes next.

    Returns:
        Per run and measure: `run`, `measure`, and `state`: computed, fresh, or damaged. The last has no result, since
        bytes of the run are not what was committed; the log names the file, and `open_sweep(skip_damaged=True)` has
        the other rows.

    Raises:
        MissingError: if the root does not exist.
        InputError: if it is not a store, cannot be written, or a measure is not known.
        DamagedStore: naming the file, if the record of a run is not what was committed.
    """
    names = list(MEASURES if measures is None else measures)
    for name in names:
        _known(name)
    # Listed first: none is of rows newer than `runs`.
    before = {path for name in names for path in _files(root, name)}
    runs = list_runs(root)
    wanted = [(name, run) for name in names for run in runs if _has_input(name, run)]
    stale = [(name, run) for name, run in wanted if _path(root, name, run) not in before]
    # To see that nothing is stale takes no Dask.
    damaged = _compute_all(root, stale, progress) if stale else set()
    current = {_path(root, name, run) for name, run in wanted}
    for path in before - current:
        directory, key = _at(path)
        directory.delete(key)
    states = {(name, run.run_id): "computed" for name, run in stale} | dict.fromkeys(damaged, "damaged")
    return [
        {"run": run.run_id, "measure": name, "state": states.get((name, run.run_id), "fresh")} for name, run in wanted
    ]


def _compute_all(
    root: str | os.PathLike[str], stale: Sequence[tuple[str, Run]], progress: Callable[[float, str], None]
) -> set[tuple[str, str]]:
    """Compute results, as many together as share the cores; as `_compute`."""
    damaged = set()
    with threads_for(task_bytes(run for _, run in stale)):
        size = 2 * tasks_at_once()
        for start in range(0, len(stale), size):
            name, run = stale[start]
            progress(start / len(stale), f"{name} of {run.run_id}")
            damaged |= _compute(root, stale[start : start + size])
    return damaged


def result(root: str | os.PathLike[str], measure: str, run_id: str) -> "xr.Dataset":
    """The result of one run, in memory; computed first if it is missing or stale.

    Args:
        root: folder of the store.
        measure: a name of `MEASURES`.
        run_id: the run's name, or a beginning of it that is unique.

    Raises:
        InputError: if the measure is not known.
        MissingError: if there is no such run, or it has no row that the measure could use.
    """
    _known(measure)
    run = find_run(root, run_id)
    if not _has_input(measure, run):
        groups = " or ".join(MEASURES[measure].groups)
        raise MissingError(f"{run.run_id} has no committed row in {groups}, which {measure} needs")
    if not _is_there(_path(root, measure, run)):
        with threads_for(task_bytes([run])):
            damaged = _compute(root, [(measure, run)])
        if damaged:
            raise DamagedStore(f"{run.run_id} is damaged: `ntk-eos verify {root} {run.run_id} --deep` says where")
    return read(_path(root, measure, run))


def files(root: str | os.PathLike[str]) -> dict[str, dict[str, Location]]:
    """The newest result of each measure, by run and measure; it may be older than the run's last commit."""
    newest: dict[str, dict[str, Location]] = {}
    for name in MEASURES:
        modified = _files(root, name)
        for path in sorted(modified, key=modified.__getitem__):
            newest.setdefault(path.name.removesuffix(SUFFIX).rpartition(".")[0], {})[name] = path
    return newest


def is_fresh(root: str | os.PathLike[str], run: Run) -> bool:
    """Whether every measure of a run was computed from its rows as they are now."""
    return all(_is_there(_path(root, name, run)) for name in MEASURES if _has_input(name, run))


def read(path: Location) -> "xr.Dataset":
    """A result, in memory.

    Raises:
        MissingError: if it is not there.
        DamagedStore: if its bytes are not those that were written.
    """
    import xarray as xr
    from zarr.storage import MemoryStore

    directory, key = _at(path)
    data = directory.get(key)
    try:
        entries = _unzipped(data)
        ds = xr.open_zarr(MemoryStore(entries, read_only=True), consolidated=False, chunks=None).load()
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DamagedStore(f"{path}: {error}; remove it, and `ntk-eos analyze` computes it again") from error
    return ds[sorted(ds.data_vars)]  # they come in the order in which their metadata were read


def _unzipped(data: bytes) -> "dict[str, Any]":
    """The files of a zipped group that takes no more memory than it says: nothing in it is compressed.

    Raises:
        ValueError: for anything else, as a store from a stranger may have it.
    """
    from zarr.buffer.cpu import Buffer

    with zipfile.ZipFile(BytesIO(data)) as archive:
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if packed or sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise ValueError("it would unpack to more than it is")
        files = {name: archive.read(name) for name in archive.namelist()}
    for name, text in files.items():
        document = json.loads(text) if name.endswith("zarr.json") else {}
        if document.get("node_type") == "array":
            size = math.prod(document["shape"]) * np.dtype(document["data_type"]).itemsize
            codecs = [codec["name"] for codec in document["codecs"]]
            if not 0 <= size <= MOST_BYTES or codecs != ["bytes"]:
                raise ValueError(f"{name} has {size} bytes and the codecs {codecs}")
    return {name: Buffer.from_bytes(content) for name, content in files.items()}


def _compute(root: str | os.PathLike[str], batch: Sequence[tuple[str, Run]]) -> set[tuple[str, str]]:
    """Compute results together, so that their tasks share the cores, and write each.

    Returns:
        Measure and name of the runs that are damaged; they are told in the log and keep none of the others back.
    """
    import dask

    try:
        lazy = [MEASURES[name].compute(run) for name, run in batch]
        computed = dask.compute(*lazy)
    except DamagedStore as error:
        if len(batch) > 1:
            return set().union(*(_compute(root, [one]) for one in batch))
        ((name, run),) = batch
        log.warning("no %s of %s: %s", name, run.run_id, error)
        return {(name, run.run_id)}
    for (name, run), parts in zip(batch, computed, strict=True):
        # Joined in memory: on Dask arrays an outer join along the steps makes a task per row.
        ds = reduce(lambda one, other: one.combine_first(other), parts)
        directory, key = _at(_path(root, name, run))
        directory.put(key, _zipped(ds.assign_attrs(run=run.run_id, measure=name, head=run.head)))
    return set()


def _zipped(ds: "xr.Dataset") -> bytes:
    """A dataset as a zipped Zarr group."""
    from zarr.storage import MemoryStore

    # Not into a ZipStore: xarray writes the group's metadata twice, and a zip file would keep both.
    entries: dict[str, Any] = {}
    plain = {name: {"compressors": None} for name in ds.variables}
    ds.to_zarr(MemoryStore(entries), consolidated=False, zarr_format=3, encoding=plain)
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key in sorted(entries):
            archive.writestr(zipfile.ZipInfo(key), entries[key].to_bytes())
    return buffer.getvalue()


def _by_step(ds: "xr.Dataset", columns: "Mapping[Any, xr.DataArray]") -> "xr.Dataset":
    """Columns of one run along `step`, without the coordinates that say which run it is."""
    import xarray as xr

    rows = xr.Dataset({name: array.variable for name, array in columns.items()})
    return rows.rename(snapshot="step").assign_coords(step=("step", ds["step"].values, ds["step"].attrs))


def _known(measure: str) -> None:
    if measure not in MEASURES:
        raise InputError(f"measure {measure!r}: must be one of {', '.join(MEASURES)}")


def _has_input(measure: str, run: Run) -> bool:
    one = MEASURES[measure]
    return one.applies(run) and any(run.lengths.get(group) for group in one.groups)


def _files(root: str | os.PathLike[str], measure: str) -> dict[Location, float]:
    """The results of a measure, and when each was written."""
    store = door(root)
    entries = store.entries(f"{FOLDER}/{measure}")
    return {store.path / one.key: one.modified for one in entries if one.key.endswith(SUFFIX)}


def _at(path: Location) -> tuple[Door, str]:
    """The door of the store that a result is in, and its key there: below the root no link is followed."""
    return door(path.parent.parent.parent), f"{FOLDER}/{path.parent.name}/{path.name}"


def _is_there(path: Location) -> bool:
    directory, key = _at(path)
    return directory.size(key) is not None


def _path(root: str | os.PathLike[str], measure: str, run: Run) -> Location:
    """Where the result of a run as it stands now is kept."""
    inputs = {
        "layout": LAYOUT,
        "head": run.head,
        "diverged": run.attrs["status"] == "diverged",
        "version": MEASURES[measure].version,
        "parameters": MEASURES[measure].parameters,
    }
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()
    return location(root) / FOLDER / measure / f"{run.run_id}.{key}{SUFFIX}"
