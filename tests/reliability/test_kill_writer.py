"""SIGKILL of a writer at random moments while a reader looks: nothing committed is lost, nothing half is seen."""

import json
import random
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import writer_loop
from writer_loop import RUN, assert_rows_are_those_of_their_steps, write_run

from pipeline.errors import InputError, MissingError
from pipeline.store import find_run
from pipeline.verify import verify


class Reader:
    """Looks at the run again and again, and remembers how much of it was ever there."""

    def __init__(self, root):
        self.root, self.seen, self.looks, self.rows = root, {}, 0, 0

    def look(self):
        try:
            run = find_run(self.root, RUN)
        except (MissingError, InputError):  # no root yet, or no folder in it
            assert not self.seen, "the run is gone"
            return
        lost = {group: rows for group, rows in self.seen.items() if run.lengths[group] < rows}
        assert not lost, f"committed rows are gone: {lost}, now {run.lengths}"
        self.rows += assert_rows_are_those_of_their_steps(run)
        assert [problem for problem in verify(run, deep=True) if problem.damage] == []
        self.seen, self.looks = run.lengths, self.looks + 1


KILLS, STEPS = 12, 600


@pytest.mark.parametrize("runs", [1, pytest.param(20, marks=pytest.mark.reliability)])
def test_a_killed_writer_loses_nothing_and_shows_nothing_half(tmp_path, capsys, runs):
    with patch("os.fsync", lambda handle: None):
        head = write_run(tmp_path / "undisturbed", STEPS, every=STEPS).head
    dice, readers, kills = random.Random(runs), [], 0
    for number in range(runs):
        readers.append(Reader(tmp_path / str(number)))
        kills += kill_often(readers[-1], dice)
        with patch("os.fsync", lambda handle: None):
            run = write_run(readers[-1].root, STEPS, every=50)
        assert run.head == head
        assert verify(run, deep=True) == []  # not even debris
        readers[-1].look()
    assert kills > runs * KILLS / 2, "the writer came to its end too soon"
    seen = {"looks": sum(reader.looks for reader in readers), "rows checked": sum(reader.rows for reader in readers)}
    with capsys.disabled():
        print(json.dumps({"promise": "SIGKILL of a writer", "kills": kills, **seen, "rows lost": 0, "half rows": 0}))


def kill_often(reader, dice):
    """Start the writer and kill it, over and over, while the reader looks; returns the kills that hit it alive."""
    command = [sys.executable, writer_loop.__file__, str(reader.root), "run", str(STEPS)]
    for kills in range(KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if kills % 4:  # every fourth kill hits anywhere, start-up and creation included
                assert process.stdout.readline() == "open\n"
            deadline = time.monotonic() + dice.uniform(0, 0.5)
            while time.monotonic() < deadline:
                reader.look()
            if process.poll() is not None:
                assert process.returncode == 0
                return kills
            process.kill()
        reader.look()
    return KILLS
