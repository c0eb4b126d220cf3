"""Tiles of a kernel on the workers of a Dask cluster: the bits of one process, and one line for what goes wrong."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import KilledWorker, LocalCluster
from torch import nn

from pipeline import remote_tiles, schema, tiles
from pipeline.cli import main
from pipeline.config import Compute, File, Imported, Mlp, Record, RunConfig, Stop
from pipeline.errors import InputError, NtkEosError
from pipeline.forecast import forecast
from pipeline.remote_tiles import Workers
from pipeline.replay import replay
from pipeline.spectra import NonFiniteKernel
from pipeline.store import read_run, run_path
from pipeline.tiles import TileMaker, forget, make_elsewhere
from pipeline.train import train
from pipeline.verify import verify_root

N = 400


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes, one with more threads than one: it makes a tile at a time all the same."""
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Examples, and a module with a model."""
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 4)), rng.normal(size=(N, 2))
    np.savez(folder / "train.npz", x=x[:9], y=y[:9])
    np.savez(folder / "probe.npz", x=x, y=y)
    x[-1] = 1e30
    np.savez(folder / "wild.npz", x=x, y=y)
    return folder


def recorded(folder, name="store", **changes):
    """A run of two threads, whose sums depend on their number."""
    run = RunConfig(
        learning_rate=0.1, data=File(file=str(folder / "train.npz")), compute=Compute(threads=2),
        record=Record(eigenpairs=3, snapshots={"every": 4}),
        **{"stop": Stop(steps=4), "model": Mlp(width=6, depth=1), **changes},
    )  # fmt: skip
    train(run, str(folder / name))
    return run_path(folder / name, run.run_id)


@pytest.fixture(scope="module")
def run(folder):
    return recorded(folder)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(schema, "TILED", 20)
    monkeypatch.setattr(schema, "TILE", 150)


def test_the_workers_of_a_cluster_make_the_same_tiles(run, folder, cluster, monkeypatch):
    probe = folder / "probe.npz"
    alone = read_run(replay(run, probe=probe, at="all"))
    shutil.rmtree(alone.path)
    monkeypatch.setattr(TileMaker, "make", lambda *_: pytest.fail("a tile was made here"))
    monkeypatch.chdir(run.parents[1])  # the workers are elsewhere
    said = CliRunner().invoke(
        main, ["kernel", ".", "--probe", str(probe), "--at", "all", "--scheduler", cluster.scheduler_address, "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert said.exit_code == 0, said.stderr
    found = read_run(alone.path)
    assert (found.status, found.lengths, found.head) == ("complete", {"snapshots": 2}, alone.head)
    assert verify_root(alone.path.parent.parent, deep=True) == []


def test_afterwards_the_workers_hold_no_maker(run, folder, cluster):
    replay(run, probe=folder / "probe.npz", scheduler=cluster.scheduler_address)

    def held():
        from pipeline.tiles import _makers

        return len(_makers)

    with cluster.get_client() as client:
        assert set(client.run(held).values()) == {0}


def test_a_tile_that_is_not_finite_ends_it_from_a_worker_too(run, folder, cluster):
    with pytest.raises(NonFiniteKernel, match="step 4: ntk is not finite between the examples 300 to 399 and"):
        replay(run, probe=folder / "wild.npz", scheduler=cluster.scheduler_address)


MODEL = """
from torch import nn

def build(input_shape, outputs):
    return nn.Sequential(nn.Linear(*input_shape, 5), nn.{activation}(), nn.Linear(5, outputs))
