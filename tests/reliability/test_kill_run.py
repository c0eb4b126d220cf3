"""SIGKILL of `ntk-eos run` at random moments: nothing committed is lost and the end is the same, bit for bit.

Each kill costs the start of a command and of its workers, some 4 s. test_resume.py kills training by the hundred, for
every update rule, in processes that are forked; here it is the whole command, with its workers.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from rows_seen import commits, committed, lost_rows
from sizes import sizes

from pipeline.config import load_study
from pipeline.store import list_runs, read_run, run_path
from pipeline.train import train

OVERRIDES = ["stop.loss=1e-300", "record.scalars={every=40}", "record.spectra={every=200}"]
ENDLESS = 10**6  # however fast the machine is; at the end the runs are asked for some steps more than they have
COMMAND = Path(sys.executable).with_name("ntk-eos")


def command(root: Path, steps: int, commit_seconds: float = 5.0) -> list[str]:
    overrides = [*OVERRIDES, f"stop.steps={steps}", f"compute.commit_seconds={commit_seconds}"]
    return [str(COMMAND), "run", "smoke", "--out", str(root), "-q", *(w for key in overrides for w in ("--set", key))]


def kill_until_done(root: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Start, kill, start again, `kills` times, then go on to an end.

    What a reader sees is noted right before each kill, after it, and at the end, and each time held against the time
    before.

    Returns:
        Steps at the end, rows seen before the last start, and rows that were seen once and not the next time.
    """
    dice = random.Random(seed)
    seen: dict[str, dict[str, list[str]]] = {}
    lost = 0
    for number in range(kills):
        process = subprocess.Popen(command(root, ENDLESS, 0.02), start_new_session=True)
        if number % 4 == 0:
            time.sleep(dice.uniform(0.1, 4))  # anywhere, start-up and creation included
        else:
            before, patience = commits(root), time.monotonic() + 60
            while commits(root) == before and process.poll() is None and time.monotonic() < patience:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
        before_kill = committed(root)
        assert process.poll() is None, "the command failed"
        if number % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)  # its workers must follow by themselves
        process.wait()
        wait_for_leases(root)
        now = committed(root)
        lost += lost_rows(seen, before_kill) + lost_rows(before_kill, now)
        seen = now
    steps = max(run.attrs["last_step"] or 0 for run in list_runs(root)) + 100
    subprocess.run(command(root, steps), check=True)
    lost += lost_rows(seen, committed(root))
    return steps, sum(len(rows) for groups in seen.values() for rows in groups.values()), lost


def wait_for_leases(root: Path) -> None:
    """Until the workers of a killed command are gone too."""
    patience = time.monotonic() + 20
    while any(run.status == "running" for run in (list_runs(root) if (root / "runs").is_dir() else [])):
        assert time.monotonic() < patience, "a worker outlived its parent by 20 s"
        time.sleep(0.02)


def test_what_counts_as_lost():
    seen = {"a": {"train": ["1", "2"], "scalars": ["1"]}, "b": {"train": ["7"]}}
    assert lost_rows(seen, seen) == lost_rows({}, seen) == 0
    assert lost_rows(seen, {"a": {"train": ["1", "2", "3"], "scalars": ["1", "4"]}, "b": {"train": ["7"]}}) == 0
    assert lost_rows(seen, {"a": {"train": ["1", "9"], "scalars": []}}) == 3


@sizes("kills", short=3, full=12, soak=100)
def test_kills_lose_no_committed_row_and_change_no_bit(tmp_path, measured, kills):
    steps, rows, lost = kill_until_done(tmp_path / "killed", kills, seed=kills)
    assert rows > 0
    assert lost == 0
    whole = tmp_path / "whole"
    study = load_study("smoke", [*OVERRIDES, f"stop.steps={steps}"])
    for run in study.runs():
        train(run, str(whole))
    for run in study.runs():
        killed = read_run(run_path(tmp_path / "killed", run.run_id))
        assert killed.status == "complete"
        assert killed.head == read_run(run_path(whole, run.run_id)).head
    left = [path.name for path in (tmp_path / "killed" / "runs").rglob("*") if path.name.startswith((".tmp-", ".new-"))]
    assert left == []
    measured("R1", "SIGKILL of `ntk-eos run`, folder", kills=kills, rows_seen=rows, rows_lost=lost)
    measured("R5", "SIGKILL of `ntk-eos run`, folder", kills=kills, equal_heads=len(study.runs()))
