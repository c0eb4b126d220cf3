"""The power fails after any operation: what was not synced may be there, be gone or be empty, in any mixture.

A disk in memory follows the operations of `pipeline.disk` as POSIX promises them: a name is durable after an fsync of
its folder, bytes after an fsync of their file. It is then written out as one of the states that a cut may leave.
"""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faulty_disk import OtherWrite, opening_with
from sizes import sizes
from writer_loop import RUN, assert_rows_are_those_of_their_steps, planned_rows, record

from pipeline.errors import InputError, MissingError
from pipeline.store import find_run
from pipeline.verify import verify


@dataclass
class File:
    """Bytes now, and bytes at the last fsync."""

    now: bytes = b""
    synced: bytes | None = None

    def sync(self) -> None:
        self.synced = self.now

    def write_out(self, path: Path, keep: Any) -> None:
        path.write_bytes(self.now if self.synced == self.now or keep() else self.synced or b"")


@dataclass
class Folder:
    """Names now, and names at the last fsync."""

    now: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)

    def sync(self) -> None:
        self.synced = dict(self.now)

    def write_out(self, path: Path, keep: Any) -> None:
        path.mkdir()
        for name in sorted({*self.now, *self.synced}):
            old, new = self.synced.get(name), self.now.get(name)
            node = new if old is new or keep() else old
            if node is not None:
                node.write_out(path / name, keep)


class Disk:
    """Follows the calls that change a folder, and asks after each whether the power fails there."""

    def __init__(self, root: Path, cut: Any) -> None:
        self.root, self.tree, self.cut, self.operations = root, Folder(), cut, 0
        self.handles: dict[int, Any] = {}

    def node(self, path: str | os.PathLike[str]) -> Any:
        node = self.tree
        for part in Path(path).relative_to(self.root).parts:
            node = node.now[part]
        return node

    def put(self, path: str | os.PathLike[str], node: Any) -> None:
        self.node(Path(path).parent).now[Path(path).name] = node

    def done(self) -> None:
        self.operations += 1
        self.cut(self)

    def below(self, path: Any) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self.root)

    @contextmanager
    def watching(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("mkdir", "open", "replace", "rename", "pwrite", "unlink")}

        def mkdir(path, *rest, **options):
            real["mkdir"](path, *rest, **options)
            if self.below(path):
                self.put(path, Folder())
                self.done()

        def open_handle(path, flags, *rest, **options):
            handle = real["open"](path, flags, *rest, **options)
            if self.below(path):
                if flags & os.O_CREAT and Path(path).name not in self.node(Path(path).parent).now:
                    self.put(path, File())
                self.handles[handle] = self.node(path)
            return handle

        def open_file(path, mode):
            file = open(path, mode)
            if self.below(path):
                self.put(path, File())
                self.handles[file.fileno()] = self.node(path)
                write = file.write

                def recording(data):
                    self.node(path).now += data
                    return write(data)

                return OtherWrite(file, recording)
            return file

        def fsync(handle):
            self.handles[handle].sync()
            self.done()

        def move(source, target):
            real["replace"](source, target)
            node = self.node(Path(source).parent).now.pop(Path(source).name)
            self.put(target, node)
            self.done()

        def pwrite(handle, data, offset):
            self.handles[handle].now = data
            return real["pwrite"](handle, data, offset)

        def unlink(path, **options):
            real["unlink"](path, **options)
            if self.below(path):
                del self.node(Path(path).parent).now[Path(path).name]
                self.done()

        with ExitStack() as stack:
            for name, stand_in in {"mkdir": mkdir, "open": open_handle, "fsync": fsync, "replace": move, "rename": move,
                                   "pwrite": pwrite, "unlink": unlink}.items():  # fmt: skip
                stack.enter_context(patch.object(os, name, stand_in))
            stack.enter_context(opening_with(open_file))
            yield


def write_out(tree: Folder, path: Path, keeps: str, dice: random.Random) -> None:
    """Write one of the states that a cut may leave."""
    if keeps == "nothing that was not synced":
        tree.write_out(path, lambda: False)
    elif keeps == "some of it":
        tree.write_out(path, lambda: dice.random() < 0.5)
    else:
        tree.write_out(path, lambda: True)
        for file, node in walk(tree, path):
            if node.synced != node.now:
                file.write_bytes(b"")


def walk(folder: Folder, path: Path) -> Iterator[tuple[Path, File]]:
    for name, node in folder.now.items():
        if isinstance(node, Folder):
            yield from walk(node, path / name)
        else:
            yield path / name, node


KEPT = ("nothing that was not synced", "some of it", "all names, but no bytes that were not synced")


@sizes(
    "groups, share",
    short=({"spectra": ["prediction"]}, 0.12),
    full=({"spectra": ["eigenvalue", "prediction"], "train": ["loss"]}, 1.0),
)
def test_what_was_committed_survives_a_power_cut_at_any_operation(tmp_path, measured, groups, share):
    dice = random.Random(0)
    committed: list[int] = []

    def cut(disk):
        """Keep the states that this moment could leave; the run goes on."""
        if dice.random() > share:
            return
        for kept in KEPT:
            states.append((disk.operations, kept, list(committed)))
            write_out(disk.tree, tmp_path / f"{len(states)}", kept, dice)

    states: list[tuple[int, str, list[int]]] = []
    (tmp_path / "live").mkdir()
    watched = Disk(tmp_path / "live", cut)
    with watched.watching():
        record(tmp_path / "live" / "store", groups, committed)
    head = find_run(tmp_path / "live" / "store", RUN).head
    with patch("os.fsync", lambda handle: None):
        for number, (operation, kept, acknowledged) in enumerate(states, start=1):
            root = tmp_path / str(number) / "store"
            where = f"cut after operation {operation}, keeping {kept}"
            try:
                run = find_run(root, RUN)
            except (MissingError, InputError):
                assert acknowledged == [], where
            else:
                assert all(n >= planned_rows(g, max(acknowledged, default=0)) for g, n in run.lengths.items()), where
                assert_rows_are_those_of_their_steps(run)
                assert [problem for problem in verify(run, deep=True) if problem.damage] == [], where
            record(root, groups, [])
            run = find_run(root, RUN)
            assert run.head == head, where
            assert [problem for problem in verify(run, deep=True) if problem.damage] == [], where
            shutil.rmtree(root)
    assert watched.operations > 200
    measured("R4", "a simulated disk that loses what was not synced", operations=watched.operations,
             cuts=len(states), survived=len(states))  # fmt: skip
