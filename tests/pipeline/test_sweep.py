"""Many runs in processes: same bits as one after the other, failures contained, stopping and resuming."""

import os
import re
import signal
from multiprocessing import active_children
from pathlib import Path

import pytest
from small_runs import runs

from pipeline.config import Compute, File, RunConfig, Stop
from pipeline.errors import InputError
from pipeline.store import list_runs
from pipeline.sweep import default_workers, sweep
from pipeline.train import train


def heads(root) -> dict[str, str]:
    return {run.run_id: run.head for run in list_runs(root)}


def test_a_sweep_gives_the_bits_of_single_runs(tmp_path):
    for run in runs():
        train(run, str(tmp_path / "serial"))
    outcomes = list(sweep(runs(), str(tmp_path / "sweep"), workers=2))
    assert {outcome.status for outcome in outcomes} == {"complete"}
    assert heads(tmp_path / "sweep") == heads(tmp_path / "serial")


def test_the_memory_of_this_process_is_no_place_for_a_sweep():
    with pytest.raises(InputError, match=r"memory://x/y is in the memory of one process"):
        next(sweep(runs(), "memory://x/y"))


def test_one_failing_run_leaves_the_others_alone(tmp_path):
    missing = RunConfig(**{**dict(runs()[0]), "data": File(file=str(tmp_path / "missing.npz")), "seed": 7})
    outcomes = {outcome.run_id: outcome for outcome in sweep([*runs(), missing], str(tmp_path / "s"), workers=1)}
    assert [outcomes[run.run_id].status for run in runs()] == ["complete"] * 3
    failed = outcomes[missing.run_id]
    assert failed.status == "failed"
    assert failed.exit_code == 4
    assert "missing.npz" in failed.error


def test_a_sweep_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path):
    long = runs(steps=200_000)[:1]
    root = str(tmp_path / "s")

    def started() -> bool:
        return any(run.attrs["commits"] > 0 for run in (list_runs(root) if (tmp_path / "s" / "runs").exists() else []))

    outcomes = list(sweep(long, root, workers=1, on_poll=started))
    assert [outcome.status for outcome in outcomes] == ["interrupted"]
    (run,) = list_runs(root)
    assert run.status == "interrupted"
    reached = run.attrs["last_step"]
    assert 0 < reached < 200_000
    shorter = [run.model_copy(update={"stop": Stop(steps=reached + 3)}) for run in long]
    assert [outcome.status for outcome in sweep(shorter, root, workers=1)] == ["complete"]
    assert list_runs(root)[0].attrs["last_step"] == reached + 3


def test_a_killed_worker_costs_nothing_but_time(tmp_path):
    root = str(tmp_path / "s")
    killed: list[int] = []

    def kill_once() -> bool:
        for run in list_runs(root) if (tmp_path / "s" / "runs").exists() and not killed else []:
            if run.status == "running" and run.heartbeat.get("commits"):
                killed.append(run.heartbeat["pid"])
                os.kill(killed[0], signal.SIGKILL)
                break
        return False

    outcomes = list(sweep(runs(steps=1000), root, workers=2, on_poll=kill_once))
    assert killed
    assert sorted(outcome.run_id for outcome in outcomes) == sorted(run.run_id for run in runs())
    assert {outcome.status for outcome in outcomes} == {"complete"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="masks of other processes are read from /proc")
def test_workers_never_see_the_signals_of_the_terminal_not_even_while_they_start(tmp_path):
    masks: set[int] = set()

    def look() -> bool:
        for worker in active_children():
            blocked = re.search(r"^SigBlk:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text(), re.MULTILINE)
            masks.add(int(blocked[1], 16))
        return False

    list(sweep(runs(steps=300), str(tmp_path / "s"), workers=2, on_poll=look))
    assert masks
    for number in (signal.SIGINT, signal.SIGTERM):
        assert all(mask & (1 << (number - 1)) for mask in masks)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "here they are open again"


def test_a_sweep_whose_reader_fails_stops_its_workers(tmp_path):
    root = str(tmp_path / "s")

    def fail() -> bool:
        if (tmp_path / "s" / "runs").exists() and any(run.attrs["commits"] for run in list_runs(root)):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        list(sweep(runs(steps=300_000), root, workers=1, on_poll=fail))
    assert {run.status for run in list_runs(root)} == {"interrupted"}


def test_workers_are_the_cores_over_the_threads_and_one_on_an_accelerator(monkeypatch):
    monkeypatch.setattr("dask.system.cpu_count", lambda: 8)
    assert default_workers(runs()) == 8
    assert default_workers(runs(compute=Compute(threads=3))) == 2
    assert default_workers(runs(compute=Compute(device="cuda"))) == 1


@pytest.mark.parametrize("workers", [None, 5])
def test_nothing_to_do_starts_nothing(tmp_path, workers):
    assert list(sweep([], str(tmp_path), workers=workers)) == []
    assert not list(tmp_path.iterdir())
