"""Kernels in tiles against dense Jacobians in float64, with tiles of a few examples; and replays that use them."""

import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import oracles
import psutil
import pytest
import torch
from bucket import URL, Bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import analysis
from pipeline import replay as replay_module
from pipeline import schema
from pipeline.config import File, Mlp, Record, RunConfig, Stop
from pipeline.disk import Directory, door
from pipeline.errors import DamagedStore, InputError
from pipeline.forecast import forecast
from pipeline.repair import repair_root
from pipeline.replay import replay
from pipeline.spectra import NonFiniteKernel
from pipeline.store import InChunks, NonFiniteRow, read_run, row_digest, run_path
from pipeline.tiles import Ledger, TileMaker, peak_bytes, product, tasks_of
from pipeline.train import train
from pipeline.verify import verify_root

TILE = 7


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


# --- the tiles -------------------------------------------------------------------------------------------------------


def mlp(d, c):
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, c))


def convolution(d, c):
    return nn.Sequential(
        nn.Unflatten(1, (1, d)), nn.Conv1d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(c)
    )


def normalised(d, c):
    return nn.Sequential(nn.Linear(d, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, c))


ARCHITECTURES = {"mlp": mlp, "convolution": convolution, "normalised": normalised}


def made(folder, name, n, tile, c, seed):
    """A model, its examples, and its kernel in tiles."""
    torch.manual_seed(seed)
    x, train, y = torch.randn(n, 3), torch.randn(4, 3), torch.randn(n, c)
    model = ARCHITECTURES[name](3, c)
    model(x)
    arrays = {
        "ntk": InChunks(Directory(folder), "snapshots/ntk", 0, (n, n), (tile, tile), np.dtype("f4")),
        "ntk_train_cross": InChunks(Directory(folder), "snapshots/cross", 0, (n, 4), (tile, 4), np.dtype("f4")),
    }
    maker, ledger = TileMaker(model, {"name": "ntk"}, x, y, train, arrays), Ledger(0, arrays, {})
    for task in ledger.left:
        ledger.enter(task, maker.make(task))
    return model, x, y, train, arrays, maker, ledger


@given(
    name=st.sampled_from(sorted(ARCHITECTURES)), n=st.integers(1, 20), tile=st.integers(1, 22), c=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_tiles_are_the_kernel_and_their_sums_those_of_it(tmp_path_factory, name, n, tile, c, seed):
    folder = tmp_path_factory.mktemp("tiles")
    model, x, y, train, arrays, _, ledger = made(folder, name, n, tile, c, seed)
    expected = oracles.trace(oracles.ntk(model, x))
    kernel = np.concatenate(list(arrays["ntk"].bands()))
    size = np.abs(expected).max()
    np.testing.assert_allclose(kernel, expected, atol=1e-5 * size)
    np.testing.assert_array_equal(kernel, kernel.T)
    cross = np.concatenate(list(arrays["ntk_train_cross"].bands()))
    np.testing.assert_allclose(cross, oracles.trace(oracles.ntk(model, x, train)), atol=1e-5 * size)
    exact, targets = kernel.astype(float), y.numpy().astype(float)
    sums = np.linalg.norm(exact), np.trace(exact), np.einsum("nc,nc->", targets, exact @ targets)
    np.testing.assert_allclose(ledger.totals(), sums, rtol=1e-12, atol=1e-12 * size * n**2)
    vectors = np.random.default_rng(seed).normal(size=(2, n))
    np.testing.assert_allclose(product(arrays["ntk"])(vectors), vectors @ exact, atol=1e-12 * size * n)


def test_bits_depend_neither_on_the_order_nor_on_threads_nor_on_what_is_kept(tmp_path):
    model, x, y, train, arrays, _, ledger = made(tmp_path / "one", "convolution", 20, 6, 2, 0)
    other = {name: InChunks(**{**vars(a), "directory": Directory(tmp_path / "two")}) for name, a in arrays.items()}
    maker, again = TileMaker(model, {"name": "ntk"}, x, y, train, other, spare=10**9), Ledger(0, other, {})
    for task in reversed(maker.ordered(again.left)):
        again.enter(task, maker.make(task))
    assert again.totals() == ledger.totals()
    for name, array in arrays.items():
        for index in array.grid():
            assert other[name].directory.get(array.key(index)) == array.directory.get(array.key(index))
    vectors = np.random.default_rng(0).normal(size=(3, 20))
    np.testing.assert_array_equal(product(arrays["ntk"], threads=3)(vectors), product(arrays["ntk"])(vectors))


def test_tasks_are_ordered_in_panels_of_what_is_kept(tmp_path):
    *_, maker, ledger = made(tmp_path, "mlp", 20, 4, 1, 0)
    assert maker.ordered(reversed(ledger.tasks)) == ledger.tasks  # two blocks: row by row
    maker._pairs.held = 4
    rows = [index for name, index in maker.ordered(ledger.tasks) if name == "ntk"]
    assert rows[:7] == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert sorted(maker.ordered(ledger.tasks)) == sorted(ledger.tasks)


def test_half_of_the_tiles_is_computed(tmp_path):
    array = InChunks(Directory(tmp_path), "snapshots/ntk", 0, (20, 20), (6, 6), np.dtype("f4"))
    assert tasks_of({"ntk": array}) == [("ntk", (i, j)) for i in range(4) for j in range(i + 1)]


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), data=st.data())
@settings(deadline=None, max_examples=30)
def test_a_value_in_chunks_has_the_digest_of_the_array(tmp_path_factory, shape, data):
    chunks = tuple(data.draw(st.integers(1, size + 1)) for size in shape)
    value = np.random.default_rng(0).normal(size=shape).astype("f4")
    folder = Directory(tmp_path_factory.mktemp("chunks"))
    stored = InChunks(folder, "snapshots/ntk", 3, value.shape, chunks, value.dtype)
    for index in stored.grid():
        stored.put(index, value[stored.region(index)])
    with patch("pipeline.store.BAND_BYTES", data.draw(st.integers(1, 200))):
        assert max(map(np.size, stored.bands()), default=0) <= value.size
        variables = [schema.KERNELS["ntk"]]
        assert row_digest("snapshots", variables, {"ntk": stored}) == row_digest("snapshots", variables, {"ntk": value})


