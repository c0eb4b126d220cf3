"""Runs on the workers of a Dask scheduler: the bits of single runs, failures contained, nothing waited for in vain.

The workers are threads of this process, so that a test can look into them; what they train is a process of its own.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import distributed
import pytest
from command import call, refused
from distributed import KilledWorker, LocalCluster, Reschedule
from small_runs import runs

from pipeline import cluster as cluster_module
from pipeline import remote, single
from pipeline.cluster import TRAINING, finds, versions
from pipeline.config import Compute, File, Imported, RunConfig, Stop, load_parts, shipped, sizes_of
from pipeline.disk import door
from pipeline.errors import InputError, NtkEosError
from pipeline.remote import sweep_on, train_on_worker
from pipeline.single import LostProcess, job, train_apart
from pipeline.store import LEASE, list_runs, run_path
from pipeline.sweep import Outcome
from pipeline.train import train

COMMAND = Path(sys.executable).with_name("ntk-eos")


def local_cluster(workers: int = 2) -> LocalCluster:
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0",
        resources={"GPU": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with local_cluster() as local:
        yield local


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training of a run by what a test has in mind: (job, should_stop) -> Outcome."""

    def replace(stand_in):
        monkeypatch.setattr(remote, "train_apart", lambda job, threads, should_stop: stand_in(job, should_stop))

    return replace


def complete(job: str, should_stop) -> Outcome:
    return Outcome(RunConfig.model_validate(json.loads(job)["run"]).run_id, "complete")


def until_unwanted(job: str, should_stop) -> Outcome:
    while not should_stop():
        time.sleep(0.02)
    return Outcome(RunConfig.model_validate(json.loads(job)["run"]).run_id, "interrupted")


def under_way(root) -> bool:
    return any(run.attrs["commits"] > 1 for run in (list_runs(root) if Path(root, "runs").exists() else []))


def wait_for(condition, seconds: float = 60) -> None:
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.05)


# --- the main path ----------------------------------------------------------------------------------------------------


