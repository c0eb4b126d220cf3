"""The NTK of more examples than memory holds, by the command: tile by tile, killed, resumed, by several processes.

Memory is the resident set of the command and all its children, looked at every 20 ms from outside. The reference is
ARPACK on the stored kernel, which the test, having more memory, loads in full.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from anywhere import lasting_cluster
from large_kernel import PAIRS, command, trained, watched
from scipy.sparse.linalg import LinearOperator, eigsh
from sizes import sizes

from pipeline import schema
from pipeline.replay import replay
from pipeline.store import read_run
from pipeline.verify import verify_root

BUDGET = 2**30


def product_with(kernel: np.ndarray) -> LinearOperator:
    """Products in float64 with a kernel in float32, without a copy of it."""

    def times(vector: np.ndarray) -> np.ndarray:
        bands = range(0, len(kernel), 500)
        return np.concatenate([kernel[i : i + 500].astype(np.float64) @ vector.ravel() for i in bands])

    return LinearOperator(kernel.shape, times, dtype=np.float64)


@sizes("n", full=20_000, soak=50_000)
def test_a_kernel_larger_than_the_memory_it_is_computed_in(tmp_path, measured, n):
    run, probe = trained(tmp_path, n)
    started = time.monotonic()
    path, most = watched(command(run, probe, "--memory", "1GiB"))
    seconds = time.monotonic() - started
    assert most < BUDGET < 4 * n**2
    found = read_run(path)
    kernel = found.read("snapshots/ntk")[0]
    values = found.read("snapshots/eigenvalue")[0]
    reference = eigsh(product_with(kernel), PAIRS, ncv=3 * PAIRS, tol=1e-6, v0=np.ones(n))[0][::-1]
    error = float(np.max(np.abs(values / reference - 1)))
    assert error < 1e-5
    np.testing.assert_array_equal(kernel[:3000], kernel[:, :3000].T)
    assert abs(found.read("snapshots/trace")[0] / np.trace(kernel, dtype=np.float64) - 1) < 1e-6
    squares = sum(np.sum(kernel[i : i + 500].astype(np.float64) ** 2) for i in range(0, n, 500))
    assert abs(found.read("snapshots/frobenius_norm")[0] / np.sqrt(squares) - 1) < 1e-6
    del kernel
    assert verify_root(path.parent.parent, deep=True) == []
    measured(
        "R22", f"NTK of n = {n} in tiles", kernel_mib=4 * n**2 >> 20, peak_mib=most >> 20, budget_mib=BUDGET >> 20,
        eigenvalues=PAIRS, largest_relative_error=error, seconds=round(seconds),
    )  # fmt: skip


# The library call behind the command, with small tiles and a commit after each.
REPLAY = """
import sys
from pipeline import replay, schema
schema.TILED, schema.TILE, replay.COMMIT_SECONDS = 1, 256, 0.0
print(replay.replay(sys.argv[1], probe=sys.argv[2], workers=int(sys.argv[3])))
"""


def replaying(run: Path, probe: Path, workers: int) -> list[str]:
    return [sys.executable, "-c", REPLAY, str(run), str(probe), str(workers)]


@sizes("kills", full=5, soak=100)
def test_kills_and_two_processes_change_no_bit(tmp_path, measured, kills):
    n, dice = 3000, random.Random(kills)
    run, probe = trained(tmp_path, n)
    printed = subprocess.run(replaying(run, probe, 1), check=True, capture_output=True, text=True).stdout
    whole = read_run(printed.strip())
    tiles, seen = whole.attrs["commits"] - 2, 0
    shutil.rmtree(whole.path)
    for _ in range(kills):
        before = commits(whole.path)
        if before > tiles // 2:  # from the beginning, lest it be done before it is killed
            shutil.rmtree(whole.path)
            before = 0
        wanted = before + dice.randint(1, tiles // 4)
        with psutil.Popen(replaying(run, probe, 2), stdout=subprocess.DEVNULL) as process:
            patience = time.monotonic() + 120
            while commits(whole.path) < wanted and time.monotonic() < patience:
                time.sleep(0.005)
            assert process.poll() is None, "it was done before it was killed"
            children = process.children(recursive=True)
            process.send_signal(signal.SIGKILL)
            assert psutil.wait_procs(children, timeout=20)[1] == [], "a worker outlived its parent"
        seen += commits(whole.path) - before
    assert seen > kills
    subprocess.run(replaying(run, probe, 2), check=True, stdout=subprocess.DEVNULL)
    assert read_run(whole.path).head == whole.head
    assert verify_root(whole.path.parent.parent, deep=True) == []
    measured("R5", "SIGKILL of a kernel in tiles, two processes against one", kills=kills, tiles=tiles, heads_differ=0)


@sizes("kills, side", full=(6, 256), soak=(60, 100))
def test_lost_workers_of_a_cluster_change_no_bit(tmp_path, measured, monkeypatch, kills, side):
    run, probe = trained(tmp_path, 3000)
    monkeypatch.setattr(schema, "TILED", 1)
    monkeypatch.setattr(schema, "TILE", side)
    monkeypatch.setattr("pipeline.replay.COMMIT_SECONDS", 0.0)
    whole = read_run(replay(run, probe=probe))
    shutil.rmtree(whole.path)
    tiles = killed = 0
    with lasting_cluster(losses=1000, seed=kills) as workers:

        def kill(*_: object) -> None:
            """Every few tiles; both workers may be lost at a time."""
            nonlocal tiles, killed
            tiles += 1
            if killed < min(kills, tiles // 7):
                workers.kill()
                killed += 1

        replay(run, probe=probe, scheduler=workers.cluster.scheduler_address, progress=kill)
    assert killed == kills
    assert read_run(whole.path).head == whole.head
    # A worker that is killed while it writes leaves a file that nobody reads; `repair` removes it.
    assert [found for found in verify_root(whole.path.parent.parent, deep=True) if found.damage] == []
    measured("R21", "a kernel in tiles, SIGKILL of a worker", kills=kills, tiles=tiles, heads_other=0)


def commits(path: Path) -> int:
    return read_run(path).attrs["commits"] if (path / "zarr.json").exists() else 0