def test_what_is_not_finite_is_refused(tmp_path):
    array = InChunks(Directory(tmp_path), "snapshots/ntk", 0, (4, 4), (2, 2), np.dtype("f4"))
    for bad in (np.nan, np.inf, 1e39):
        with pytest.raises(NonFiniteRow, match=r"chunk \(1, 0\) of snapshots/ntk is not finite"):
            array.put((1, 0), np.array([[1, bad], [1, 1]]))
    assert not list(array.directory.list())
    x = torch.ones(4, 3)
    x[3] = 1e30
    maker = TileMaker(nn.Linear(3, 1), {"name": "ntk"}, x, None, x, {"ntk": array})
    maker.make(("ntk", (0, 0)))
    with pytest.raises(NonFiniteKernel, match="ntk is not finite between the examples 2 to 3 and 2 to 3"):
        maker.make(("ntk", (1, 1)))


# --- replays ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    np.savez(root / "train.npz", x=rng.normal(size=(9, 4)), y=rng.normal(size=(9, 2)))
    np.savez(root / "probe.npz", x=rng.normal(size=(20, 4)), y=rng.normal(size=(20, 2)))
    run = RunConfig(
        learning_rate=0.1, data=File(file=str(root / "train.npz")), model=Mlp(width=6, depth=1), stop=Stop(steps=4),
        record=Record(eigenpairs=3, snapshots={"every": 2}),
    )  # fmt: skip
    train(run, str(root / "store"))
    return run_path(root / "store", run.run_id)


@pytest.fixture
def run(shared, tmp_path):
    """A copy of the run, to write beside."""
    shutil.copytree(shared.parents[2], tmp_path / "copy")
    return tmp_path / "copy" / "store" / "runs" / shared.name


@pytest.fixture
def small_tiles(monkeypatch):
    """Kernels go in tiles from 1 example on."""
    monkeypatch.setattr(schema, "TILED", 1)
    monkeypatch.setattr(schema, "TILE", TILE)
    monkeypatch.setattr(replay_module, "COMMIT_SECONDS", 0.0)


def probe_of(run):
    return run.parents[2] / "probe.npz"


def test_a_replay_in_tiles_holds_what_one_in_memory_holds(run, monkeypatch):
    in_memory = read_run(replay(run, probe=probe_of(run), at="all"))
    values = {name: in_memory.read(f"snapshots/{name}") for name in in_memory.arrays("snapshots")}
    shutil.rmtree(in_memory.path)
    monkeypatch.setattr(schema, "TILED", 1)
    monkeypatch.setattr(schema, "TILE", TILE)
    path = replay(run, probe=probe_of(run), at="all")
    found = read_run(path)
    assert path == in_memory.path
    assert found.node("snapshots/ntk")["chunk_grid"]["configuration"]["chunk_shape"] == [1, TILE, TILE]
    assert found.arrays("snapshots").keys() == values.keys()
    for name in values.keys() - {"digest", "eigenvalue_residual"}:
        close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(values[name]).max(), "err_msg": name}
        np.testing.assert_allclose(found.read(f"snapshots/{name}"), values[name], **close)
    root = path.parent.parent
    assert verify_root(root, deep=True) == []
    ds = analysis.open_sweep(root)
    np.testing.assert_allclose(ds.ntk[-1], values["ntk"][-1], rtol=1e-4, atol=1e-5)
    pairs = np.linalg.eigh(found.read("snapshots/ntk")[-1].astype(float))
    np.testing.assert_allclose(found.read("snapshots/eigenvalue")[-1], pairs[0][:-4:-1], rtol=1e-10)


