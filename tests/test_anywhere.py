"""Measures on threads and on a Dask cluster: the same bits, within a budget, and one line for what goes wrong."""

import re
from types import SimpleNamespace

import dask
import numpy as np
import pytest
from anywhere import GROUPS, assert_same_bits, measure_of, store_with_everything
from click.testing import CliRunner
from distributed import LocalCluster
from mock_store import mock_run

import analysis
from analysis import compute, results
from pipeline import cluster as way
from pipeline.cli import main
from pipeline.errors import DamagedStore, InputError
from pipeline.store import list_runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return store_with_everything(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.mark.parametrize("name", GROUPS)
def test_every_measure_has_the_same_bits_anywhere(name, root, cluster):
    measure = measure_of(name, root)
    with dask.config.set(scheduler="sync"):
        alone = measure()
    with analysis.computing(memory="2GiB"), dask.config.set(num_workers=4):
        assert_same_bits(measure(), alone)
    with analysis.computing(cluster.scheduler_address):
        assert_same_bits(measure(), alone)


def test_results_of_a_store_are_the_same_files(root, cluster, tmp_path):
    def files() -> dict[str, bytes]:
        found = {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "analysis").rglob("*.zip")}
        for path in (root / "analysis").rglob("*.zip"):
            path.unlink()
        return found

    results.analyze(root)
    alone = files()
    said = CliRunner().invoke(main, ["analyze", str(root), "--scheduler", cluster.scheduler_address])
    assert said.exit_code == 0, said.output
    assert f"dashboard: {cluster.dashboard_link}" in said.stderr
    assert files() == alone
    assert len(alone) > 5


def test_the_graph_of_a_measure_does_not_grow_with_the_snapshots(tmp_path):
    tasks = set()
    for steps in (8, 64):
        mock_run(tmp_path / str(steps), 0.1, 0, steps=steps)
        ds = analysis.open_sweep(tmp_path / str(steps))
        tasks.add(len(analysis.alignment(ds).__dask_graph__()))
    assert len(tasks) == 1


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_decides_how_many_tasks_run_at_once(monkeypatch):
    monkeypatch.setattr("dask.system.cpu_count", lambda: 64)
    with analysis.computing(memory=10 * compute.TASK_BYTES + 1):
        assert compute.tasks_at_once() == 10
        with compute.threads_for(5 * compute.TASK_BYTES):
            assert compute.tasks_at_once() == 2
        assert compute.tasks_at_once() == 10
    with analysis.computing(memory="1TiB"):
        assert compute.tasks_at_once() == 64


def test_half_of_the_free_memory_is_the_budget_by_default(monkeypatch):
    monkeypatch.setattr("dask.system.cpu_count", lambda: 64)
    free = SimpleNamespace(available=6 * compute.TASK_BYTES)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with analysis.computing():
        assert compute.tasks_at_once() == 3
        with compute.threads_for(2**60):  # nobody gave a budget: it is tried
            assert compute.tasks_at_once() == 1


def test_eigenvalues_of_a_large_kernel_take_more_than_a_block(root):
    runs = list_runs(root)
    assert compute.task_bytes(runs) == compute.TASK_BYTES
    node = runs[0].node("snapshots/ntk")
    node["shape"][1:] = [5000, 5000]
    assert compute.task_bytes(runs) == 24 * 5000**2
    node["shape"][1:] = [20_000, 20_000]  # all its eigenvalues are never taken
    assert compute.task_bytes(runs) == compute.TASK_BYTES


@pytest.mark.parametrize("memory", ["lots", "-1GiB", -1, 0, "0", "1e999", "nan"])
def test_a_budget_is_a_number_of_bytes(memory):
    with (
        pytest.raises(InputError, match=r"memory = .*: must be a number of bytes"),
        analysis.computing(memory=memory),
    ):
        pass


def test_a_budget_that_has_no_room_for_a_task_is_refused(root):
    with (
        pytest.raises(InputError, match=r"memory = 1.00 MiB: a task takes up to 320.00 MiB here"),
        analysis.computing(memory="1MiB"),
    ):
        pass
    said = CliRunner().invoke(main, ["analyze", str(root), "--memory", "1MiB"])
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)


def test_a_cluster_has_its_own_memory(root):
    with pytest.raises(InputError, match="the workers of a cluster have their own"), analysis.computing("tcp://x:1", 1):
        pass
    said = CliRunner().invoke(main, ["analyze", str(root), "--memory", "1GiB", "--scheduler", "tcp://127.0.0.1:1"])
    assert said.exit_code == 2
    assert "--scheduler and --memory: give one" in said.stderr


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_scheduler_that_is_not_there_is_one_line(root, monkeypatch):
    monkeypatch.setattr(way, "CONNECT_SECONDS", 1)
    said = CliRunner().invoke(main, ["analyze", str(root), "--scheduler", "tcp://127.0.0.1:9"])
    assert said.exit_code == 1
    assert said.stderr.startswith("error: no Dask scheduler answers at tcp://127.0.0.1:9: start one with")
    assert said.stderr.count("\n") == 1


def test_damage_that_a_worker_finds_names_the_file(tmp_path, cluster):
    chunk = mock_run(tmp_path, 0.1, 0, steps=4) / "snapshots/ntk/c.1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with (
        analysis.computing(cluster.scheduler_address),
        pytest.raises(DamagedStore, match=f"{re.escape(str(chunk))}: checksum does not match"),
    ):
        analysis.alignment(analysis.open_sweep(tmp_path)).compute()


def test_a_worker_uses_one_thread_of_blas(cluster):
    def threads():
        from threadpoolctl import threadpool_info

        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with analysis.computing(cluster.scheduler_address) as client:
        assert set(map(frozenset, client.run(threads).values())) == {frozenset({1})}
        np.testing.assert_array_equal(dask.array.ones(3, chunks=1).compute(), 1)
