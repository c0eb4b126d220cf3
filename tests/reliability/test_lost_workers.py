"""SIGKILL of a scheduler's workers while they train a sweep: it ends complete, with the bits of serial runs."""

import pytest
from anywhere import Workers, lasting_cluster
from rows_seen import commits
from sizes import sizes

from pipeline.config import Compute, Digits, Mlp, Record, RunConfig, Stop
from pipeline.remote import sweep_on
from pipeline.store import list_runs
from pipeline.train import train


def runs(count: int) -> list[RunConfig]:
    return [
        RunConfig(
            data=Digits(n=20),
            model=Mlp(width=4, depth=1),
            stop=Stop(steps=400),
            record=Record(eigenpairs=2, spectra={"every": 50}, snapshots={"log": 4}),
            compute=Compute(commit_seconds=0.5),
            learning_rate=0.05,
            seed=seed,
        )
        for seed in range(count)
    ]


class Killer:
    """Kills a worker whenever a run has committed since the last kill, `kills` times.

    Args:
        workers: that train.
        root: the store.
        kills: how often.
        machines: how many of these are of a whole machine: of the runs of the worker too, which then cannot commit.
    """

    def __init__(self, workers: Workers, root: str, kills: int, machines: int) -> None:
        self.workers, self.root, self.kills, self.machines = workers, root, kills, machines
        self.done = self._seen = 0

    def __call__(self) -> bool:
        now = commits(self.root)
        if self.done < self.kills and now > self._seen:
            self.workers.kill(machine=self.done < self.machines)
            self._seen, self.done = now, self.done + 1
        return False


def sweep_among_kills(root: str, count: int, kills: int, machines: int, serial: str) -> int:
    """Sweep while workers are killed, and hold the heads against those of serial runs; returns the rows."""
    with lasting_cluster(losses=3, seed=kills) as workers:
        killer = Killer(workers, root, kills, machines)
        outcomes = list(sweep_on(workers.cluster.scheduler_address, runs(count), root, on_poll=killer))
    assert killer.done == kills, "the runs are too short to be killed this often"
    assert [outcome for outcome in outcomes if outcome.status != "complete"] == []
    assert len(outcomes) == count
    for run in runs(count):
        train(run, serial)
    found, wanted = list_runs(root), list_runs(serial)
    assert {run.run_id: run.head for run in found} == {run.run_id: run.head for run in wanted}
    return sum(sum(run.lengths.values()) for run in found)


@sizes("count, kills", short=(2, 2), full=(12, 12), soak=(24, 100))
def test_lost_workers_change_no_bit_of_a_sweep(tmp_path, measured, count, kills):
    rows = sweep_among_kills(str(tmp_path / "sweep"), count, kills, kills // 2, str(tmp_path / "serial"))
    measured("R21", "sweep, SIGKILL of a worker, folder", runs=count, kills=kills, rows=rows, heads_other=0)


@pytest.mark.reliability
def test_lost_workers_change_no_bit_of_a_sweep_on_s3(server, tmp_path, measured):
    # A machine that is lost leaves its lease, which ends after a minute; one such loss is enough.
    rows = sweep_among_kills("s3://bucket/store", 12, 12, 1, str(tmp_path))
    measured("R21", "sweep, SIGKILL of a worker, S3 server on loopback", runs=12, kills=12, rows=rows, heads_other=0)
