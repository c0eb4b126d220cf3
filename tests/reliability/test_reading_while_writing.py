"""Every way to read, while the run is written: the answer is that of a committed prefix, and none is an error."""

import random

import numpy as np
import pytest
from command import rows
from mock_store import CADENCES, mock_run
from sizes import sizes
from warm import Warm

from analysis import alignment, catalog, open_sweep
from pipeline.cadence import Cadence
from pipeline.store import is_run, run_path

STEPS = 40
EVERY = dict.fromkeys(CADENCES, Cadence(every=1))  # so that row i is that of step i, in every group
GROWS, DONE = "lr-0.1_seed-0", "lr-0.2_seed-0"


def run(root, rate, steps, end):
    return mock_run(root, rate, 0, steps=steps, n=6, k=2, end=end, cadences=EVERY)


def write(root):
    """A run beside one that is done: a few more rows with each commit, and its lease given back and taken again."""
    dice, steps = random.Random(), 0
    while steps < STEPS:
        steps = min(steps + dice.randint(1, 3), STEPS)
        run(root, 0.1, steps, "complete" if steps == STEPS else None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the values are: of both runs, by run and step."""
    root = tmp_path_factory.mktemp("whole")
    for rate in (0.1, 0.2):
        run(root, rate, STEPS, "complete")
    sweep = open_sweep(root).load()
    return {
        name: {"ntk": part.ntk.values, "loss": part.loss.values, "kta": alignment(part).kta.values}
        for name, part in ((name, sweep.isel(snapshot=np.flatnonzero(sweep.run == name))) for name in (GROWS, DONE))
    }


class Reader:
    """Looks at the store in every way; each compares all rows that it sees, and sees no less than the time before."""

    def __init__(self, root, whole):
        self.root, self.whole, self.seen, self.rows = root, whole, {}, 0

    def look(self):
        for way in (self.sweep, self.sql, self.status):
            lengths = way()
            assert lengths[DONE] == STEPS + 1
            assert lengths.get(GROWS, 0) >= self.seen.get(way, 0), f"{way.__name__} sees less than before"
            self.seen[way] = lengths.get(GROWS, 0)
            self.rows += sum(lengths.values())

    def compare(self, name, steps, **columns):
        assert list(steps) == list(range(len(steps)))
        for column, values in columns.items():
            np.testing.assert_array_equal(values, self.whole[name][column][: len(steps)], err_msg=f"{name} {column}")
        return len(steps)

    def sweep(self):
        sweep = open_sweep(self.root)
        kta = alignment(sweep).kta.compute()
        sweep = sweep[["ntk", "loss"]].load()
        lengths = {}
        for name in np.unique(sweep.run.values):
            at = np.flatnonzero(sweep.run == name)
            part = sweep.isel(snapshot=at)
            lengths[str(name)] = self.compare(
                name, part.step.values, ntk=part.ntk.values, loss=part.loss.values, kta=kta.values[at]
            )
        return lengths

    def sql(self):
        found = {}
        for name, step, loss in catalog.query(self.root, "select run_id, step, loss from train order by 1, 2").rows:
            steps, losses = found.setdefault(name, ([], []))
            steps.append(step)
            losses.append(loss)
        return {name: self.compare(name, steps, loss=losses) for name, (steps, losses) in found.items()}

    def status(self):
        found = rows("status", self.root)
        for row in found:
            lengths = {row[f"{group}_rows"] for group in ("train", "snapshots", "spectra", "scalars", "hessian")}
            assert lengths == {0 if row["step"] is None else row["step"] + 1}
            assert row["status"] in ("running", "stale", "interrupted", "complete")
        return {row["run"]: row["train_rows"] for row in found}


@sizes("looks", short=2, full=60, soak=1000)
def test_what_is_read_while_a_run_is_written_is_a_committed_prefix(tmp_path, measured, whole, looks):
    done = runs = during = compared = 0
    with Warm(__file__, "write", tmp_path / "first") as warm:
        while done < looks:
            root, runs = tmp_path / str(runs), runs + 1
            run(root, 0.2, STEPS, "complete")
            reader = Reader(root, whole)
            with warm.call(root) as writer:
                while writer.runs() and done < looks:
                    reader.look()
                    done += 1
                    during += is_run(run_path(root, GROWS)) and writer.runs()
            compared += reader.rows
    assert during > 0
    measured("R2", "open_sweep, a measure, sql and status while a run is written", looks=done, rows_seen=compared,
             torn=0, errors=0)  # fmt: skip
