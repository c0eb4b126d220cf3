"""Repair: remove what killed writers left behind, and never a byte that was committed.

Three things are left: files half written (hidden temporary names), runs half made (`.new-*`), and chunks of rows whose
commit never came. No reader sees any of them, and a run that goes on replaces its own; this is for those that do not.

What is debris follows from the commit record alone, so a run whose record may not be its newest is left as it is: the
rows of the newer one would look like debris.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from pipeline.disk import CREATING, NEW, TEMPORARY, Directory, Location
from pipeline.errors import InputError, NtkEosError, RunLocked
from pipeline.store import LEASE, Run, find_path, holder, read_run, run_paths, runs_directory
from pipeline.verify import verify

CHUNK = re.compile(r"c(\.[0-9]+)+")


@dataclass(frozen=True)
class Debris:
    """Something that repair removes, or a run that it leaves alone.

    Attributes:
        path: the file, the folder of a run half made, or that of the run.
        size: its bytes; None for a run that is left alone.
        what: what it is, or why the run is left alone.
    """

    path: Location
    size: int | None
    what: str


def repair_root(root: str | os.PathLike[str], run_ids: Iterable[str] = (), *, apply: bool = False) -> list[Debris]:
    """Find the debris of a store, and remove it if asked to.

    Args:
        root: folder of the store.
        run_ids: names of runs or unique beginnings of them; by default all, and the runs half made.
        apply: remove it.

    Returns:
        What is, or was, there to remove, and the runs that were left alone because another process writes them or
        they are damaged.

    Raises:
        MissingError: if there is no store, or no run of that name.
        InputError: if the root is not a store, or is on an object store.
    """
    runs = runs_directory(root)
    if not isinstance(runs, Directory):
        raise InputError(
            f"{root} is on an object store, of which repair removes nothing: a writer whose lease ran out may still "
            "commit the rows that look like debris, and a run that goes on replaces what its killed writer left"
        )
    paths = [find_path(root, run_id) for run_id in run_ids]
    found = [] if paths else _half_made(runs, apply)
    for path in paths or run_paths(root):
        try:
            found += _repair_run(path, apply)
        except NtkEosError as error:
            found.append(Debris(path, None, f"left alone: {error}"))
    return found


def _half_made(runs: Directory, apply: bool) -> list[Debris]:
    """Folders of runs that were never renamed in; whoever makes one holds the lock, so those of the dead are left."""
    if not any(runs.path.glob(f"{NEW}*")):
        return []
    if not apply and runs.leased(CREATING):
        return []
    with runs.lease(CREATING, holder(), wait=True) if apply else nullcontext():
        found = [
            Debris(folder, _bytes(Directory(folder)), "a run half made") for folder in sorted(runs.path.glob(f"{NEW}*"))
        ]
        for debris in found if apply else ():
            runs.delete(debris.path.name)
    return found


def _bytes(directory: Directory) -> int:
    return sum(directory.size(key) or 0 for key in directory.list(hidden=True))


def _repair_run(path: Location, apply: bool) -> list[Debris]:
    directory = Directory(path)
    if not apply and directory.leased(LEASE):
        raise RunLocked("another process writes it")
    with directory.lease(LEASE, holder()) if apply else nullcontext():
        run = read_run(path)
        damage = next((problem for problem in verify(run) if problem.damage), None)
        if damage:
            return [Debris(path, None, f"left alone: {damage.where}: {damage.what}")]
        found = {key: Debris(path / key, directory.size(key) or 0, what) for key, what in _debris(run)}
        for key in found if apply else ():
            directory.delete(key)
    return list(found.values())


def _debris(run: Run) -> Iterator[tuple[str, str]]:
    """Keys of temporary files, and of chunks beyond the committed length of an array that the record has."""
    growing = {f"{group}/{name}": node for group in run.lengths for name, node in run.arrays(group).items()}
    for key in Directory(run.path).list(hidden=True):
        folder, _, name = key.rpartition("/")
        if name.startswith(TEMPORARY):
            yield key, "a file half written"
        elif folder in growing and CHUNK.fullmatch(name):
            node = growing[folder]
            first = int(name.split(".")[1]) * node["chunk_grid"]["configuration"]["chunk_shape"][0]
            if first >= node["shape"][0]:
                yield key, "a chunk of rows that were never committed"
