"""SIGKILL of training at random moments, under every update rule and process: the end is that of an undisturbed run.

The runs have no end while they are killed, however fast the machine is. Then each is asked for some steps more, and a
second one for as many at once. Everything that a study can record is recorded, so that all of a checkpoint counts.
"""

import random
import time
from pathlib import Path

import pytest
from rows_seen import commits, committed, lost_rows
from sizes import sizes
from warm import Warm

from pipeline.config import load_study
from pipeline.optim import UPDATES
from pipeline.processes import PROCESSES
from pipeline.store import list_runs
from pipeline.train import train
from pipeline.verify import verify

RATES = {"rmsprop": 0.003, "adam": 0.003}
NEEDED = {"sgd": ["update={name='sgd',batch_size=7}"]}
RECORDED = [
    "record.snapshots={every=40,log=4}", "record.spectra={every=10}", "record.scalars={every=3}",
    "record.hessian={every=25}", "record.layers=true", "record.test=10",
    "record.kernels=['ntk','conjugate']",
]  # fmt: skip
# The flows are those of gradient descent; the midpoints are those of any rule.
CASES = [(process, update) for process in PROCESSES for update in UPDATES
         if process in ("discrete", "midpoint") or update == "gd"]  # fmt: skip
ENDLESS = 10**7


def write(root, process, update, steps):
    """Train one run."""
    (run,) = load_study("smoke", [
        "data.n=30", "model.width=8", "stop.loss=1e-300", "compute.dtype=float64", f"stop.steps={steps}",
        "compute.commit_seconds=0.05", f"learning_rate={RATES.get(update, 0.3)}", f"process={process}",
        *NEEDED.get(update, [f"update={{name='{update}'}}"]), *RECORDED,
    ]).runs()  # fmt: skip
    assert train(run, root) == "complete"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The process whose children train."""
    with Warm(__file__, "write", tmp_path_factory.mktemp("first"), "discrete", "gd", 3) as process:
        yield process


@sizes("kills", full=5, soak=20)
@pytest.mark.parametrize(("process", "update"), CASES)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, measured, warm, process, update, kills):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rows, lost = kill_often(warm, killed, (process, update), kills)
    assert rows > 0
    assert lost == 0
    steps = list_runs(killed)[0].attrs["last_step"] + 20
    for root in (killed, whole):
        with warm.call(root, process, update, steps) as child:
            assert child.wait() == 0
    (run,), (undisturbed,) = list_runs(killed), list_runs(whole)
    assert run.status == undisturbed.status == "complete"
    assert run.attrs["environment_changes"] == []
    assert run.head == undisturbed.head
    assert run.lengths == undisturbed.lengths
    assert verify(run, deep=True) == []
    measured("R5", f"{process}, {update}", kills=kills, steps=steps, rows_lost=lost, equal_heads=1)


def kill_often(warm: Warm, root: Path, case: tuple[str, str], kills: int) -> tuple[int, int]:
    """Train and kill, over and over; returns the rows seen before the last kill, and those that were gone after one."""
    dice, lost, before, seen = random.Random(f"{case}"), 0, 0, {}
    for _ in range(kills):
        with warm.call(root, *case, ENDLESS) as child:
            patience, wanted = time.monotonic() + 60, before + dice.randint(1, 4)
            while commits(root) < wanted:
                assert child.runs(), "training failed"
                assert time.monotonic() < patience, "hardly a commit within a minute"
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.3))
            seen = committed(root)
            assert child.kill()
        now, before = committed(root), commits(root)
        lost += lost_rows(seen, now)
    return sum(len(rows) for groups in seen.values() for rows in groups.values()), lost
