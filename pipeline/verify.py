"""Verify: does the folder of a run still hold what was committed?

A quick look compares names, sizes and metadata with the commit record. A deep one decodes every chunk and recomputes

    values -> row digest, stored beside the row -> chain of digests from the run's seed -> head, in the record

so that it also finds a chunk that is whole but is not the one that was committed. Damage to one row is named and does
not stop the rest. A run may be written meanwhile: only its committed rows are looked at.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from pipeline import schema, zarr3
from pipeline.disk import Directory, Location, door
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.store import (
    FINAL,
    HEARTBEAT,
    LEASE,
    RECORD,
    InChunks,
    Run,
    add_to_digest,
    blake,
    chain_seed,
    find_path,
    heartbeat,
    read_run,
    run_paths,
)
from pipeline.zarr3 import Document

CHECKPOINTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
# A writer commits every few seconds, so a run that stands still for one of these looks is judged.
LOOKS = 5
# What is wrong with the bytes, and not with the way to them.
UNREADABLE = (MissingError, InputError, DamagedStore)


@dataclass(frozen=True)
class Problem:
    """Something about a run that is not as its commit left it.

    Attributes:
        where: the run and the file, array or rows.
        what: what was found there.
        mend: what to do about it.
        damage: whether committed data are affected; otherwise it is a note.
    """

    where: str
    what: str
    mend: str
    damage: bool = True


def verify_root(
    root: str | os.PathLike[str],
    run_ids: Iterable[str] = (),
    *,
    deep: bool = False,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> list[Problem]:
    """Check runs of a store.

    Args:
        root: folder of the store.
        run_ids: names of runs or unique beginnings of them; all runs by default.
        deep: recompute every digest from the bytes on disk.
        progress: told the fraction done and the run that is being checked.

    Raises:
        MissingError: if there is no store, or no run of that name.
        InputError: if the root is not a store.
        UnreachableStore: if an object store does not answer, which says nothing of what it holds.
    """
    paths = [find_path(root, run_id) for run_id in run_ids] or run_paths(root)
    problems: list[Problem] = []
    for number, path in enumerate(paths):
        try:
            run = read_run(path)
        except InputError as error:
            problems.append(Problem(f"{path.stem}/{RECORD}", str(error), "install that version to verify it", False))
            continue
        except (MissingError, DamagedStore) as error:
            problems.append(Problem(f"{path.stem}/{RECORD}", str(error), _mend(path)))
            continue
        try:
            problems += verify(run, deep, progress=partial(_share, progress, number, len(paths), path.stem))
        except UNREADABLE as error:
            problems.append(Problem(run.run_id, str(error), _mend(path)))
    return problems


def _share(progress: Callable[[float, str], None], done: int, count: int, note: str, part: float) -> None:
    progress((done + part) / count, note)


def verify(run: Run, deep: bool = False, *, progress: Callable[[float], None] = lambda fraction: None) -> list[Problem]:
    """Check one run against its commit record.

    Args:
        run: the run; reading it has checked the record against its own digest already.
        deep: decode every chunk and recompute every digest.
        progress: told the fraction done.
    """
    problems = [*_settled(run, deep), *_missing(run)]
    if deep:
        problems += [*_rows_and_chain(run, progress), *_debris(run)]
    # A missing file is found again when its rows are read.
    return list({problem.where: problem for problem in reversed(problems)}.values())[::-1]


def _mend(path: Location) -> str:
    return (
        f"restore it from a copy of the store, or delete {path} and run its study again: it is recorded with the same "
        "numbers"
    )


# --- files that each commit replaces ---------------------------------------------------------------------------------


def _settled(run: Run, deep: bool) -> list[Problem]:
    """Problems of the files that each commit replaces, seen while the record stood still."""
    problems: list[Problem] = []
    for _ in range(LOOKS):
        problems = [*_witness(run), *_checkpoint(run, deep), *_copies(run)]
        if not problems:
            break
        now = read_run(run.path)
        if now.attrs["record"] == run.attrs["record"]:
            break
        run = now
    return problems


def _witness(run: Run) -> Iterator[Problem]:
    """The heartbeat knows of no later commit: an older record that was put back is a record like any other."""
    beat, attrs = heartbeat(run.path), run.attrs
    said = beat.get("commits")
    if not isinstance(said, int):
        return
    if said > attrs["commits"] or (said == attrs["commits"] and beat.get("head", run.head) != run.head):
        yield Problem(
            f"{run.run_id}/{RECORD}",
            f"the record is of commit {attrs['commits']}, head {run.head}, but {HEARTBEAT} has seen commit {said}, "
            f"head {beat.get('head')}: an older or foreign {RECORD} was put here",
            f"put the newest {RECORD} back, or delete {run.path} and run its study again",
        )


def _checkpoint(run: Run, deep: bool) -> Iterator[Problem]:
    entry = run.attrs["checkpoint"]
    if entry is None:
        return
    directory, where = door(run.path), f"{run.run_id}/{entry['name']}"
    if directory.size(entry["name"]) is None:
        yield Problem(where, "the checkpoint of the last commit does not exist", _mend(run.path))
    elif deep:
        try:
            digest = blake(directory.get(entry["name"])).hex()
        except UNREADABLE as error:
            yield Problem(where, str(error), _mend(run.path))
        else:
            if digest != entry["digest"]:
                yield Problem(where, "it is not the checkpoint that was committed", _mend(run.path))


def _copies(run: Run) -> Iterator[Problem]:
    """The documents of groups and arrays say what the record says of them.

    Those of a finished run are equal to it. While a run grows, the document of an array has the planned length, and
    that of a group may be one commit behind.
    """
    final = run.attrs["status"] in FINAL
    for group in ("probe", *run.lengths):
        nodes = run.arrays(group)
        growing = group != "probe"
        attrs = {"run": run.run_id} if growing else {}
        documents = {f"{group}/{name}": node for name, node in nodes.items()}
        for key, expected in {**documents, group: zarr3.group_document(attrs, nodes)}.items():
            try:
                found = json.loads(door(run.path).get(f"{key}/{RECORD}"))
            except (*UNREADABLE, ValueError, RecursionError) as error:
                yield Problem(f"{run.run_id}/{key}/{RECORD}", str(error), _mend(run.path))
                continue
            if growing and not final:
                expected = _at_its_length(found, expected)
            if found != expected:
                yield Problem(
                    f"{run.run_id}/{key}/{RECORD}", f"differs from what the run's {RECORD} says of it", _mend(run.path)
                )


def _at_its_length(found: Any, expected: Document) -> Document:
    """`expected` with the lengths that `found` has, as far as a growing run may have them."""
    try:
        if expected["node_type"] == "array":
            return {**expected, "shape": [int(found["shape"][0]), *expected["shape"][1:]]}
        nodes = expected["consolidated_metadata"]["metadata"]
        lengths = {name: int(found["consolidated_metadata"]["metadata"][name]["shape"][0]) for name in nodes}
        if any(length > nodes[name]["shape"][0] for name, length in lengths.items()) or len(set(lengths.values())) > 1:
            return expected
        behind = {name: {**node, "shape": [lengths[name], *node["shape"][1:]]} for name, node in nodes.items()}
        return {**expected, "consolidated_metadata": {**expected["consolidated_metadata"], "metadata": behind}}
    except (KeyError, TypeError, ValueError, IndexError):
        return expected


# --- files that stay -------------------------------------------------------------------------------------------------


def _arrays(run: Run) -> Iterator[tuple[str, Document]]:
    for group in ("probe", *run.lengths):
        yield from ((f"{group}/{name}", node) for name, node in run.arrays(group).items())


def _chunks(node: Document) -> tuple[int, ...]:
    return tuple(node["chunk_grid"]["configuration"]["chunk_shape"])


def _missing(run: Run) -> Iterator[Problem]:
    """Every chunk that the committed lengths need is there and has bytes."""
    sizes = {entry.key: entry.size for entry in door(run.path).entries()}
    for name, node in _arrays(run):
        chunks = _chunks(node)
        for index in zarr3.grid(tuple(node["shape"]), chunks):
            key = f"{name}/{zarr3.chunk_key(index)}"
            size = sizes.get(key)
            if not size:
                stop = min((index[0] + 1) * chunks[0], node["shape"][0])
                what = f"{run.path / key} {'does not exist' if size is None else 'is empty'}"
                yield Problem(_place(run, name, index[0] * chunks[0], stop), what, _mend(run.path))


def _place(run: Run, name: str, start: int, stop: int) -> str:
    """Rows `start` to `stop` of an array or group, named by their steps if these can be read."""
    group = name.partition("/")[0]
    if group == "probe":
        return f"{run.run_id}/{name}"
    kind, ends = "row", [start, stop - 1]
    try:
        steps = run.read(f"{group}/step", start, stop)
        kind, ends = "step", [int(steps[0]), int(steps[-1])]
    except DamagedStore:
        pass
    at = f"{kind} {ends[0]}" if stop - start == 1 else f"{kind}s {ends[0]} to {ends[1]}"
    return f"{run.run_id}/{name} at {at}"


def _rows_and_chain(run: Run, progress: Callable[[float], None]) -> Iterator[Problem]:
    """Recompute the digest of every row from its values, and the head from the seed and the digests."""
    total, done = sum(run.lengths.values()), 0
    links: list[tuple[int, str, bytes]] = []
    for group in run.lengths:
        variables = schema.row_variables(group, run.arrays(group))
        columns = [_column(run, f"{group}/{variable.name}", variable) for variable in variables]
        for number, values in enumerate(zip(*columns, strict=True)):
            row = dict(zip((variable.name for variable in variables), values, strict=True))
            damaged = {name: value for name, value in row.items() if isinstance(value, Problem)}
            stored = None if "digest" in damaged else row["digest"].tobytes()
            hashed = hashlib.blake2b(digest_size=16)
            for variable in variables:
                if not variable.volatile and variable.name not in damaged:
                    try:
                        add_to_digest(hashed, group, variable.name, row[variable.name])
                    except DamagedStore as error:
                        where = _place(run, f"{group}/{variable.name}", number, number + 1)
                        damaged[variable.name] = Problem(where, str(error), _mend(run.path))
            yield from damaged.values()
            whole = not any(variable.name in damaged for variable in variables if not variable.volatile)
            measured = hashed.digest() if whole else None
            if None not in (stored, measured) and stored != measured:
                what = "the values are not those that were committed: their digest differs"
                yield Problem(_place(run, group, number, number + 1), what, _mend(run.path))
            # Where the values are gone the stored digest still carries the chain, and the other way round.
            link = stored or measured
            if link is not None and "step" not in damaged:
                links.append((int(row["step"]), group, link))
            done += 1
            progress(done / total)
    seed = bytes.fromhex(run.attrs["seed_digest"])
    probe = {}
    for name in run.arrays("probe"):
        try:
            probe[name] = run.read(f"probe/{name}")
        except DamagedStore as error:
            yield Problem(f"{run.run_id}/probe/{name}", str(error), _mend(run.path))
    if probe.keys() == run.arrays("probe").keys() and chain_seed(run.attrs["identity"], probe) != seed:
        what = "the examples are not those that the run was measured on: their digest differs"
        yield Problem(f"{run.run_id}/probe", what, _mend(run.path))
    head = seed
    for _, _, digest in sorted(links):
        head = blake(head, digest)
    if len(links) == total and head.hex() != run.head:
        what = f"the digests of its rows chain to {head.hex()}, not to the head {run.head}: rows were replaced or moved"
        yield Problem(f"{run.run_id}/digest", what, _mend(run.path))


def _column(run: Run, name: str, variable: schema.Variable) -> Iterator[NDArray[Any] | InChunks | Problem]:
    """Rows of an array one by one; for each row of a damaged chunk, the same problem.

    A row that owns its chunks may be larger than memory and is left in them.
    """
    node = run.node(name)
    length, per_chunk = node["shape"][0], _chunks(node)[0]
    if variable.rows_per_chunk is None:
        yield from (run.in_chunks(name, row) for row in range(length))
        return
    for start in range(0, length, per_chunk):
        stop = min(start + per_chunk, length)
        try:
            yield from run.read(name, start, stop)
        except DamagedStore as error:
            problem = Problem(_place(run, name, start, stop), str(error), _mend(run.path))
            yield from (problem for _ in range(start, stop))


def _debris(run: Run) -> Iterator[Problem]:
    """Files that no commit names, in a run that nobody writes: what a killed writer left, or somebody else put."""
    directory = door(run.path)
    if directory.leased(LEASE):
        return
    known = {RECORD, LEASE, HEARTBEAT, *CHECKPOINTS, *(f"{group}/{RECORD}" for group in ("probe", *run.lengths))}
    for name, node in _arrays(run):
        known.add(f"{name}/{RECORD}")
        known.update(f"{name}/{zarr3.chunk_key(index)}" for index in zarr3.grid(tuple(node["shape"]), _chunks(node)))
    extra = [key for key in directory.list(hidden=True) if key not in known]
    if extra:
        shown = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
        mend = "nothing to do: no reader sees them, and a run that goes on replaces what its killed writer left"
        if isinstance(directory, Directory):
            mend += f"; `ntk-eos repair {run.path.parent.parent}` shows which of them can be removed"
        yield Problem(run.run_id, f"{len(extra)} files that no commit names: {shown}", mend, damage=False)
