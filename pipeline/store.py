"""Runs on disk: creating, committing, finishing and reading one Zarr group per run.

The root `zarr.json` of a run is its commit record. It names the committed length of every array, the head of the
digest chain and the checkpoint that belongs to it, and it is replaced in one atomic step after everything it names
is durable. A kill at any moment therefore leaves the last commit whole and nothing of the next one visible. All of it
goes through `pipeline.disk.door`, so a root may be a folder or the URL of an object store.

    row digest   blake2b-128 over (group, name, dtype, shape, bytes) of the row's variables
    head         blake2b-128(head, row digest), rows in order of (step, group),
                 seeded by the digest of the run's identity and its probe

Two runs recorded the same numbers if and only if their heads are equal.
"""

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline import schema, zarr3
from pipeline.disk import AnyLease, Door, Location, door, location, refuse_link
from pipeline.errors import DamagedStore, InputError, MissingError, NtkEosError, RunLocked
from pipeline.guard import check_record, check_run_id, is_number
from pipeline.schema import Variable
from pipeline.zarr3 import Document

RUNS = "runs"
SUFFIX = ".zarr"
RECORD = "zarr.json"
LEASE = "LEASE"
HEARTBEAT = "run.json"
# One of these is in the folder of every run, also where the record has been lost.
MARKS = (RECORD, HEARTBEAT)
FINAL = ("complete", "diverged")
RECORD_LIMIT = 64 * 2**20
UNCHECKED_BYTES = 256 * 2**20
BAND_BYTES = 64 * 2**20  # of a kernel in tiles that are read at once to be hashed

Row = Mapping[str, Any]


class NonFiniteRow(NtkEosError):
    """A row holds NaN or infinity, as those of a diverged run do; it is not stored."""


