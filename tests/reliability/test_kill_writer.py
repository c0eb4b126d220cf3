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

from pipeline.errors import MissingError
from pipeline.store import find_run
from pipeline.verify import verify


class Reader:
    """Looks at the run again and again, and remembers how much of it was ever there."""

    def __init__(self, root):
        self.root, self.seen, self.looks, self.rows = root, {}, 0, 0

    def look(self):
        try:
            run = find_run(self.root, RUN)
        except MissingError:
            assert not self.seen, "the run is gone"
            return
        lost = {group: rows for group, rows in self.seen.items() if run.lengths[group] < rows}
        assert not lost, f"committed rows are gone: {lost}, now {run.lengths}"
        self.rows += assert_rows_are_those_of_their_steps(run)
        assert [problem for problem in verify(run, deep=True) if problem.damage] == []
        self.seen, self.looks = run.lengths, self.looks + 1


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(12, 250, id="short"), pytest.param(200, 4000, marks=pytest.mark.reliability)]
)
def test_a_killed_writer_loses_nothing_and_shows_nothing_half(tmp_path, capsys, kills, steps):
    dice = random.Random(kills)
    reader = Reader(tmp_path / "killed")
    command = [sys.executable, writer_loop.__file__, str(reader.root), "run", str(steps)]
    started = time.monotonic()
    for number in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if number % 4:  # every fourth kill hits anywhere, start-up and creation included
                assert process.stdout.readline() == "open\n"
            deadline = time.monotonic() + dice.uniform(0, 0.5)
            while time.monotonic() < deadline:
                reader.look()
            assert process.poll() is None, "the run is too short to be killed this often"
            process.kill()
        reader.look()
    with patch("os.fsync", lambda handle: None):
        run = write_run(reader.root, steps, every=50)
        assert run.head == write_run(tmp_path / "undisturbed", steps, every=steps).head
    assert verify(run, deep=True) == []  # not even debris
    reader.look()
    measured = {"kills": kills, "looks": reader.looks, "rows checked": reader.rows, "rows lost": 0, "half rows": 0}
    with capsys.disabled():
        print(json.dumps({"promise": "SIGKILL of a writer", **measured, "s": round(time.monotonic() - started, 1)}))