def test_a_sweep_gives_the_bits_of_single_runs_and_one_failing_leaves_the_others_alone(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = RunConfig(**{**dict(runs()[0]), "data": File(file=str(tmp_path / "missing.npz")), "seed": 7})
    ended = list(
        sweep_on(cluster.scheduler_address, [*runs(rates=(0.1, 0.2)), missing], "sweep", attrs={"title": "remote"})
    )
    outcomes = {outcome.run_id: outcome for outcome in ended}
    for run in runs(rates=(0.1, 0.2)):
        assert outcomes[run.run_id] == Outcome(run.run_id, "complete")
        train(run, "serial")
    assert {run.run_id: run.head for run in list_runs("sweep")} == {run.run_id: run.head for run in list_runs("serial")}
    assert {run.attrs["title"] for run in list_runs("sweep")} == {"remote"}
    failed = outcomes[missing.run_id]
    assert (failed.status, failed.exit_code) == ("failed", 4)
    assert "missing.npz" in failed.error


MODEL = """
import warnings
from torch import nn

class Breaks(nn.Linear):
    def forward(self, x):
        print("this is for a log")
        warnings.warn("thin ice")
        self.times = getattr(self, "times", 0) + 1
        if self.times > 40:
            raise RuntimeError("the ice broke")
        return super().forward(x.flatten(1))

def build(input_shape, outputs):
    return Breaks(64, outputs)
"""


def test_a_failure_is_told_with_its_traceback_and_recorded_with_it(cluster, tmp_path):
    (tmp_path / "thin_ice.py").write_text(MODEL)
    (run,) = runs(steps=1000, rates=[0.1], model=Imported(**{"import": "thin_ice:build"}))
    (failed,) = sweep_on(cluster.scheduler_address, [run], str(tmp_path / "s"), imports=[str(tmp_path)])
    assert (failed.status, failed.error) == ("failed", "RuntimeError: the ice broke")
    assert 'raise RuntimeError("the ice broke")' in failed.detail
    assert failed.warnings == ("thin ice",)
    (left,) = list_runs(tmp_path / "s")
    assert left.status == "failed"
    assert 'raise RuntimeError("the ice broke")' in left.heartbeat["traceback"]
    (row,) = json.loads(call("status", tmp_path / "s", "--json").stdout)["rows"]
    assert row["traceback"] == left.heartbeat["traceback"]
    assert "Traceback" not in call("status", tmp_path / "s").stdout


def test_a_job_is_the_run_itself():
    names = [(name, size) for name in shipped() for size in sizes_of(name) or (None,)]
    jobs = [run for name, size in names for study in load_parts(name, (), size) for run in study.runs()]
    assert len(jobs) > 100
    for run in jobs:
        assert RunConfig.model_validate(json.loads(job(run, "root", None, ()))["run"]) == run


def test_tasks_have_names_that_say_what_they_do_and_take_a_gpu_each(cluster, trained, tmp_path):
    seen = {}

    def look(job, should_stop):
        seen.update({key: dict(task.resource_restrictions or {}) for key, task in cluster.scheduler.tasks.items()})
        return complete(job, should_stop)

    trained(look)
    with_gpu = runs(rates=[0.1], compute=Compute(device="cuda:1"))
    for _ in range(2):
        assert len(list(sweep_on(cluster.scheduler_address, [*runs(rates=[0.2]), *with_gpu], str(tmp_path)))) == 2
    assert sorted(seen.values(), key=len) == [{}, {"GPU": 1}], "the second time they have the same names"
    names = sorted(seen, key=lambda key: len(seen[key]))
    for name, run in zip(names, [*runs(rates=[0.2]), *with_gpu], strict=True):
        assert name.startswith("train-")
        assert name.endswith(f"-{run.run_id}")


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_sweep_that_is_asked_to_stop_saves_and_goes_on_later(cluster, tmp_path):
    root = str(tmp_path / "s")
    (run,) = runs(500_000, rates=[0.1])
    outcomes = list(sweep_on(cluster.scheduler_address, [run], root, on_poll=lambda: under_way(root)))
    assert outcomes == [Outcome(run.run_id, "interrupted")]
    (stopped,) = list_runs(root)
    assert stopped.status == "interrupted", "it has committed, and nobody holds its lease"
    assert not any(key.startswith("train-") for key in cluster.scheduler.tasks)
    shorter = run.model_copy(update={"stop": Stop(steps=stopped.attrs["last_step"] + 3)})
    assert [outcome.status for outcome in sweep_on(cluster.scheduler_address, [shorter], root)] == ["complete"]


@pytest.mark.reliability
def test_a_command_that_is_killed_leaves_no_task_behind(cluster, tmp_path):
    root = tmp_path / "s"
    sets = ["stop.steps=500000", "stop.loss=1e-12", "compute.commit_seconds=0.1", "learning_rate=0.05"]
    words = ["run", "smoke", "--out", root, "--scheduler", cluster.scheduler_address]
    with subprocess.Popen([COMMAND, *words, *(w for one in sets for w in ("--set", one))]) as command:
        wait_for(lambda: under_way(root))
        command.kill()
    wait_for(lambda: not door(list_runs(root)[0].path).leased(LEASE), 30)
    assert list_runs(root)[0].status == "interrupted"


def test_two_sweeps_of_one_store_share_their_tasks_and_one_may_leave(cluster, trained, tmp_path):
    begun, leave, finish = threading.Event(), threading.Event(), threading.Event()

    def wait(job, should_stop):
        assert not begun.is_set(), "the second sweep began a task of its own"
        begun.set()
        while not finish.is_set() and not should_stop():
            time.sleep(0.02)
        return complete(job, should_stop) if finish.is_set() else until_unwanted(job, should_stop)

    trained(wait)
    ended = {}

    def follow(name, on_poll):
        sweep = sweep_on(cluster.scheduler_address, runs(rates=[0.1]), str(tmp_path), on_poll=on_poll)
        ended[name] = [outcome.status for outcome in sweep]

    first, second = (
        threading.Thread(target=follow, args=arguments) for arguments in [("a", leave.is_set), ("b", lambda: False)]
    )
    first.start()
    assert begun.wait(20)
    second.start()
    wait_for(lambda: any(len(task.who_wants or ()) == 2 for task in cluster.scheduler.tasks.values()))
    leave.set()
    first.join(20)
    assert ended == {"a": ["interrupted"]}
    finish.set()
    second.join(20)
    assert ended["b"] == ["complete"]


# --- what is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.reliability
def test_a_process_that_is_killed_costs_nothing_but_time(cluster, tmp_path):
    root = str(tmp_path / "s")
    killed: list[int] = []

    def kill_once() -> bool:
        if not killed and under_way(root):
            killed.append(list_runs(root)[0].heartbeat["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return False

    (outcome,) = sweep_on(cluster.scheduler_address, runs(1000, rates=[0.1]), root, on_poll=kill_once)
    assert killed
    assert outcome.status == "complete"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (LostProcess("its process ended with code -9"), r"its process ended with code -9, 3 times without a commit"),
        (
            KilledWorker("key", SimpleNamespace(address="tcp://a:1"), 3),
            r"4 workers were lost with it, 3 times without a commit between; is there",
        ),
    ],
    ids=["process", "worker"],
)
def test_a_run_that_is_lost_again_and_again_has_failed(cluster, trained, tmp_path, lost, said):
    def lose(job, should_stop):
        raise lost

    trained(lose)
    (outcome,) = sweep_on(cluster.scheduler_address, runs(rates=[0.1]), str(tmp_path))
    assert outcome.status == "failed"
    assert outcome.error.startswith(said)


def test_a_run_that_gets_on_may_be_lost_as_often_as_it_takes(cluster, trained, tmp_path, monkeypatch):
    (run,) = runs(rates=[0.1])
    train(run, str(tmp_path))
    record, lost = list_runs(tmp_path)[0], []

    def lose(job, should_stop):
        lost.append(1)
        if len(lost) > 10:
            return complete(job, should_stop)
        raise KilledWorker("key", SimpleNamespace(address="tcp://a:1"), 3)

    def committed(path):
        return SimpleNamespace(attrs={"commits": len(lost) // 2})  # a commit each second time

    trained(lose)
    monkeypatch.setattr(remote, "read_run", committed)
    assert record.attrs["commits"]
    (outcome,) = sweep_on(cluster.scheduler_address, [run], str(tmp_path))
    assert outcome.status == "complete"


def test_a_scheduler_that_is_lost_ends_the_sweep(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.CONNECT_SECONDS", 0.5)
    trained(until_unwanted)
    with local_cluster(1) as local:
        closing = threading.Timer(1, local.close)
        closing.start()
        with pytest.raises(NtkEosError, match=r"Dask scheduler (was lost|is gone)"):
            list(sweep_on(local.scheduler_address, runs(), str(tmp_path)))
        closing.join()


def test_without_any_worker_the_sweep_ends_after_a_while(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(remote, "ALONE_SECONDS", 0.5)
    trained(until_unwanted)
    with local_cluster(1) as local:
        closing = threading.Timer(1, local.scale, [0])
        closing.start()
        with pytest.raises(NtkEosError, match=r"the scheduler has no worker: start one by .*; then the same command"):
            list(sweep_on(local.scheduler_address, runs(), str(tmp_path)))
        closing.join()


# --- workers that do not fit ------------------------------------------------------------------------------------------


def test_a_root_that_a_worker_does_not_see_is_refused(cluster, tmp_path, monkeypatch):
    async def elsewhere(folder, key):
        return await finds(f"{folder}-of-another-machine", key)

    monkeypatch.setattr(cluster_module, "finds", elsewhere)
    message = r"worker tcp://.* does not reach .* as it is here \(.*\.tmp-sweep-.* does not exist\): give a folder that"
    with pytest.raises(NtkEosError, match=message):
        list(sweep_on(cluster.scheduler_address, runs(), str(tmp_path)))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_gpu_that_no_worker_offers_is_missed_at_once(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "workers", lambda client: {"tcp://a:1": {"resources": {}}})
    with pytest.raises(NtkEosError, match=r"no worker offers a GPU: start one per GPU by `dask worker .* GPU=1`"):
        list(sweep_on(cluster.scheduler_address, runs(compute=Compute(device="cuda")), str(tmp_path)))


@pytest.mark.parametrize("case", ["another version", "no such folder"])
def test_a_task_leaves_a_worker_that_does_not_fit(tmp_path, monkeypatch, case):
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0)
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(get_current_task=lambda: "key"))
    here = versions(TRAINING)()
    expected, folder = (here | {"torch": "0"}, tmp_path) if case == "another version" else (here, tmp_path / "absent")
    with pytest.raises(Reschedule):
        train_on_worker("", 1, expected, str(folder))


def test_a_store_that_does_not_answer_is_no_reason_to_wait(monkeypatch):
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(cluster_module, "door", lambda folder: SimpleNamespace(get=lambda key: time.sleep(0.5)))
    assert asyncio.run(finds("s3://bucket/runs", "key")) == "no answer for 0 s"


def test_the_memory_of_this_process_is_no_place_for_a_sweep(cluster):
    with pytest.raises(InputError, match=r"memory://x/y is in the memory of one process"):
        next(sweep_on(cluster.scheduler_address, runs(), "memory://x/y"))


# --- the process of a run ---------------------------------------------------------------------------------------------


def test_a_process_that_does_not_begin_is_lost_with_its_code(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
    with pytest.raises(LostProcess, match="its process ended with code 7"):
        train_apart("{}" * 100_000, 1, lambda: False)


def test_the_lease_of_a_dead_process_is_waited_for(tmp_path, monkeypatch):
    (run,) = runs(rates=[0.1])
    train(run, str(tmp_path))
    lease = door(run_path(tmp_path, run.run_id)).lease(LEASE, b"one that is being killed")
    threading.Timer(0.7, lease.release).start()
    started = time.monotonic()
    single._wait_for_lease(str(tmp_path), run.run_id, threading.Event())
    assert time.monotonic() - started > 0.6
    monkeypatch.setattr(single, "LEASE_PATIENCE", 0.1)
    with door(run_path(tmp_path, run.run_id)).lease(LEASE, b"one that lives"):
        single._wait_for_lease(str(tmp_path), run.run_id, threading.Event())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "study"])
def test_workers_and_a_scheduler_exclude_each_other(command, tmp_path):
    result = call(command, "smoke", "--out", tmp_path / "s", "--workers", 2, "--scheduler", "tcp://host:8786")
    assert result.exit_code == 2
    assert "--workers and --scheduler: give one of them" in result.stderr


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.CONNECT_SECONDS", 0.2)
    said = refused(1, "run", "smoke", "-q", "--out", tmp_path / "s", "--scheduler", "tcp://127.0.0.1:1")
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in said
    assert "must be an address" in refused(2, "run", "smoke", "-q", "--out", tmp_path / "s", "--scheduler", "nowhere")
    assert not (tmp_path / "s").exists()
