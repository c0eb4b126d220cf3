"""The disk fails at the first operation, at the second, ... until a run or a repair gets through: none is left out."""

import builtins
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import xarray as xr
from faulty_disk import attempt, no_fsync
from sizes import MARKS
from writer_loop import RUN, assert_rows_are_those_of_their_steps, planned_rows, record, write_run

from pipeline import disk
from pipeline.disk import Directory
from pipeline.errors import InputError, MissingError, NtkEosError
from pipeline.repair import repair_root
from pipeline.store import find_run
from pipeline.verify import verify

SMALL = {"spectra": ["prediction"]}
LARGER = {"spectra": ["prediction"], "train": ["loss"]}
WRITES = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "pwrite", "ftruncate", "unlink")]
# A file that failed to open although it did would look like one that was left open.
OPENS = [(os, "open"), (disk, "open"), (fcntl, "flock"), (Path, "read_bytes")]
REMOVALS = [(os, name) for name in ("unlink", "rmdir", "pwrite", "ftruncate")]


class Faults:
    """Lets `left` operations pass and fails the next one, before it is done or after it."""

    def __init__(self, left: int, after: bool) -> None:
        self.left, self.after, self.struck = left, after, False

    def around(self, operation: Callable) -> Callable:
        def failing(*arguments, **options):
            strike = self.left == 0
            self.left -= 1
            self.struck |= strike
            result = None if strike and not self.after else operation(*arguments, **options)
            if strike:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return result

        return failing

    @contextmanager
    def on(self, targets) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name in targets:
                operation = self.around(getattr(owner, name, None) or getattr(builtins, name))
                stack.enter_context(patch.object(owner, name, operation, create=True))
            yield


def assert_nothing_is_lost(root: Path, committed: list[int], plainly: bool) -> None:
    """Every row whose commit returned is there, every row that is there is right; also to plain xarray, if asked."""
    try:
        run = find_run(root, RUN)
    except (MissingError, InputError):
        assert not committed
        return
    assert all(length >= planned_rows(group, max(committed, default=0)) for group, length in run.lengths.items())
    assert_rows_are_those_of_their_steps(run)
    assert [problem for problem in verify(run, deep=True) if problem.damage] == []
    if not plainly:
        return
    length = run.lengths["spectra"]
    assert xr.open_zarr(run.path, group="spectra").sizes["step"] == length
    if run.status == "complete":
        assert xr.open_zarr(run.path, group="spectra", consolidated=False).sizes["step"] == length


PARAMETERS = [
    pytest.param([(Directory, "put"), (Directory, "sync")], False, SMALL, id="files-short", marks=MARKS["short"]),
    pytest.param([*WRITES, *OPENS], False, LARGER, id="system calls-full", marks=MARKS["full"]),
    pytest.param(WRITES, True, LARGER, id="system calls that fail although done-full", marks=MARKS["full"]),
]


@pytest.mark.parametrize(("targets", "after", "groups"), PARAMETERS)
def test_a_run_survives_a_failure_at_every_operation(tmp_path, measured, request, targets, after, groups):
    with no_fsync():
        record(tmp_path / "whole", groups, [])
        head = find_run(tmp_path / "whole", RUN).head
        for point in count():
            root, committed = tmp_path / str(point), []
            handles = len(os.listdir("/dev/fd"))
            faults = Faults(point, after)
            with faults.on(targets):
                error = attempt(root, groups, committed)
            assert error == "" or os.strerror(errno.ENOSPC) in error
            assert len(os.listdir("/dev/fd")) == handles, "an open file was left behind"
            assert_nothing_is_lost(root, committed, plainly=point % 5 == 0)
            record(root, groups, committed)
            assert find_run(root, RUN).head == head
            assert verify(find_run(root, RUN), deep=True) == []
            assert [path.name for path in (root / "runs").iterdir() if path.name != ".lock"] == [f"{RUN}.zarr"]
            shutil.rmtree(root)
            if not faults.struck:
                break
    assert point > 50
    case = f"creation, commit, finish and resume: {request.node.callspec.id.rpartition('-')[0]}"
    measured("R3", case, points=point, recovered=point, rows_lost=0)


@pytest.fixture
def littered(tmp_path):
    """A growing run with what killed writers leave: files half written, chunks never committed, a run half made."""
    with no_fsync():
        path = write_run(tmp_path / "littered", 11, groups=tuple(SMALL), status=None).path
    for key in ("spectra/eigenvalue/.tmp-1", "spectra/prediction/c.9.0.0", "spectra/loss/c.7", ".tmp-2"):
        (path / key).write_bytes(b"debris")
    shutil.copytree(path / "spectra", path.parent / ".new-0-lr-9.zarr" / "spectra")
    return tmp_path / "littered"


PARAMETERS = [
    pytest.param(REMOVALS, False, id="removals-short", marks=MARKS["short"]),
    pytest.param([*REMOVALS, *OPENS, (os, "scandir")], False, id="system calls-full", marks=MARKS["full"]),
    pytest.param(REMOVALS, True, id="removals that fail although done-full", marks=MARKS["full"]),
]


@pytest.mark.parametrize(("targets", "after"), PARAMETERS)
def test_repair_survives_a_failure_at_every_operation(tmp_path, littered, measured, request, targets, after):
    run = Path("runs") / f"{RUN}.zarr"
    debris = {found.path for found in repair_root(littered)}
    assert len(debris) == 5
    kept = {
        path.relative_to(littered): path.read_bytes()
        for path in (littered / run).rglob("*")
        if path.is_file() and path not in debris and path.name != "LEASE"
    }
    with no_fsync():
        head = write_run(tmp_path / "whole", 12, groups=tuple(SMALL), status=None).head
        for point in count():
            root, said = shutil.copytree(littered, tmp_path / str(point)), []
            handles = len(os.listdir("/dev/fd"))
            faults = Faults(point, after)
            with faults.on(targets), suppress(OSError, NtkEosError):
                said = repair_root(root, apply=True)
            assert len(os.listdir("/dev/fd")) == handles, "an open file was left behind"
            assert not [found.path for found in said if found.size is not None and found.path.exists()], "still there"
            assert {key: (root / key).read_bytes() for key in kept} == kept
            repair_root(root, apply=True)
            assert repair_root(root) == []
            assert {key: (root / key).read_bytes() for key in kept} == kept
            if point % 5 == 0 or not faults.struck:
                assert write_run(root, 12, groups=tuple(SMALL), status=None).head == head
                assert verify(find_run(root, RUN), deep=True) == []
            shutil.rmtree(root)
            if not faults.struck:
                break
    assert point >= len(debris)
    case = f"repair: {request.node.callspec.id.rpartition('-')[0]}"
    measured("R3", case, points=point, recovered=point, committed_files_changed=0)
