"""SIGKILL of a writer at random moments while readers look: nothing committed is lost, nothing half is seen."""

import random
import time
from collections import Counter
from unittest.mock import patch

import xarray as xr
from sizes import sizes
from warm import Warm
from writer_loop import (
    RUN,
    assert_columns_are_those_of_their_steps,
    assert_rows_are_those_of_their_steps,
    go_on,
    open_writer,
    write_run,
)

from pipeline.store import find_run, is_run, run_path
from pipeline.verify import verify

OF_A_RUN, STEPS = 12, 600


def write(root, steps):
    """The writer that is killed."""
    with open_writer(root) as writer:
        go_on(writer, steps)


class Reader:
    """Looks at a run again and again, through our code and through plain xarray, and remembers how much was there.

    Attributes:
        looks: how often the run was there.
        rows: compared with what was written, at every look anew.
    """

    def __init__(self, root):
        self.root, self.path, self.seen, self.looks, self.rows = root, run_path(root, RUN), Counter(), 0, 0

    def look(self):
        if not is_run(self.path):
            assert not self.seen, "the run is gone"
            return
        run = find_run(self.root, RUN)
        self.grown("record", run.lengths)
        self.rows += assert_rows_are_those_of_their_steps(run)
        assert [problem for problem in verify(run, deep=True) if problem.damage] == []
        self.look_without_our_code()
        self.looks += 1

    def look_without_our_code(self):
        """The lengths of all groups through the run and through each one's own path, and the values of one of them."""
        with xr.open_datatree(self.path, engine="zarr") as tree:
            groups = [group for group in tree if group != "probe"]
            chosen = groups[self.looks % len(groups)]
            self.grown("open_datatree", {group: tree[group].sizes["step"] for group in groups})
            self.compare(chosen, tree[chosen].to_dataset())
        for group in groups:
            with xr.open_zarr(self.path, group=group) as ds:
                self.grown("open_zarr", {group: ds.sizes["step"]})
                if group == chosen:
                    self.compare(group, ds)

    def compare(self, group, ds):
        columns = {name: array.values for name, array in ds.variables.items() if name != "digest"}
        assert_columns_are_those_of_their_steps(group, ds.sizes["step"], columns)
        self.rows += ds.sizes["step"]

    def grown(self, through, lengths):
        """Rows that were seen once are there for ever."""
        for group, rows in lengths.items():
            seen = self.seen[through, group]
            assert rows >= seen, f"committed rows of {group} are gone from {through}: {rows}, seen were {seen}"
            self.seen[through, group] = rows


@sizes("kills", short=8, full=50, soak=1000)
def test_a_killed_writer_loses_nothing_and_shows_nothing_half(tmp_path, measured, kills):
    with patch("os.fsync", lambda handle: None):
        head = write_run(tmp_path / "undisturbed", STEPS, every=STEPS).head
    dice, readers, done = random.Random(kills), [], 0
    with Warm(__file__, "write") as warm:
        while done < kills:
            readers.append(Reader(tmp_path / str(len(readers))))
            done += kill_often(warm, readers[-1], dice, min(OF_A_RUN, kills - done))
            with patch("os.fsync", lambda handle: None):
                run = write_run(readers[-1].root, STEPS, every=50)
            assert run.head == head
            assert verify(run, deep=True) == []  # not even debris
            readers[-1].look()
    seen = {"looks": sum(reader.looks for reader in readers), "rows_seen": sum(reader.rows for reader in readers)}
    assert seen["looks"] > kills / 2
    measured("R1", "SIGKILL of a writer, folder", kills=done, runs=len(readers), **seen, rows_lost=0)
    measured("R2", "readers during SIGKILLs: ours, open_zarr, open_datatree; folder", kills=done, **seen, torn=0)


def kill_often(warm, reader, dice, kills):
    """Start the writer and kill it, over and over, while the reader looks; returns the kills that hit it alive."""
    done = 0
    for number in range(kills):
        with warm.call(reader.root, STEPS) as writer:
            # Every fourth kill hits anywhere, opening and creation included.
            deadline = time.monotonic() + (dice.uniform(0, 0.5) if number % 4 else dice.uniform(0, 0.05))
            while time.monotonic() < deadline and writer.runs():
                reader.look()
            if not writer.kill():
                assert writer.wait() == 0, "the writer failed"
                break
        done += 1
        reader.look()
    return done
