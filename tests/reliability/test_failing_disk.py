"""The disk fails at the first operation, at the second, ... until a run gets through: no point is left out."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import xarray as xr
from writer_loop import RUN, assert_rows_are_those_of_their_steps, planned_rows, record

from pipeline.disk import Directory
from pipeline.errors import InputError, MissingError
from pipeline.store import find_run
from pipeline.verify import verify

SMALL = {"spectra": ["prediction"]}
LARGER = {"spectra": ["eigenvalue", "prediction"], "train": ["loss"]}
CALLS = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "pwrite")]


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
                stack.enter_context(patch.object(owner, name, self.around(getattr(owner, name))))
            yield


def attempt(root: Path, groups: dict, committed: list[int]) -> str:
    """What `record` failed with, if it did."""
    try:
        record(root, groups, committed)
    except (OSError, InputError) as error:
        return str(error)
    return ""


def assert_nothing_is_lost(root: Path, committed: list[int]) -> None:
    """Every row whose commit returned is there, every row that is there is right."""
    try:
        run = find_run(root, RUN)
    except (MissingError, InputError):
        assert not committed
        return
    assert all(length >= planned_rows(group, max(committed, default=0)) for group, length in run.lengths.items())
    assert_rows_are_those_of_their_steps(run)
    assert [problem for problem in verify(run, deep=True) if problem.damage] == []
    length = run.lengths["spectra"]
    assert xr.open_zarr(run.path, group="spectra").sizes["step"] == length
    if run.status == "complete":
        assert xr.open_zarr(run.path, group="spectra", consolidated=False).sizes["step"] == length


PARAMETERS = [
    pytest.param([(Directory, "put"), (Directory, "sync")], False, SMALL, id="files"),
    pytest.param([*CALLS, (os, "open")], False, LARGER, id="system calls", marks=pytest.mark.reliability),
    pytest.param(CALLS, True, LARGER, id="system calls that fail although done", marks=pytest.mark.reliability),
]


@pytest.mark.parametrize(("targets", "after", "groups"), PARAMETERS)
def test_a_run_survives_a_failure_at_every_operation(tmp_path, capsys, request, targets, after, groups):
    def fsync(handle):
        """Counted, and not done: this is not about power cuts."""

    with patch("os.fsync", fsync):
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
            assert_nothing_is_lost(root, committed)
            record(root, groups, committed)
            assert find_run(root, RUN).head == head
            assert verify(find_run(root, RUN), deep=True) == []
            assert [path.name for path in (root / "runs").iterdir() if path.name != ".lock"] == [f"{RUN}.zarr"]
            if not faults.struck:
                break
    assert point > 50
    with capsys.disabled():
        print(json.dumps({"promise": f"failing disk, {request.node.callspec.id}", "points": point, "recovered": point}))