def blake(*parts: bytes) -> bytes:
    """blake2b-128 of the concatenated parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True)
class InChunks:
    """A row's value of one array as its chunks hold it: what is too large for memory is written and read by chunks.

    Attributes:
        directory: the run's folder.
        name: group and variable, such as `snapshots/ntk`.
        row: which row of the array.
        shape: of the value.
        chunks: shape of a chunk of it.
        dtype: of its numbers.
    """

    directory: Door
    name: str
    row: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]

    def grid(self) -> Iterator[tuple[int, ...]]:
        """Indices of all chunks of the value."""
        return zarr3.grid(self.shape, self.chunks)

    def region(self, index: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in the value a chunk lies."""
        axes = zip(index, self.chunks, self.shape, strict=True)
        return tuple(slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in axes)

    def key(self, index: tuple[int, ...]) -> str:
        """The file of a chunk, relative to the run's folder."""
        return f"{self.name}/{zarr3.chunk_key((self.row, *index))}"

    def put(self, index: tuple[int, ...], block: NDArray[Any]) -> None:
        """Write one chunk; nobody sees it before the row is committed.

        Raises:
            NonFiniteRow: if a number is not finite as it would be stored.
        """
        with np.errstate(over="ignore"):  # what is finite in float64 may not be in float32
            block = block.astype(self.dtype, copy=False)
        if not np.isfinite(block).all():
            raise NonFiniteRow(f"chunk {index} of {self.name} is not finite")
        self.directory.put(self.key(index), zarr3.encode(zarr3.padded(block, self.chunks)[None]))

    def get(self, index: tuple[int, ...]) -> NDArray[Any]:
        """Read one chunk, without what fills it up at the edge.

        Raises:
            DamagedStore: naming the file, if it is missing or does not decode.
        """
        key = self.key(index)
        chunk = _chunk(self.directory, key, self.dtype, (1, *self.chunks))[0]
        return chunk[tuple(slice(part.stop - part.start) for part in self.region(index))]

    def bands(self) -> Iterator[NDArray[Any]]:
        """All numbers in C order, as consecutive lines of the first axis, of about `BAND_BYTES` or one chunk.

        Chunks beside each other are read as often as their lines do not fit into one band.
        """
        first, *others = self.chunks
        across = list(zarr3.grid(self.shape[1:], tuple(others)))
        for i in range(-(-self.shape[0] // first)):
            if len(across) == 1:
                yield self.get((i, *across[0]))
                continue
            height = min(first, self.shape[0] - i * first)
            line = self.dtype.itemsize * math.prod(self.shape[1:])
            for low in range(0, height, step := max(1, BAND_BYTES // line)):
                _check_backed(self.directory, self.name, min(step, height) * line, (self.key((i, *j)) for j in across))
                band = np.empty((min(step, height - low), *self.shape[1:]), self.dtype)
                for index in across:
                    band[(slice(None), *self.region((i, *index))[1:])] = self.get((i, *index))[low : low + step]
                yield band


def _chunk(directory: Door, key: str, dtype: np.dtype[Any], chunks: tuple[int, ...]) -> NDArray[Any]:
    """Read one chunk file.

    Raises:
        DamagedStore: naming the file, if it is missing or does not decode.
    """
    try:
        data = directory.get(key, limit=math.prod(chunks) * dtype.itemsize + zarr3.OVERHEAD)
        return zarr3.decode(data, dtype, chunks)
    except DamagedStore as error:
        raise DamagedStore(f"{directory.path / key}: {error}") from error
    except (MissingError, InputError) as error:
        raise DamagedStore(str(error)) from error


def _check_backed(directory: Door, name: str, wanted: int, keys: Iterable[str]) -> None:
    """Refuse to make room for more bytes of an array than the files of these keys can hold."""
    if wanted <= UNCHECKED_BYTES:
        return
    held = zarr3.MOST_EXPANSION * sum(directory.size(key) or 0 for key in keys)
    if wanted > held:
        raise DamagedStore(f"{directory.path / name}: its files can hold {held} bytes, not the {wanted} of these rows")


def add_to_digest(digest: "hashlib.blake2b", group: str, name: str, value: Any) -> None:
    """Feed a row's digest with one of its values, an `InChunks` or an array."""
    value = value if isinstance(value, InChunks) else np.asarray(value)
    digest.update(f"{group}\0{name}\0{value.dtype.name}\0{value.shape}\0".encode())
    for part in value.bands() if isinstance(value, InChunks) else (value,):
        digest.update(np.ascontiguousarray(part, dtype=value.dtype.newbyteorder("<")).data)


def row_digest(group: str, variables: Iterable[Variable], row: Row) -> bytes:
    """Digest of one row of a group; volatile variables do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for variable in variables:
        if not variable.volatile:
            add_to_digest(digest, group, variable.name, row[variable.name])
    return digest.digest()


def chain_seed(identity: Document, probe: Mapping[str, NDArray[Any]]) -> bytes:
    """First link of the digest chain: what the run is and which examples it was measured on."""
    rows = [Variable(name, (), "", "", "", "") for name in sorted(probe)]
    return blake(zarr3.to_json(identity), row_digest("probe", rows, probe))


def runs_directory(root: str | os.PathLike[str]) -> Door:
    """The `runs/` folder of an existing store.

    Raises:
        MissingError: if the root does not exist.
        InputError: if it exists and is not a store.
    """
    runs = door(location(root) / RUNS)
    if not runs.is_there():
        if not door(root).is_there():
            raise MissingError(f"{root} does not exist; `ntk-eos run STUDY --out {root}` would create it")
        if parts := parts_of(root):
            names = ", ".join(part.name for part in parts)
            raise InputError(f"{root} holds a store for each part of a study ({names}): give one, as in {parts[0]}")
        raise InputError(f"{root} is not a store: it has no folder {RUNS!r}; give the folder that `run --out` wrote")
    refuse_link(runs.path)
    return runs


def parts_of(root: str | os.PathLike[str]) -> list[Location]:
    """The stores of the parts of a study below a folder or a URL; none if that is a store itself."""
    folder = door(root)
    if door(folder.path / RUNS).is_there():
        return []
    parts = [folder.path / name for name in folder.folders((RUNS,))]
    return [part for part in parts if door(part / RUNS).is_there()]


def stores_of(root: str | os.PathLike[str]) -> list[Location]:
    """The stores that a command on all parts of a study is about: those below the folder, or the folder itself."""
    return parts_of(root) or [location(root)]


def check_root(root: str | os.PathLike[str]) -> None:
    """Refuse a folder that could not be a store; nothing is created.

    Raises:
        InputError: if the folder cannot be written, or holds something else than a store.
    """
    runs = door(location(root) / RUNS)
    if parts := parts_of(root):
        raise InputError(f"{root} holds the stores of {len(parts)} parts of a study: choose another folder")
    if not runs.is_there() and next(door(root).list(hidden=True), None) is not None:
        raise InputError(f"{root} is not a store and not empty: choose a new folder, or one that `run --out` wrote")
    runs.check_writable()


def open_root(root: str | os.PathLike[str]) -> Door:
    """The `runs/` folder of a store, created if absent.

    Raises:
        InputError: if the folder cannot be written, or holds something else than a store.
    """
    check_root(root)
    runs = door(location(root) / RUNS)
    runs.make()
    return runs


def run_path(root: str | os.PathLike[str], run_id: str) -> Location:
    """Where a run of a store lies."""
    return location(root) / RUNS / (run_id + SUFFIX)


# What a heartbeat may say; an entry of another type is as good as none.
SAID = {
    "run": str, "status": str, "head": str, "host": str, "error": str, "traceback": str, "last_step": int, "steps": int,
    "commits": int, "pid": int,
    "time": float, "elapsed": float, "loss": float,
}  # fmt: skip


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a run has been created there."""
    return door(path).size(RECORD) is not None


def heartbeat(path: Location) -> Document:
    """What the writer of a run last said of itself; empty if that file is not there or unreadable."""
    try:
        beat = json.loads(door(path).get(HEARTBEAT, limit=2**20))
    except (MissingError, InputError, DamagedStore, ValueError, RecursionError):
        return {}
    return {name: value for name, value in beat.items() if _is_said(name, value)} if isinstance(beat, dict) else {}


def _is_said(name: str, value: Any) -> bool:
    kind = SAID.get(name)
    if kind is float:
        return is_number(value)
    return kind is not None and type(value) is kind and (kind is str or is_number(value))


@dataclass(frozen=True)
class Run:
    """One run as its commit record describes it; the arrays are not opened.

    Attributes:
        path: folder of the run, or its URL.
        document: the root `zarr.json`.
    """

    path: Location
    document: Document = field(repr=False)

    @property
    def attrs(self) -> Document:
        """Root attributes: identity, provenance and the last commit."""
        return self.document["attributes"]

    @property
    def run_id(self) -> str:
        """Name of the run, unique in its root."""
        return self.attrs["run"]

    @property
    def lengths(self) -> dict[str, int]:
        """Committed rows per growing group."""
        return self.attrs["lengths"]

    @property
    def head(self) -> str:
        """Hexadecimal head of the digest chain."""
        return self.attrs["head"]

    @cached_property
    def heartbeat(self) -> Document:
        """What the writer last said of itself; empty if that file is gone or unreadable."""
        return heartbeat(self.path)

    @property
    def status(self) -> str:
        """complete, diverged, running, interrupted, failed, or stale (unfinished, and nobody writes it)."""
        if self.attrs["status"] in FINAL:
            return self.attrs["status"]
        if door(self.path).leased(LEASE):
            return "running"
        said = self.heartbeat.get("status")
        return said if said in ("interrupted", "failed") else "stale"

    def node(self, name: str) -> Document:
        """Metadata document of an array, such as `snapshots/ntk`, at its committed length."""
        return self.document["consolidated_metadata"]["metadata"][name]

    def arrays(self, group: str) -> dict[str, Document]:
        """Metadata documents of all arrays of a group."""
        nodes = self.document["consolidated_metadata"]["metadata"]
        return {
            name.partition("/")[2]: node
            for name, node in nodes.items()
            if name.startswith(f"{group}/") and node["node_type"] == "array"
        }

    def in_chunks(self, name: str, row: int) -> InChunks:
        """One row's value of an array whose rows own their chunks, to be read chunk by chunk."""
        node = self.node(name)
        _, *chunks = node["chunk_grid"]["configuration"]["chunk_shape"]
        kind = np.dtype(node["data_type"])
        return InChunks(door(self.path), name, row, tuple(node["shape"][1:]), tuple(chunks), kind)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, within: Sequence[tuple[int, int]] = ()
    ) -> NDArray[Any]:
        """Committed values of an array, read chunk by chunk without zarr.

        Args:
            name: group and variable, such as `snapshots/ntk`.
            start: first row.
            stop: row after the last one; all by default.
            within: first index and the one after the last along each further axis; the whole of an axis by default.

        Raises:
            DamagedStore: naming the file, if a chunk is missing or does not decode.
        """
        directory, node = door(self.path), self.node(name)
        shape, dtype = node["shape"], np.dtype(node["data_type"])
        chunks = tuple(node["chunk_grid"]["configuration"]["chunk_shape"])
        stop = shape[0] if stop is None else min(stop, shape[0])
        bounds = [(start, max(start, stop)), *within, *((0, size) for size in shape[1 + len(within) :])]
        sizes = [high - low for low, high in bounds]
        keys = (f"{name}/{zarr3.chunk_key(index)}" for index in zarr3.window(bounds, chunks))
        _check_backed(directory, name, math.prod(sizes) * dtype.itemsize, keys)
        out = np.empty(sizes, dtype)
        for index in zarr3.window(bounds, chunks):
            chunk = _chunk(directory, f"{name}/{zarr3.chunk_key(index)}", dtype, chunks)
            here, there = [], []
            for (low, high), i, size in zip(bounds, index, chunks, strict=True):
                first, last = max(low, i * size), min(high, (i + 1) * size)
                here.append(slice(first - low, last - low))
                there.append(slice(first - i * size, last - i * size))
            out[tuple(here)] = chunk[tuple(there)]
        return out


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the commit record of one run.

    Raises:
        MissingError: if there is no run.
        DamagedStore: if the record is not what was committed.
        InputError: if it was written by a newer version of the format.
    """
    folder = location(path)
    try:
        data = door(folder).get(RECORD, limit=RECORD_LIMIT)
    except MissingError as error:
        raise MissingError(f"{folder} is not a run: it has no {RECORD}") from error
    try:
        document = json.loads(data)
        attrs = document["attributes"]
        version, stated = attrs["format_version"], attrs["record"]
        digest = _record_digest(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedStore(f"{folder / RECORD} is not the record of a run: {error!r}") from error
    if version != schema.FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {str(version)[:20]}; this ntk-eos reads {schema.FORMAT_VERSION}: install a "
            "newer one"
        )
    if digest != stated:
        raise DamagedStore(f"{folder / RECORD} is not what was committed: its own digest does not match")
    try:
        check_record(document)
    except NtkEosError as error:
        raise type(error)(f"{folder / RECORD}: {error}") from error
    return Run(folder, document)


def run_paths(root: str | os.PathLike[str]) -> list[Location]:
    """Where the runs of a root lie, by name; their records are not read."""
    runs = runs_directory(root)
    paths = [runs.path / name for name in runs.folders(MARKS) if name.endswith(SUFFIX)]
    for path in paths:
        refuse_link(path)
    return paths


def list_runs(root: str | os.PathLike[str]) -> list[Run]:
    """All runs of a root, by name."""
    return [read_run(path) for path in run_paths(root)]


def find_run(root: str | os.PathLike[str], run_id: str) -> Run:
    """One run of a root, by its name or a beginning of it that is unique.

    Raises:
        MissingError: if no run, or more than one, matches.
    """
    return read_run(find_path(root, run_id))


def find_path(root: str | os.PathLike[str], run_id: str) -> Location:
    """Where the run lies that `find_run` would read.

    Raises:
        MissingError: if no run, or more than one, matches.
    """
    names = [path.name.removesuffix(SUFFIX) for path in run_paths(root)]
    matches = [name for name in names if name == run_id] or [name for name in names if name.startswith(run_id)]
    if len(matches) != 1:
        found = f"matches {', '.join(matches[:5])}" if matches else f"is not one of {', '.join(names[:5])} ..."
        raise MissingError(f"run {run_id!r} {found}; give a full name from `ntk-eos status {root}`")
    return run_path(root, matches[0])


def _record_digest(document: Document) -> str:
    attrs = {name: value for name, value in document["attributes"].items() if name != "record"}
    return blake(zarr3.to_json({**document, "attributes": attrs})).hex()


@dataclass
class _Array:
    """An array that grows: where its rows go, and the rows of a shared chunk that is not full yet."""

    group: str
    variable: Variable
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    chunks: tuple[int, ...]
    attributes: Document
    tail: NDArray[Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.group}/{self.variable.name}"

    def document(self, rows: int) -> Document:
        return zarr3.array_document(
            (rows, *self.row_shape), self.dtype, self.chunks, self.variable.dims, self.attributes
        )

    def chunk_files(self, first: int, rows: list[Any]) -> Iterator[tuple[str, bytes]]:
        """Keys and bytes of all chunk files that change when `rows` are appended at row `first`."""
        if self.variable.rows_per_chunk is None:
            for offset, row in enumerate(rows):
                # What is in chunks is in the store already.
                for index, block in () if isinstance(row, InChunks) else zarr3.split(row, self.chunks[1:]):
                    yield f"{self.name}/{zarr3.chunk_key((first + offset, *index))}", zarr3.encode(block[None])
            return
        per_chunk = self.chunks[0]
        for offset, row in enumerate(rows):
            position = (first + offset) % per_chunk
            if position == 0 or self.tail is None:
                self.tail = np.full(self.chunks, zarr3.fill_value(self.dtype), self.dtype)
            self.tail[position] = row
            if position == per_chunk - 1 or offset == len(rows) - 1:
                index = ((first + offset) // per_chunk, *(0 for _ in self.row_shape))
                yield f"{self.name}/{zarr3.chunk_key(index)}", zarr3.encode(self.tail)


class Writer:
    """The single writer of one run.

    Rows wait in memory until `commit`. Use `Writer.open`, which creates the run or takes it up where its last
    commit left it.

    Attributes:
        directory: the run's folder.
        pending_bytes: memory that uncommitted rows hold.
    """

    def __init__(self, directory: Door, lease: AnyLease, run: Run) -> None:
        self.directory = directory
        self._lease = lease
        self._attrs = dict(run.attrs)
        self._static = {
            name: node for name, node in run.document["consolidated_metadata"]["metadata"].items()
            if name.startswith("probe")
        }  # fmt: skip
        self._lengths = dict(run.lengths)
        self._capacity = dict.fromkeys(run.lengths, 0)
        self._pending: dict[str, list[Row]] = {group: [] for group in run.lengths}
        self._head = bytes.fromhex(run.head)
        self.pending_bytes = 0
        self._broken = False
        self._started = time.monotonic()
        self._arrays: dict[str, list[_Array]] = {}
        self._variables: dict[str, list[Variable]] = {}
        for group in run.lengths:
            nodes = run.arrays(group)
            self._variables[group] = schema.row_variables(group, nodes)
            self._arrays[group] = [_growing(group, v, nodes[v.name]) for v in self._variables[group]]

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        run_id: str,
        *,
        identity: Document,
        attrs: Document,
        dims: Mapping[str, int],
        groups: Mapping[str, Iterable[str]],
        capacity: Mapping[str, int],
        probe: Mapping[str, NDArray[Any]],
        dtype: str,
        attributes: Mapping[str, Document] | None = None,
    ) -> Self:
        """Create a run, or take it up where its last commit left it.

        Args:
            root: folder of the store; created if absent.
            run_id: name of the run.
            identity: what makes the run this run; part of the digest chain.
            attrs: further root attributes (provenance, titles).
            dims: lengths of `sample`, `sample2`, `eig`, `output` and `parameter_index`.
            groups: variables of each growing group.
            capacity: rows planned per group; a group that outgrows its plan is enlarged.
            probe: the arrays `sample_index` (n,), `input` (n, ...) and `target` (n, c); with held-out examples also
                `test_sample_index` (m,), `test_input` (m, ...) and `test_target` (m, c).
            dtype: dtype of the model's parameters.
            attributes: further attributes of single arrays, by `group/name`.

        Raises:
            InputError: if the root cannot be written, the name cannot be a run's, an attribute is of another type than
                the format has it, or the run holds other data or variables under this name.
            RunLocked: if another process writes this run.
        """
        check_run_id(run_id)
        runs = open_root(root)
        identity, attrs = zarr3.as_stored(identity), zarr3.as_stored(attrs)
        seed = chain_seed(identity, probe)
        planned = _planned(groups, dims, dtype, zarr3.as_stored(dict(attributes or {})))
        fresh = {
            **attrs,
            "run": run_id,
            "identity": identity,
            "format_version": schema.FORMAT_VERSION,
            "Conventions": schema.CONVENTIONS,
            "seed_digest": seed.hex(),
            "head": seed.hex(),
            "status": "running",
            "stop_reason": None,
            "commits": 0,
            "last_step": None,
            "checkpoint": None,
        }
        build = partial(_build, attrs=fresh, arrays=planned, probe=probe)
        directory, lease, new = runs.claim(run_id + SUFFIX, build, marks=MARKS, lease=LEASE, note=holder())
        try:
            directory.sweep()
            run = read_run(directory.path)
            if new:
                return cls(directory, lease, run)._reserve(capacity)
            if run.attrs["seed_digest"] != seed.hex():
                raise InputError(
                    f"run {run_id} in {root} was recorded on other data: write to another root, "
                    f"or remove {directory.path}"
                )
            writer = cls(directory, lease, run)._restore_tails(run)
            other = _differing(planned, writer._arrays)
            if other:
                raise InputError(
                    f"run {run_id} in {root} was recorded with other variables or shapes ({other}): write to another "
                    f"root, or remove {directory.path}"
                )
            if writer.status in FINAL:
                return writer
            writer._fence()
            return writer._reserve(capacity)
        except BaseException:
            lease.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def attrs(self) -> Document:
        """Root attributes as of the last commit."""
        return self._attrs

    @property
    def status(self) -> str:
        """Committed status: running, complete or diverged."""
        return self._attrs["status"]

    @property
    def last_step(self) -> int | None:
        """Step of the newest row, committed or waiting."""
        return self._attrs["last_step"]

    def checkpoint(self) -> bytes | None:
        """The checkpoint of the last commit.

        Raises:
            MissingError: if it is gone.
            DamagedStore: if it is not the one that was committed.
        """
        entry = self._attrs["checkpoint"]
        if entry is None:
            return None
        data = self.directory.get(entry["name"])
        if blake(data).hex() != entry["digest"]:
            raise DamagedStore(f"{self.directory.path / entry['name']} is not the checkpoint that was committed")
        return data

    def append(self, step: int, rows: Mapping[str, Row]) -> None:
        """Add one row to each of the groups given; they become visible with the next commit.

        Raises:
            NonFiniteRow: if a value is not finite as it would be stored; nothing is added then.
            ValueError: if a value has another shape than planned, or `step` is not beyond the last one; nothing is
                added then.
        """
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(f"step {step} after step {self.last_step}: the digest chain takes rows in order of steps")
        checked = {group: self._checked(group, step, {**rows[group], "step": step}) for group in sorted(rows)}
        for group, row in checked.items():
            digest = row_digest(group, self._variables[group], row)
            self._head = blake(self._head, digest)
            self._pending[group].append({**row, "digest": np.frombuffer(digest, np.uint8)})
            self.pending_bytes += sum(value.nbytes for value in row.values() if not isinstance(value, InChunks))
        self._attrs["last_step"] = step

    def in_chunks(self, group: str, name: str) -> InChunks:
        """The value of a variable in the next row of a group, to be put chunk by chunk before `append` is given it."""
        array = next(array for array in self._arrays[group] if array.variable.name == name)
        row = self._lengths[group] + len(self._pending[group])
        return InChunks(self.directory, array.name, row, array.row_shape, array.chunks[1:], array.dtype)

    def _checked(self, group: str, step: int, row: Row) -> dict[str, Any]:
        checked: dict[str, Any] = {}
        for array in self._arrays[group][:-1]:
            given = row[array.variable.name]
            if isinstance(given, InChunks):
                if given != self.in_chunks(group, array.variable.name):
                    raise ValueError(f"{array.name} at step {step}: its chunks are of another row or shape")
                checked[array.variable.name] = given  # each chunk was looked at when it was put
                continue
            # A kernel that is finite in float64 may not be in float32.
            # Always a copy: the caller may reuse its buffer before the commit.
            with np.errstate(over="ignore"):
                value = np.asarray(given).astype(array.dtype)
            if value.shape != array.row_shape:
                raise ValueError(f"{array.name} at step {step}: shape {value.shape}, planned {array.row_shape}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise NonFiniteRow(f"{array.name} at step {step} is not finite")
            checked[array.variable.name] = value
        return checked

    def commit(self, checkpoint: bytes, **facts: Any) -> None:
        """Publish all pending rows together with the checkpoint that continues after them.

        Args:
            checkpoint: bytes that `checkpoint()` gives back after this commit.
            facts: further entries of the heartbeat.
        """
        commits = self._attrs["commits"]
        lengths = {group: length + len(self._pending[group]) for group, length in self._lengths.items()}
        with self._publishing():
            for group, rows in self._pending.items():
                if lengths[group] > self._capacity[group]:
                    self._set_capacity({group: 2 * lengths[group]})
                for array in self._arrays[group]:
                    values = [row[array.variable.name] for row in rows]
                    for key, data in array.chunk_files(self._lengths[group], values):
                        self.directory.put(key, data)
            # Two names in turn: the checkpoint of the last commit must stay until the next record is out.
            name = f"checkpoint-{commits % 2}.safetensors"
            self.directory.put(name, checkpoint)
            entry = {"name": name, "digest": blake(checkpoint).hex()}
            self._publish(lengths, commits=commits + 1, checkpoint=entry)
            for rows in self._pending.values():
                rows.clear()
            self.pending_bytes = 0
        self.heartbeat("running", **facts)

    def finish(self, status: str, reason: str) -> None:
        """Close the run with its final status; everything pending must be committed. Repeatable."""
        if self.pending_bytes:
            raise ValueError("rows are waiting: commit them before the run is finished")
        with self._publishing():
            self._set_capacity(self._lengths)
            # The record last: a run that says it is finished has every copy of its metadata right.
            self._publish(self._lengths, record_last=True, status=status, stop_reason=reason)
        self.heartbeat(status)

    def reopen(self, capacity: Mapping[str, int]) -> None:
        """Take up a finished run again: its study now asks for more steps or a smaller loss."""
        with self._publishing():
            # Before any array is planned longer: one that opens without the record must be a growing run's.
            self._publish(self._lengths, status="running", stop_reason=None)
            self._reserve({group: self._lengths[group] + rows for group, rows in capacity.items()})

    def note(self, **attrs: Any) -> None:
        """Set further root attributes; they are published with the next commit."""
        self._attrs |= zarr3.as_stored(attrs)

    def heartbeat(self, status: str, **facts: Any) -> None:
        """Say how the run stands, for `status` and progress bars; also a witness of the last commit."""
        beat = {
            "run": self._attrs["run"],
            "status": status,
            "last_step": self._attrs["last_step"],
            "commits": self._attrs["commits"],
            "head": self._attrs["head"],
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
            "elapsed": time.monotonic() - self._started,
            **facts,
        }
        if self._lease.still_held():  # it is the new holder's otherwise
            self.directory.put(HEARTBEAT, zarr3.to_json(beat), durable=False)

    def close(self) -> None:
        """Give the run back to whoever wants to write it; rows that were not committed are lost."""
        self._lease.release()

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Once a publication has failed it is unknown which record is out: only opening the run again can tell."""
        if self._broken:
            raise NtkEosError(f"an earlier commit of {self.directory.path} failed: open the run again to go on")
        if not self._lease.still_held():
            raise RunLocked(f"{self.directory.path} was taken over by another process, as its lease was not renewed")
        self._broken = True
        yield
        self._broken = False

    def _publish(self, lengths: dict[str, int], *, record_last: bool = False, **changes: Any) -> None:
        """Make the data durable, then replace the commit record, then the copies for readers of single groups."""
        attrs = {**self._attrs, **changes, "head": self._head.hex()}
        root, groups = _documents(attrs, self._arrays, lengths, self._static)
        stages = [{RECORD: root}, {f"{group}/{RECORD}": document for group, document in groups.items()}]
        self.directory.sync()
        for documents in reversed(stages) if record_last else stages:
            for key, document in documents.items():
                self.directory.put(key, zarr3.to_json(document))
            self.directory.sync()
        self._attrs, self._lengths = attrs, lengths

    def _fence(self) -> None:
        """Where a lease can run out, replace the record: whoever held the lease before can then publish nothing more.

        That writer may still run. A PUT of the record names the version that it replaces, and its own is gone now.
        """
        if self._lease.token is not None:
            self._attrs["lease"] = self._lease.token
            root, _ = _documents(self._attrs, self._arrays, self._lengths, self._static)
            self.directory.put(RECORD, zarr3.to_json(root))
            self.directory.sync()

    def _reserve(self, capacity: Mapping[str, int]) -> Self:
        """Plan for at least so many rows; the committed length is all that readers see."""
        self._set_capacity({group: rows for group, rows in capacity.items() if rows > self._capacity[group]})
        return self

    def _set_capacity(self, capacity: Mapping[str, int]) -> None:
        for group, rows in capacity.items():
            for array in self._arrays[group]:
                self.directory.put(f"{array.name}/{RECORD}", zarr3.to_json(array.document(rows)))
            self._capacity[group] = rows

    def _restore_tails(self, run: Run) -> Self:
        """Load the shared chunks that are not full, so that the next rows join those already committed."""
        for group, arrays in self._arrays.items():
            length = self._lengths[group]
            for array in arrays:
                per_chunk = array.chunks[0]
                if length % per_chunk:
                    start = length - length % per_chunk
                    array.tail = zarr3.padded(run.read(array.name, start, length), array.chunks)
        return self


def relabel(run: Run, attrs: Document) -> None:
    """Publish other descriptive attributes of a finished run: a title, a list of claims.

    Raises:
        RunLocked: if another process writes the run.
    """
    attrs = zarr3.as_stored(attrs)
    if attrs == {name: run.attrs.get(name) for name in attrs}:
        return
    directory = door(run.path)
    with directory.lease(LEASE, holder()) as lease:
        run = read_run(run.path)
        elapsed = run.heartbeat.get("elapsed")
        writer = Writer(directory, lease, run)
        writer.note(**attrs)
        writer.finish(run.attrs["status"], run.attrs["stop_reason"])
        writer.heartbeat(run.attrs["status"], elapsed=elapsed)


def _growing(group: str, variable: Variable, node: Document) -> _Array:
    chunks = tuple(node["chunk_grid"]["configuration"]["chunk_shape"])
    return _Array(group, variable, np.dtype(node["data_type"]), tuple(node["shape"][1:]), chunks, node["attributes"])


def _planned(
    groups: Mapping[str, Iterable[str]], dims: Mapping[str, int], dtype: str, attributes: Mapping[str, Document]
) -> dict[str, list[_Array]]:
    """The growing arrays of a new run."""
    arrays: dict[str, list[_Array]] = {group: [] for group in groups}
    for group, names in groups.items():
        for variable in schema.row_variables(group, names):
            kind = np.dtype(dtype if variable.dtype == "model" else variable.dtype)
            shape = tuple(16 if dim == "byte" else dims[dim] for dim in variable.dims[1:])
            chunks = schema.chunk_shape(variable, (1, *shape), kind.itemsize)
            extra = attributes.get(f"{group}/{variable.name}", {})
            arrays[group].append(_Array(group, variable, kind, shape, chunks, _attributes(variable, group) | extra))
    return arrays


def _differing(planned: Mapping[str, list[_Array]], stored: Mapping[str, list[_Array]]) -> str:
    """What a run holds that its plan does not, or a group that only the plan has; empty if they fit."""
    rows = {array.name: (array.dtype, array.row_shape) for members in planned.values() for array in members}
    names = [array.name for members in stored.values() for array in members
             if rows.get(array.name) != (array.dtype, array.row_shape)]  # fmt: skip
    return ", ".join([*names, *sorted(set(planned) - set(stored))][:3])


def _documents(
    attrs: Document,
    arrays: Mapping[str, list[_Array]],
    lengths: Mapping[str, int],
    static: Mapping[str, Document],
) -> tuple[Document, dict[str, Document]]:
    """The root record and the record of each growing group, at the committed lengths."""
    nodes = dict(static)
    groups = {}
    for group, members in arrays.items():
        children = {array.variable.name: array.document(lengths[group]) for array in members}
        groups[group] = zarr3.group_document({"run": attrs["run"]}, children)
        nodes[group] = zarr3.group_document({"run": attrs["run"]})
        nodes |= {f"{group}/{name}": document for name, document in children.items()}
    root = zarr3.group_document({**attrs, "lengths": dict(lengths)}, nodes)
    root["attributes"]["record"] = _record_digest(root)
    return root, groups


def _build(
    directory: Door, *, attrs: Document, arrays: Mapping[str, list[_Array]], probe: Mapping[str, NDArray[Any]]
) -> None:
    """Write an empty run; its record, which makes it one, comes last."""
    for array in (array for members in arrays.values() for array in members):
        directory.put(f"{array.name}/{RECORD}", zarr3.to_json(array.document(0)))
    children = {
        name: _write_static(directory, f"probe/{name}", (schema.PROBE | schema.TEST_PROBE)[name], values)
        for name, values in probe.items()
    }
    directory.put(f"probe/{RECORD}", zarr3.to_json(zarr3.group_document({}, children)))
    static = {"probe": zarr3.group_document({})} | {f"probe/{name}": node for name, node in children.items()}
    root, records = _documents(attrs, arrays, dict.fromkeys(arrays, 0), static)
    try:
        check_record(root)
    except DamagedStore as error:
        raise InputError(f"run {attrs['run']} cannot be recorded: {error}") from error
    for group, document in records.items():
        directory.put(f"{group}/{RECORD}", zarr3.to_json(document))
    directory.sync()
    directory.put(RECORD, zarr3.to_json(root))


def _write_static(directory: Door, name: str, variable: Variable, values: NDArray[Any]) -> Document:
    features = values.ndim - len(variable.dims)
    dims = variable.dims + (("feature",) if features == 1 else tuple(f"feature_{axis}" for axis in range(features)))
    chunks = schema.chunk_shape(
        Variable(**{**vars(variable), "rows_per_chunk": None}), (1, *values.shape), values.itemsize
    )[1:]
    document = zarr3.array_document(values.shape, values.dtype, chunks, dims, _attributes(variable, "probe"))
    for index, block in zarr3.split(values, chunks):
        directory.put(f"{name}/{zarr3.chunk_key(index)}", zarr3.encode(block))
    directory.put(f"{name}/{RECORD}", zarr3.to_json(document))
    return document


def _attributes(variable: Variable, group: str) -> Document:
    """CF attributes; `coordinates` makes xarray promote the per-row values that are not data of this group."""
    attributes = {"units": variable.units, "long_name": variable.long_name, "description": variable.description}
    rows = [name for name in schema.ROW if name != "step" and name not in schema.GROUPS.get(group, {})]
    if variable.name not in schema.ROW and group != "probe":
        attributes["coordinates"] = " ".join(rows)
    return attributes


def holder() -> bytes:
    """What a lease says of the process that holds it."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} since {since}".encode()
