"""Connecting to a Dask scheduler: every way in which that fails is one line, in a stated time."""

import os
import socket
import subprocess
import sys
import time
from importlib import metadata

import pytest
from distributed import LocalCluster

from pipeline import cluster
from pipeline.cluster import TRAINING, ask_workers, connect, within, workers
from pipeline.errors import InputError, NtkEosError


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler whose worker is a thread of this process."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    ) as local:
        yield local.scheduler_address


def test_workers_are_known_and_answer(scheduler):
    with connect(scheduler, TRAINING) as client:
        (worker,) = workers(client)
        assert ask_workers(client, os.getpid) == {worker: os.getpid()}
        (failure,) = ask_workers(client, len, 1).values()
        assert isinstance(failure, TypeError), "what fails there is told, not raised"


@pytest.mark.parametrize("address", ["", "host", "host:port", "gopher://host:1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match=r"must be an address such as tcp://host:8786"), connect(address, TRAINING):
        pass


@pytest.mark.parametrize("listening", [False, True], ids=["nobody", "somebody who says nothing"])
def test_where_no_scheduler_answers_one_line_says_so(listening):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        code = (
            "import sys\nfrom pipeline import cluster\ncluster.CONNECT_SECONDS = 0.5\n"
            "try:\n    with cluster.connect(sys.argv[1], ()): pass\n"
            "except cluster.NtkEosError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=30)
    said = f"no Dask scheduler answers at {address}: start one with `dask scheduler`, or correct the address\n"
    assert (done.stdout, done.stderr) == (said, "")


def test_a_scheduler_without_workers_is_waited_for_no_longer_than_said():
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0") as empty,
        pytest.raises(NtkEosError, match=r"had no worker for 0 s: start one with `dask worker tcp://127\.0\.0\.1:\d+`"),
        connect(empty.scheduler_address, TRAINING, worker_seconds=0),
    ):
        pass


def test_workers_of_another_version_are_refused(scheduler, monkeypatch):
    there = metadata.version("torch").partition("+")[0]
    # What is asked on the worker is asked of the same function here: it answers the second time.
    answers = iter(["2.99.0+cpu", there])
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: next(answers) if name == "torch" else version(name))
    message = rf"worker tcp://127\.0\.0\.1:\d+ has torch {there} \(here 2\.99\.0\): install the same versions"
    with pytest.raises(NtkEosError, match=message), connect(scheduler, TRAINING):
        pass


def test_builds_of_one_version_for_other_devices_go_together(scheduler, monkeypatch):
    answers = iter(["2.99.0+cpu", "2.99.0+cu126"])
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: next(answers) if name == "torch" else version(name))
    with connect(scheduler, TRAINING) as client:
        assert workers(client)


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    message = r"needs the extra `distributed`: pip install '\.\[distributed\]'"
    with pytest.raises(NtkEosError, match=message), connect("tcp://host:8786", TRAINING):
        pass


def test_a_scheduler_that_ends_is_missed(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with (
        LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=":0") as local,
        connect(local.scheduler_address, TRAINING) as client,
    ):
        local.close()
        with pytest.raises(NtkEosError, match="the Dask scheduler is gone, or does not answer any more"):
            workers(client)


def test_work_that_takes_too_long_is_left_alone():
    with pytest.raises(TimeoutError):
        within(0.01, lambda: within(1, lambda: time.sleep(0.2)))
