"""The disk is full after so many bytes: what was committed is there, and with more room the run ends with its head.

Two disks run out. One counts what `pipeline.disk` writes and fails in the middle of a file, so that its size can be any
number; what was written of the file stays until somebody removes it. The other is a small file system in memory, where
the kernel lets one be mounted.
"""

import errno
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faulty_disk import OtherWrite, attempt, no_fsync, opening_with
from sizes import sizes
from writer_loop import RUN, assert_rows_are_those_of_their_steps, planned_rows, record

from pipeline.errors import InputError, MissingError
from pipeline.repair import repair_root
from pipeline.store import find_run
from pipeline.verify import verify

GROUPS = {"snapshots": ["ntk"], "spectra": ["eigenvalue", "prediction"], "train": ["loss"]}
MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]


class Quota:
    """Room for so many bytes below a folder.

    Attributes:
        struck: how often there was not enough.
        highs: what was needed whenever that was more than ever before.
    """

    def __init__(self, root: Path, room: float = math.inf) -> None:
        self.root, self.room, self.struck, self.highs = root, room, 0, [0]

    def used(self) -> int:
        return sum(os.path.getsize(Path(folder, name)) for folder, _, names in os.walk(self.root) for name in names)

    def open(self, path, mode):
        file = open(path, mode)
        write = file.write

        def limited(data):
            left = max(0, self.room - self.used())
            if len(data) <= left:
                self.highs += [need for need in [self.used() + len(data)] if need > self.highs[-1]]
                return write(data)
            self.struck += 1
            write(data[:left])
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return OtherWrite(file, limited)

    @contextmanager
    def on(self):
        with opening_with(self.open):
            yield self


def rows_lost(root: Path, committed: list[int]) -> int:
    """Rows whose commit returned and that are not there; those that are there are right."""
    try:
        run = find_run(root, RUN)
    except (MissingError, InputError):
        return sum(planned_rows(group, max(committed, default=0)) for group in GROUPS)
    assert_rows_are_those_of_their_steps(run)
    assert [problem for problem in verify(run, deep=True) if problem.damage] == []
    return sum(max(0, planned_rows(g, max(committed, default=0)) - rows) for g, rows in run.lengths.items())


@sizes("offsets", short=3, full=20)
def test_a_disk_that_is_full_after_any_number_of_bytes(tmp_path, measured, offsets):
    with no_fsync():
        with Quota(tmp_path / "whole").on() as whole:
            record(whole.root, GROUPS, [])
        head = find_run(whole.root, RUN).head
        lost = committed_rows = 0
        steps = np.linspace(len(whole.highs) // 3, len(whole.highs) - 2, offsets).astype(int)
        for number, step in enumerate(steps):
            room = (
                sum(whole.highs[step : step + 2]) // 2
            )  # it ends within the file that takes it from one high to the next
            root, committed = tmp_path / str(number), []
            root.mkdir()
            with Quota(root, room).on() as quota:
                error = attempt(root, GROUPS, committed)
                assert quota.struck > 0
                assert os.strerror(errno.ENOSPC) in error
                lost += rows_lost(root, committed)
                committed_rows += sum(planned_rows(group, max(committed, default=0)) for group in GROUPS)
                # Started again without more room: it fails again, or ends, and loses as little.
                attempt(root, GROUPS, committed)
                lost += rows_lost(root, committed)
            record(root, GROUPS, committed)
            run = find_run(root, RUN)
            assert run.head == head
            assert verify(run, deep=True) == []
            assert repair_root(root) == []
            shutil.rmtree(root)
    assert lost == 0
    assert committed_rows > 0
    measured("R9", "disk full in the middle of a file", offsets=offsets, rows_committed_before=committed_rows,
             rows_lost=lost, equal_heads=offsets)  # fmt: skip


def fill(folder: str, pages: str) -> None:
    """Record on a file system of a few pages, that gets some more each time it is full; prints how often it was.

    Its mount is this process's own and goes with it.
    """
    root, committed, kib, full = Path(folder) / "store", [], 40, 0
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder], check=True)
    with no_fsync():
        while error := attempt(root, GROUPS, committed):
            assert os.strerror(errno.ENOSPC) in error, error
            assert not committed or rows_lost(root, committed) == 0
            full, kib = full + 1, kib + 4 * int(pages)
            subprocess.run(["mount", "-o", f"remount,size={kib}k", folder], check=True)
    run = find_run(root, RUN)
    assert verify(run, deep=True) == []
    print(full, run.head)


def may_mount() -> bool:
    """Whether a process may have mounts of its own here."""
    return shutil.which(MOUNT[0]) is not None and not subprocess.run([*MOUNT, "true"], capture_output=True).returncode


@pytest.mark.skipif(not may_mount(), reason="the kernel lets nobody mount a file system here")
@sizes("pages", short=16, full=1)
def test_a_small_file_system_that_is_full_again_and_again(tmp_path, measured, pages):
    with no_fsync():
        record(tmp_path / "whole", GROUPS, [])
    (tmp_path / "small").mkdir()
    command = [*MOUNT, sys.executable, __file__, str(tmp_path / "small"), str(pages)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    full, head = done.stdout.split()
    assert int(full) > 3
    assert head == find_run(tmp_path / "whole", RUN).head
    assert list((tmp_path / "small").iterdir()) == []
    measured("R9", "tmpfs that is full again and again", full=int(full), rows_lost=0, equal_heads=1)


if __name__ == "__main__":
    fill(*sys.argv[1:])
