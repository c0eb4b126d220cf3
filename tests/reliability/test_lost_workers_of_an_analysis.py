"""SIGKILL of Dask workers while they compute: every measure has the bits of one that was computed alone."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import dask
import pytest
from anywhere import GROUPS, Workers, assert_same_bits, lasting_cluster, measure_of, store_with_everything
from sizes import sizes

import analysis
from analysis import results


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return store_with_everything(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def workers():
    with lasting_cluster(losses=1000, seed=0) as workers:
        yield workers


@contextmanager
def killing(workers: Workers, seed: int) -> Iterator[list[float]]:
    """SIGKILL of a random worker, a random moment after both are there; yields when."""
    dice, killed, stop = random.Random(seed), [], threading.Event()

    def kill() -> None:
        while not stop.wait(dice.uniform(1, 4)):
            if workers.are_there():
                workers.kill()
                killed.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


@sizes("kills", full=20, soak=20 * len(GROUPS))
def test_killed_workers_change_no_bit_of_a_measure(root, workers, measured, kills):
    with dask.config.set(scheduler="sync"):
        alone = {name: measure_of(name, root)() for name in GROUPS}
    computed = 0
    with analysis.computing(workers.cluster.scheduler_address), killing(workers, kills) as killed:
        while len(killed) < kills or computed < len(GROUPS):
            name = list(GROUPS)[computed % len(GROUPS)]
            assert_same_bits(measure_of(name, root)(), alone[name])
            computed += 1
    measured("R21", "measures on a cluster", measures=len(GROUPS), computed=computed, kills=len(killed), other_bits=0)


@sizes("kills", full=5, soak=20)
def test_killed_workers_change_no_result_of_a_store(root, workers, measured, kills):
    def files() -> dict[str, bytes]:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "analysis").rglob("*.zip")}

    results.analyze(root)
    alone, rounds, started = files(), 0, time.monotonic()
    with analysis.computing(workers.cluster.scheduler_address), killing(workers, kills) as killed:
        while len(killed) < kills or not rounds:
            for path in (root / "analysis").rglob("*.zip"):
                path.unlink()
            results.analyze(root)
            assert files() == alone
            rounds += 1
    assert time.monotonic() - started < 600
    measured("R21", "results of a store, by a cluster", results=len(alone) * rounds, kills=len(killed), other_bytes=0)
