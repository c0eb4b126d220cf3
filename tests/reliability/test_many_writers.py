"""Many processes write into one root, and several want one run: every row is there, and a run has one writer."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from unittest.mock import patch

import writer_loop
from sizes import sizes
from warm import Warm
from writer_loop import RUN, advance, assert_rows_are_those_of_their_steps, next_step, open_writer, record

from pipeline.errors import RunLocked
from pipeline.store import find_run, list_runs
from pipeline.verify import verify, verify_root

GROUPS = {"snapshots": ["ntk", "trace"], "train": ["loss"]}
EVERY = writer_loop.CADENCES["snapshots"]
MINE = "it is mine"


def write_many(root: str, first: int, runs: int, snapshots: int) -> None:
    """What each process does; an error ends it, for nothing is tried again."""
    for number in range(first, first + runs):
        with open_writer(root, run_id=f"lr-{number}_seed-0", groups=GROUPS) as writer:
            advance(writer, EVERY * (snapshots - 1) + 1, every=10 * EVERY, groups=tuple(GROUPS))
            writer.finish("complete", "steps")


@sizes("processes, runs, snapshots", short=(3, 2, 4), full=(8, 25, 40))
def test_many_processes_write_into_one_root(tmp_path, measured, processes, runs, snapshots):
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([*command, str(number * runs), str(runs), str(snapshots)], env=environment)
        for number in range(processes)
    ]
    assert [writer.wait() for writer in writers] == [0] * processes
    found = list_runs(tmp_path)
    assert len(found) == processes * runs
    for run in found:
        assert run.status == "complete"
        assert_rows_are_those_of_their_steps(run)
    assert len({run.head for run in found}) == 1  # the same identity and rows, under other names
    assert verify_root(tmp_path, deep=True) == []
    there = sum(run.lengths["snapshots"] for run in found)
    assert there == processes * runs * snapshots
    measured("R7", "processes that write into one root", processes=processes, runs=len(found), snapshots=there,
             expected=processes * runs * snapshots, retries=0)  # fmt: skip


def contend(root: str, said: str) -> None:
    """Write a row and hold the run, or say who does."""
    try:
        writer = open_writer(root)
    except RunLocked as error:
        Path(said).write_text(str(error))
        return
    advance(writer, next_step(writer) + 1)
    Path(said).write_text(MINE)
    signal.pause()


@sizes("rounds", short=3, full=50)
def test_of_several_that_want_a_run_one_writes_and_the_others_are_told_who(tmp_path, measured, rounds):
    root, refused = tmp_path / "store", 0
    with ExitStack() as stack:
        contenders = [stack.enter_context(Warm(__file__, "contend")) for _ in range(3)]
        for number in range(rounds):
            files = [tmp_path / f"{number}-{who}" for who in range(3)]
            children = [warm.call(root, file) for warm, file in zip(contenders, files, strict=True)]
            said = [read_soon(file) for file in files]
            holder = children[said.index(MINE)]
            named = f"{RUN}.zarr is being written by process {holder.pid} on {socket.gethostname()} since "
            assert [text.startswith(named) for text in said if text != MINE] == [True, True]
            refused += 2
            assert find_run(root, RUN).status == "running"
            assert holder.kill()
            assert find_run(root, RUN).status == "stale"
            assert [child.wait() for child in children if child is not holder] == [0, 0]
    run = find_run(root, RUN)
    assert run.lengths["train"] == rounds
    assert_rows_are_those_of_their_steps(run)
    assert verify(run, deep=True) == []
    measured("R8", "three processes want one run; its holder is killed", rounds=rounds, refused_by_name=refused,
             double_writes=0)  # fmt: skip


def read_soon(file: Path) -> str:
    """What a process says, once it does."""
    patience = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < patience, "it says nothing"
        time.sleep(0.005)
    return file.read_text()


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, measured):
    groups = {"spectra": ["eigenvalue"], "train": ["loss", "wall_time"]}
    clock = count(2e9, -3600)  # an hour back at each look
    with patch("os.fsync", lambda handle: None):
        record(tmp_path / "forwards", groups, [])
        with patch("time.time", lambda: next(clock)):
            record(tmp_path / "backwards", groups, [])
            run = find_run(tmp_path / "backwards", RUN)
            assert run.status == "complete"
            assert verify(run, deep=True) == []
    assert run.head == find_run(tmp_path / "forwards", RUN).head
    assert run.heartbeat["time"] < 2e9
    measured("R8", "a clock that runs backwards", equal_heads=1)


if __name__ == "__main__":
    write_many(sys.argv[1], *map(int, sys.argv[2:]))
