"""The S3 protocol itself: a server on loopback that may fail, the real client and its retries, kills of the command."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import xarray as xr
from obstore.store import from_url
from rows_seen import commits, committed, lost_rows
from sizes import sizes
from warm import Warm
from writer_loop import (
    RUN,
    advance,
    assert_columns_are_those_of_their_steps,
    assert_rows_are_those_of_their_steps,
    go_on,
    next_step,
    open_writer,
    record,
    write_run,
)
from zarr.storage import ObjectStore

from pipeline import objects
from pipeline.config import load_study
from pipeline.disk import door
from pipeline.errors import RunLocked
from pipeline.store import LEASE, find_run, is_run, list_runs, read_run, run_path
from pipeline.train import train
from pipeline.verify import verify

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-moto" / "bin" / "python"
URL = "s3://bucket/store"
COMMAND = Path(sys.executable).with_name("ntk-eos")
OVERRIDES = [
    "stop.steps=6000", "stop.loss=1e-12", "record.scalars={every=40}", "record.spectra={every=200}",
    "compute.commit_seconds=0.2",
]  # fmt: skip

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make reliability` installs the server into .venv-moto"),
]


def test_a_run_is_that_of_a_folder_and_has_one_writer(server, tmp_path):
    with open_writer(URL) as writer:
        advance(writer, 4)
        with pytest.raises(RunLocked, match="is being written by process"):
            open_writer(URL)
    assert write_run(URL).head == write_run(tmp_path).head
    assert verify(find_run(URL, RUN), deep=True) == []
    assert [run.status for run in list_runs(URL)] == ["complete"]
    plain = ObjectStore(from_url(str(run_path(URL, RUN))), read_only=True)
    assert xr.open_datatree(plain, engine="zarr", chunks={})["train"].sizes["step"] == 12


def test_a_lost_lease_is_taken_over_and_its_holder_is_stopped(server, monkeypatch):
    asleep = open_writer(URL)
    advance(asleep, 4)
    left = objects._now
    monkeypatch.setattr(objects, "_now", lambda: left() + timedelta(hours=1))
    with open_writer(URL) as awake:
        with pytest.raises(RunLocked, match="was replaced by another process"):
            advance(asleep, 8)
        asleep.close()
    awake = open_writer(URL)  # has seen what the other one left
    advance(awake, 12)
    awake.finish("complete", "steps")
    awake.close()
    assert find_run(URL, RUN).head == write_run(f"{URL}-2").head


@pytest.mark.parametrize("server", [8], indirect=True)
def test_a_server_that_fails_changes_no_bit(server, tmp_path, measured):
    groups = {"spectra": ["eigenvalue", "prediction"], "train": ["loss"]}
    record(tmp_path, groups, [])
    for number in range(5):
        record(f"{URL}-{number}", groups, [])
        run = find_run(f"{URL}-{number}", RUN)
        assert run.head == find_run(tmp_path, RUN).head
        assert verify(run, deep=True) == []
    measured("R3", "S3 server that fails 8 % of requests", runs=5, rows_lost=0, equal_heads=5)


@sizes("kills", full=4, soak=40)
@pytest.mark.parametrize("server", [2], indirect=True)
def test_kills_lose_no_committed_row_and_change_no_bit(server, tmp_path, measured, kills):
    command = [str(COMMAND), "run", "smoke", "--out", URL, "-q", *(w for key in OVERRIDES for w in ("--set", key))]
    dice, seen, lost = random.Random(0), {}, 0
    for number in range(kills):
        before, patience = commits(URL), time.monotonic() + 60
        process = subprocess.Popen(command, start_new_session=True)
        while number and commits(URL) == before and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.1)
        time.sleep(dice.uniform(0, 1))
        assert process.poll() is None, "the study is too short to be killed this often"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Nobody waits for a minute here: whoever knows that the writer is dead may delete its lease.
        for run in list_runs(URL) if door(f"{URL}/runs").is_there() else []:
            door(run.path).delete(LEASE)
        now = committed(URL)
        lost, seen = lost + lost_rows(seen, now), now
    subprocess.run(command, check=True)
    lost += lost_rows(seen, committed(URL))
    assert lost == 0
    for run in load_study("smoke", OVERRIDES).runs():
        train(run, str(tmp_path))
        assert read_run(run_path(URL, run.run_id)).head == read_run(run_path(tmp_path, run.run_id)).head
    for words in (["status"], ["verify", "--deep"], ["analyze"], ["claims"], ["report", "--out", str(tmp_path / "r")]):
        subprocess.run([str(COMMAND), words[0], URL, *words[1:]], check=True, capture_output=True)
    rows = sum(len(digests) for groups in seen.values() for digests in groups.values())
    assert rows > 0
    measured("R1", "SIGKILL of `ntk-eos run`, S3 server", kills=kills, rows_seen=rows, rows_lost=lost)
    measured("R5", "SIGKILL of `ntk-eos run`, S3 server", kills=kills, equal_heads=2)


GROUPS = {"snapshots": ["ntk"], "train": ["loss"]}


def write(url, steps):
    """The writer that is killed."""
    with open_writer(url, groups=GROUPS) as writer:
        go_on(writer, steps, tuple(GROUPS))


def look(url, seen):
    """What is there is what was written, also through xarray alone, and no less than before; its rows, and the lot."""
    if not is_run(run_path(url, RUN)):
        assert not seen
        return 0
    run = find_run(url, RUN)
    rows = assert_rows_are_those_of_their_steps(run)
    plain = ObjectStore(from_url(str(run.path)), read_only=True)
    with xr.open_datatree(plain, engine="zarr") as tree:
        for group in GROUPS:
            ds = tree[group].to_dataset()
            columns = {name: array.values for name, array in ds.variables.items() if name != "digest"}
            assert_columns_are_those_of_their_steps(group, ds.sizes["step"], columns)
            assert ds.sizes["step"] >= run.lengths[group] >= seen.get(group, 0)
            seen[group] = ds.sizes["step"]
            rows += ds.sizes["step"]
    return rows


@sizes("kills", full=10, soak=300)
def test_a_killed_writer_loses_nothing_and_shows_nothing_half(server, tmp_path, measured, kills):
    dice, done, rows, looks, runs = random.Random(kills), 0, 0, 0, 0
    with Warm(__file__, "write") as warm:
        while done < kills:
            url, seen, runs = f"{URL}-{runs}", {}, runs + 1
            for number in range(min(10, kills - done)):
                before, patience = commits(url), time.monotonic() + 60
                with warm.call(url, 10**6) as writer:
                    # Every fourth kill hits anywhere, opening and creation included.
                    while number % 4 and commits(url) == before and time.monotonic() < patience:
                        time.sleep(0.05)
                    deadline = time.monotonic() + dice.uniform(0, 1)
                    while time.monotonic() < deadline:
                        rows, looks = rows + look(url, seen), looks + 1
                    assert writer.kill(), "the writer failed"
                done += 1
                rows, looks = rows + look(url, seen), looks + 1
                # Nobody waits for a minute here: whoever knows that the writer is dead may delete its lease.
                door(run_path(url, RUN)).delete(LEASE)
            with open_writer(url, groups=GROUPS) as writer:
                steps = next_step(writer) + 5
                advance(writer, steps, groups=tuple(GROUPS))
            head = write_run(tmp_path / str(runs), steps, groups=GROUPS, status=None).head
            assert find_run(url, RUN).head == head
            assert [problem for problem in verify(find_run(url, RUN), deep=True) if problem.damage] == []
    assert rows > kills
    measured("R1", "SIGKILL of a writer, S3 server", kills=done, runs=runs, looks=looks, rows_seen=rows, rows_lost=0)
    measured("R2", "readers during SIGKILLs: ours, open_datatree; S3 server", kills=done, looks=looks, rows_seen=rows,
             torn=0)  # fmt: skip


def test_the_server_ends_with_whoever_started_it():
    code = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(PYTHON), str(Path(__file__).with_name("s3_server.py")), "0"]
    pid = int(subprocess.run(command, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