def test_a_replay_that_is_cut_off_goes_on_at_the_next_tile(run, small_tiles, monkeypatch):
    whole = read_run(replay(run, probe=probe_of(run), at="all"))
    shutil.rmtree(whole.path)
    make, made = TileMaker.make, []

    def cut(self, task):
        if len(made) == 10:  # in the second row: a row is 6 tiles, and one chunk with the training examples
            raise KeyboardInterrupt
        made.append(task)
        return make(self, task)

    monkeypatch.setattr(TileMaker, "make", cut)
    with pytest.raises(KeyboardInterrupt):
        replay(run, probe=probe_of(run), at="all")
    cut_off = read_run(whole.path)
    assert cut_off.lengths == {"snapshots": 1}
    again = []
    monkeypatch.setattr(TileMaker, "make", lambda self, task: again.append(task) or make(self, task))
    assert read_run(replay(run, probe=probe_of(run), at="all")).head == whole.head
    assert [*made, *again] == [*made[:7] * 3]
    assert verify_root(whole.path.parent.parent, deep=True) == []


def test_tiles_that_are_gone_are_computed_again(run, small_tiles, monkeypatch):
    whole = read_run(replay(run, probe=probe_of(run)))
    shutil.rmtree(whole.path)
    with (
        patch.object(replay_module, "leading_pairs", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        replay(run, probe=probe_of(run))
    root = whole.path.parent.parent
    assert len([debris for debris in repair_root(root, apply=True) if "never committed" in debris.what]) == 6 + 3 + 1
    assert read_run(replay(run, probe=probe_of(run))).head == whole.head
    assert verify_root(root, deep=True) == []


def test_a_kernel_that_is_not_finite_meets_no_solver(run, small_tiles, monkeypatch):
    monkeypatch.setattr(replay_module, "leading_pairs", lambda *_: pytest.fail("the solver was called"))
    x = np.ones((20, 4))
    x[15] = 1e30
    np.savez(run.parent / "wild.npz", x=x)
    with pytest.raises(NonFiniteKernel, match="step 4: ntk is not finite between the examples 14 to 19 and 14 to 19"):
        replay(run, probe=run.parent / "wild.npz")


def test_a_damaged_tile_is_named(run, small_tiles):
    path = replay(run, probe=probe_of(run))
    tile = path / "snapshots" / "ntk" / "c.0.2.1"
    tile.write_bytes(tile.read_bytes()[:-1] + b"\0")
    (problem,) = verify_root(path.parent.parent, deep=True)
    assert (problem.damage, "c.0.2.1" in problem.what) == (True, True)
    assert problem.where.endswith("snapshots/ntk at step 4")
    with pytest.raises(DamagedStore, match=r"c\.0\.2\.1"):
        product(read_run(path).in_chunks("snapshots/ntk", 0))(np.ones((1, 20)))


def test_layers_are_for_kernels_in_memory(run, small_tiles):
    with pytest.raises(InputError, match=r"layers: for fewer than 1 examples, not 20"):
        replay(run, probe=probe_of(run), layers=True)


IN_TWO_PROCESSES = """
import sys
from pipeline import schema
from pipeline.replay import replay
schema.TILED, schema.TILE = 1, 7
print(replay(sys.argv[1], probe=sys.argv[2], at="all", workers=2))
"""


def test_two_processes_make_the_same_tiles_and_say_nothing(run, small_tiles):
    whole = read_run(replay(run, probe=probe_of(run), at="all"))
    shutil.rmtree(whole.path)
    command = [sys.executable, "-c", IN_TWO_PROCESSES, str(run), str(probe_of(run))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert read_run(done.stdout.strip()).head == whole.head


def test_what_is_in_memory_is_not_shared(run):
    with pytest.raises(InputError, match="workers = 2: a model that is given is in the memory of one process"):
        replay(run, probe="train", model=nn.Linear(4, 2), workers=2)


# --- what it would take ----------------------------------------------------------------------------------------------


def test_a_forecast_says_what_is_left_and_writes_nothing(run, small_tiles):
    before = sorted(run.parents[1].rglob("*"))
    found = forecast(run, probe=probe_of(run), at="all")
    assert sorted(run.parents[1].rglob("*")) == before
    assert (found.n, found.rows, found.tiles) == (20, 3, 9)
    assert found.nbytes >= 3 * 4 * (20 * 20 + 20 * 9)
    assert found.seconds > 0
    assert found.memory > psutil.Process().memory_info().rss
    path = replay(run, probe=probe_of(run), at="all")
    assert sum(file.stat().st_size for file in path.rglob("c.*")) < 100 * found.nbytes
    done = forecast(run, probe=probe_of(run), at="all")
    assert (done.rows, done.seconds) == (0, None)


@pytest.mark.parametrize("matrix_free", [None, 1e-4])
def test_a_forecast_of_a_kernel_that_is_not_in_tiles(run, matrix_free):
    found = forecast(run, probe=probe_of(run), matrix_free=matrix_free)
    assert (found.rows, found.tiles) == (1, 1 if matrix_free is None else 0)
    assert found.seconds > 0


@pytest.mark.parametrize("matrix_free", [None, 1e-4], ids=["formed", "matrix free"])
@pytest.mark.parametrize("tiled", [1, 10**6], ids=["tiles", "memory"])
def test_what_does_not_fit_is_refused_before_anything_is_written(run, monkeypatch, tiled, matrix_free):
    monkeypatch.setattr(schema, "TILED", tiled)
    options = {"probe": probe_of(run), "matrix_free": matrix_free}
    for refused in (replay, forecast):
        with pytest.raises(InputError, match=r"n = 20 examples: up to .*iB of memory are needed, with workers = 1, and "
                                             r"1\.0 MiB are allowed: allow more, or take fewer examples"):  # fmt: skip
            refused(run, **options, memory=2**20)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(InputError, match=r"up to .*iB of disk are needed, and 100 B are free at .*: make room"):
            refused(run, **options)
        monkeypatch.undo()
        monkeypatch.setattr(schema, "TILED", tiled)
    assert not (run.parents[1] / "analysis").exists()


def test_the_kernel_of_50_000_examples_is_planned_within_the_memory():
    """1 GiB beside what the process held; the kernel has 9.3."""
    assert peak_bytes(50_000, 20, 2048, 1, 2**28) < 2**30
    assert peak_bytes(50_000, 20, 2048, 2, 2**28) > peak_bytes(50_000, 20, 2048, 1, 2**28)


def test_a_replay_without_the_kernel(run, small_tiles):
    formed = read_run(replay(run, probe=probe_of(run), at="all"))
    path = replay(run, probe=probe_of(run), at="all", matrix_free=1e-8)
    found = read_run(path)
    assert {"ntk", "ntk_train_cross"}.isdisjoint(found.arrays("snapshots"))
    for name in ("eigenvalue", "eigenvector", "trace", "target_energy", "ntk_sharpness", "prediction"):
        expected = formed.read(f"snapshots/{name}")
        close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).max(), "err_msg": name}
        np.testing.assert_allclose(found.read(f"snapshots/{name}"), expected, **close)
    off = found.read("snapshots/frobenius_norm") - formed.read("snapshots/frobenius_norm")
    assert (np.abs(off) < 5 * found.read("snapshots/frobenius_error")).all()
    measures = analysis.alignment(analysis.open_run(path)).compute()
    assert {"kta", "cumulative_alignment"} <= set(measures)
    assert verify_root(path.parent.parent, deep=True) == []
    for options in ({"kernel": "conjugate"}, {"layers": True}):
        with pytest.raises(InputError, match="matrix_free: of the kernel ntk only, without its layers"):
            replay(run, probe="train", matrix_free=1e-8, **options)


def test_a_bucket_holds_the_same_and_its_run_goes_on_too(run, small_tiles, monkeypatch):
    one = Bucket()
    monkeypatch.setattr("pipeline.objects.client", lambda bucket: one)
    monkeypatch.setattr("pipeline.objects.PUTS_AT_ONCE", 1)
    for file in (file for file in run.rglob("*") if file.is_file() and file.name != "LEASE"):
        door(URL).put(f"runs/{run.name}/{file.relative_to(run).as_posix()}", file.read_bytes())
    source = f"{URL}/runs/{run.name}"
    with (
        patch.object(replay_module, "leading_pairs", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        replay(source, probe=probe_of(run))
    make = TileMaker.make
    monkeypatch.setattr(TileMaker, "make", lambda self, task: pytest.fail("all tiles were there"))
    found = replay(source, probe=probe_of(run))
    monkeypatch.setattr(TileMaker, "make", make)
    assert read_run(found).head == read_run(replay(run, probe=probe_of(run))).head
    assert verify_root(found.parent.parent, deep=True) == []
    with pytest.raises(InputError, match=r"workers = 2: memory://.* is in the memory of one process"):
        replay(source, probe=probe_of(run), at="all", workers=2)