"""


def test_a_model_of_the_users_own_is_what_the_run_trained(folder, cluster, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (folder / "remote_model.py").write_text(MODEL.format(activation="Tanh"))
    options = {"probe": folder / "probe.npz", "allow_imports": True, "scheduler": cluster.scheduler_address}
    tanh = recorded(folder, "tanh", model=Imported.model_validate({"import": "remote_model:build"}))
    replay(tanh, **options)
    (folder / "remote_model.py").write_text(MODEL.format(activation="ReLU"))
    del sys.modules["remote_model"]
    relu = recorded(folder, "relu", model=Imported.model_validate({"import": "remote_model:build"}))
    with pytest.raises(InputError, match="predicts other values than were recorded"):
        replay(relu, **options)  # the workers still have the other one


# --- what a cluster cannot do -----------------------------------------------------------------------------------------


def test_what_a_cluster_cannot_do_is_refused(run, folder, cluster):
    address, probe = cluster.scheduler_address, folder / "other.npz"
    shutil.copy(folder / "wild.npz", probe)
    with pytest.raises(InputError, match=f"{address}: a model that is given is in the memory of one process"):
        replay(run, probe=probe, model=nn.Linear(4, 2), scheduler=address)
    with pytest.raises(InputError, match="n = 9 examples is not computed in tiles, so it is computed here; leave"):
        replay(run, probe="train", scheduler=address)
    said = CliRunner().invoke(main, ["kernel", str(run), "--probe", str(probe), "--plan", "--scheduler", address])
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert "--plan: says what it would take on this machine; leave --scheduler out" in said.stderr


def test_what_is_refused_removes_nothing(folder):
    path = recorded(folder, "extended")
    before = replay(path, probe=folder / "probe.npz")
    recorded(folder, "extended", stop=Stop(steps=8))
    with pytest.raises(NtkEosError, match="no Dask scheduler answers"):
        replay(path, probe=folder / "probe.npz", scheduler="tcp://127.0.0.1:9")
    assert read_run(before).attrs["last_step"] == 4
    assert forecast(path, probe=folder / "probe.npz").rows == 1, "of the extended run there is nothing yet"
    assert read_run(replay(path, probe=folder / "probe.npz")).attrs["last_step"] == 8


@pytest.fixture
def alone(cluster, tmp_path):
    """Workers that make nothing, with a client of their cluster."""
    with cluster.get_client() as client:
        yield Workers(client, 1, lambda: None, tmp_path, gpu=False)


def test_a_lost_worker_is_no_end_and_many_are(alone):
    def late(timeout):
        raise TimeoutError

    assert alone.result(SimpleNamespace(status="finished", result=late)) is None
    killed = KilledWorker("a tile", SimpleNamespace(address="tcp://x:1"), 3)
    with pytest.raises(NtkEosError, match="a tile has lost 4 workers: is their memory too small"):
        alone.result(SimpleNamespace(status="error", exception=lambda timeout: killed))
    with pytest.raises(NtkEosError, match="the connection to the Dask scheduler was lost; what was computed is saved"):
        alone.result(SimpleNamespace(status="cancelled"))


def test_without_a_worker_it_waits_for_a_while(alone, monkeypatch):
    assert alone.places() == 2
    monkeypatch.setattr(remote_tiles, "LOOK_SECONDS", 0)
    monkeypatch.setattr(remote_tiles, "workers", lambda client: {})
    assert alone.places() == 1
    monkeypatch.setattr(remote_tiles, "ALONE_SECONDS", 0)
    with pytest.raises(NtkEosError, match="the scheduler has no worker: start one by `dask worker ADDRESS`; then the"):
        alone.places()


def test_a_gpu_that_no_worker_offers_is_missed_at_once(cluster, tmp_path):
    with (
        cluster.get_client() as client,
        pytest.raises(NtkEosError, match="no worker offers a GPU: start one per GPU by `dask worker"),
    ):
        Workers(client, 1, lambda: None, tmp_path, gpu=True).places()


def test_a_store_that_a_worker_does_not_reach_is_missed_at_once(alone, monkeypatch):
    async def nothing(folder, key):
        return "there is no such folder"

    monkeypatch.setattr("pipeline.cluster.finds", nothing)
    with pytest.raises(NtkEosError, match=r"worker tcp://.* does not reach .* \(there is no such folder\)"):
        alone.places()


def test_nothing_is_made_for_a_command_that_has_ended():
    made = []
    maker = SimpleNamespace(make=lambda task: made.append(task) or np.zeros(3))
    for task in range(2):
        make_elsewhere("one", 1, lambda: maker, task)
    forget("one")
    assert tiles._makers == {}
    with pytest.raises(NtkEosError, match="the command that wanted this tile has ended"):
        make_elsewhere("one", 1, lambda: maker, 2)
    assert made == [0, 1]
