"""Replayed kernels against the stored ones, bit for bit, and against dense Jacobians on examples never trained on."""

import shutil

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import analysis
from pipeline import replay as replay_module
from pipeline.config import Compute, Digits, File, Imported, Mlp, Record, RunConfig, Stop
from pipeline.data import load_data
from pipeline.disk import Directory
from pipeline.errors import InputError, MissingError
from pipeline.kernels import infinite_kernels
from pipeline.record import Probe, Recorder
from pipeline.replay import replay
from pipeline.store import list_runs, read_run, run_path
from pipeline.train import train
from pipeline.verify import verify_root

N, STEPS = 30, 12


def config(**changes) -> RunConfig:
    values = {
        "learning_rate": 0.2,
        "data": Digits(n=N),
        "model": Mlp(width=6, depth=1),
        "stop": Stop(steps=STEPS),
        "record": Record(eigenpairs=3, layers=True, snapshots={"every": 5}),
    }
    return RunConfig(**(values | changes))


def trained(root, run: RunConfig):
    train(run, str(root))
    return run_path(root, run.run_id)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run in float32."""
    return trained(tmp_path_factory.mktemp("replay"), config())


@pytest.fixture
def run(shared, tmp_path):
    """A copy of it, to write beside."""
    shutil.copytree(shared.parent.parent, tmp_path / "store")
    return tmp_path / "store" / "runs" / shared.name


def at_step(run, step: int, dtype=torch.float64) -> nn.Module:
    """The trained model, by hand."""
    stored = read_run(run)
    row = stored.read("snapshots/step").tolist().index(step)
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 1))
    nn.utils.vector_to_parameters(torch.from_numpy(stored.read("snapshots/parameter")[row]), model.parameters())
    return model.to(dtype)


def jacobian(model: nn.Module, x) -> np.ndarray:
    rows = []
    for example in torch.as_tensor(x, dtype=torch.float64):
        gradients = torch.autograd.grad(model(example[None]).squeeze(), list(model.parameters()))
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_the_training_examples_it_is_the_stored_kernel_bit_for_bit(tmp_path, dtype):
    run = trained(tmp_path, config(compute=Compute(dtype=dtype)))
    stored, found = read_run(run), read_run(replay(run, probe="train", at="all", layers=True))
    assert found.read("snapshots/step").tolist() == stored.read("snapshots/step").tolist() == [0, 5, 10, 12]
    for name in ("ntk", "ntk_layer", "prediction", "frobenius_norm", "trace", "target_energy", "loss", "learning_rate"):
        np.testing.assert_array_equal(found.read(f"snapshots/{name}"), stored.read(f"snapshots/{name}"), err_msg=name)
    for name in ("input", "target", "sample_index"):
        np.testing.assert_array_equal(found.read(f"probe/{name}"), stored.read(f"probe/{name}"))
    assert "ntk_train_cross" not in found.arrays("snapshots")


def test_the_test_examples_are_those_not_chosen_and_seen_as_in_training(run):
    found = read_run(replay(run, probe="test"))
    pixels, digit = load_digits(return_X_y=True)
    chosen = read_run(run).read("probe/sample_index")
    rest = np.setdiff1d(np.arange(1797), chosen)
    known = pixels[chosen]
    x = (pixels[rest] - known.mean(0)) / (known - known.mean(0)).std()
    np.testing.assert_array_equal(found.read("probe/sample_index"), rest)
    np.testing.assert_allclose(found.read("probe/input"), x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.read("probe/target")[:, 0] == 1, digit[rest] < 5)
    some = np.arange(0, 1767, 97)
    model = at_step(run, STEPS)
    left, right = jacobian(model, x[some]), jacobian(model, read_run(run).read("probe/input"))
    np.testing.assert_allclose(found.read("snapshots/ntk")[0][np.ix_(some, some)], left @ left.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.read("snapshots/ntk_train_cross")[0][some], left @ right.T, rtol=1e-4, atol=1e-4)
    assert found.node("snapshots/ntk_train_cross")["dimension_names"] == ["step", "sample", "train_sample"]


def test_the_store_of_the_result_is_read_by_every_measure_and_verified(run):
    path = replay(run, probe="test", at="all")
    root = path.parent.parent
    assert root.parent == run.parent.parent / "analysis" / "kernel"
    assert root.name.startswith("ntk-test-")
    ds = analysis.open_sweep(root)
    assert set(ds.status.values) == {"complete"}
    np.testing.assert_array_equal(ds.loss, read_run(run).read("snapshots/loss"))
    measured = analysis.alignment(ds).isel(snapshot=-1).compute()
    kernel, y = ds.ntk.values[-1].astype(float), ds.target.values[-1].astype(float)
    kta = (y.T @ kernel @ y).item() / (np.linalg.norm(kernel) * np.sum(y**2))
    np.testing.assert_allclose(measured.kta, kta, rtol=1e-5)
    assert verify_root(root, deep=True) == []
    assert verify_root(run.parent.parent, deep=True) == []


@pytest.mark.parametrize("targets", [True, False], ids=["with_targets", "without"])
def test_examples_of_a_file(run, tmp_path, targets):
    x = np.random.default_rng(0).normal(size=(7, 64))
    y = np.where(x[:, 0] > 0, 1.0, -1.0)
    np.savez(tmp_path / "new one.npz", x=x, **({"y": y} if targets else {}))
    path = replay(run, probe=tmp_path / "new one.npz", at=[5, 0])
    assert path.parent.parent.name.startswith("ntk-new-one-")
    found = read_run(path)
    assert found.read("snapshots/step").tolist() == [0, 5]
    for row, step in enumerate([0, 5]):
        j = jacobian(at_step(run, step), x.astype(np.float32))
        np.testing.assert_allclose(found.read("snapshots/ntk")[row], j @ j.T, rtol=1e-4, atol=1e-5)
    measured = analysis.alignment(analysis.open_run(path)).compute()
    assert bool(np.isnan(measured.kta).all()) is not targets
    assert ("target_energy" in found.arrays("snapshots")) is targets
    assert verify_root(path.parent.parent, deep=True) == []


@pytest.mark.parametrize(
    "kernel",
    ["conjugate", {"name": "nngp", "depth": 2}, {"name": "weighted", "weights": {"0": 0}}],
    ids=["conjugate", "nngp", "weighted"],
)
def test_other_kernels_stand_in_the_place_of_the_ntk(run, tmp_path, kernel):
    x = np.random.default_rng(1).normal(size=(6, 64)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, y=np.ones(6))
    found = read_run(replay(run, probe=tmp_path / "x.npz", kernel=kernel))
    model, train = at_step(run, STEPS), read_run(run).read("probe/input")
    both = torch.as_tensor(np.concatenate([x, train]), dtype=torch.float64)
    features = model[:2](both).detach().numpy()
    expected = {
        "conjugate": features @ features.T,
        "weighted": features @ features.T + 1,  # the last layer, and its bias
        "nngp": infinite_kernels(both, depth=2).nngp.numpy(),
    }[kernel if isinstance(kernel, str) else kernel["name"]]
    np.testing.assert_allclose(found.read("snapshots/ntk")[0], expected[:6, :6], rtol=1e-4)
    np.testing.assert_allclose(found.read("snapshots/ntk_train_cross")[0], expected[:6, 6:], rtol=1e-4)
    np.testing.assert_allclose(found.read("snapshots/trace")[0], np.trace(expected[:6, :6]), rtol=1e-4)


def test_it_is_computed_once_and_again_when_the_run_has_gone_on(run, monkeypatch):
    calls = []
    real = replay_module.Measure.rows
    monkeypatch.setattr(replay_module.Measure, "rows", lambda *a: calls.append(1) or real(*a))
    first = replay(run, probe="train")
    assert replay(run, probe="train") == first
    assert len(calls) == 1
    assert replay(run, probe="train", at="all") != first
    assert len(calls) == 1 + 4
    assert replay(run, probe="train", at=[STEPS, 5]) not in (first, replay(run, probe="train", at=[5]))
    train(config(stop=Stop(steps=20)), str(run.parent.parent))
    del calls[:]
    assert replay(run, probe="train") == first
    assert len(calls) == 1
    assert read_run(first).read("snapshots/step").tolist() == [20]


def test_a_replay_that_is_cut_off_goes_on(run, monkeypatch):
    whole = read_run(replay(run, probe="train", at="all"))
    shutil.rmtree(whole.path)
    monkeypatch.setattr(replay_module, "COMMIT_SECONDS", 0.0)
    load = replay_module.load_snapshot

    def cut(source, model, row):
        if row == 2:
            raise KeyboardInterrupt
        load(source, model, row)

    monkeypatch.setattr(replay_module, "load_snapshot", cut)
    with pytest.raises(KeyboardInterrupt):
        replay(run, probe="train", at="all")
    assert read_run(whole.path).lengths == {"snapshots": 2}
    loaded = []
    monkeypatch.setattr(replay_module, "load_snapshot", lambda *a: loaded.append(a[2]) or load(*a))
    assert read_run(replay(run, probe="train", at="all")).head == whole.head
    assert loaded == [2, 3]


def test_an_unfinished_run_gives_an_unfinished_result_until_it_ends(tmp_path):
    asked = iter([False] * 6 + [True])
    train(config(), str(tmp_path), should_stop=lambda: next(asked))
    run = run_path(tmp_path, config().run_id)
    assert read_run(replay(run, probe="train")).status == "interrupted"
    train(config(), str(tmp_path))
    assert read_run(replay(run, probe="train")).status == "complete"


def test_a_run_that_only_had_to_be_closed_closes_its_result(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.store.Writer.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(), str(tmp_path))
    run = run_path(tmp_path, config().run_id)
    before = read_run(run)
    assert read_run(replay(run, probe="train")).status == "interrupted"
    train(config(), str(tmp_path))
    assert read_run(run).head == before.head
    assert read_run(replay(run, probe="train")).status == "complete"


def test_a_diverged_run_stays_one(tmp_path):
    wild = config(learning_rate=1e6, model=Mlp(width=6, depth=2, activation="relu"))
    run = trained(tmp_path, wild)
    assert read_run(run).status == "diverged"
    assert read_run(replay(run, probe="train")).status == "diverged"


def test_examples_of_the_users_own_file(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 3, size=(40, 4)), rng.normal(size=(40, 2))
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    mine = config(data=File(file=str(tmp_path / "xy.npz"), n=25, normalise="global"), record=Record(eigenpairs=3))
    run = trained(tmp_path / "store", mine)
    found = read_run(replay(run, probe="test"))
    rest = load_data(mine.data, 0, rest=True)
    np.testing.assert_array_equal(found.read("probe/target"), y[rest.sample_index].astype(np.float32))
    assert len(rest.x) == 15
    np.savez(tmp_path / "xy.npz", x=x + 1e-3 * rng.normal(size=x.shape), y=y)
    with pytest.raises(InputError, match="are not those that it was recorded on"):
        replay(run, probe="test", at="all")
    (tmp_path / "xy.npz").unlink()
    with pytest.raises(MissingError, match=r"xy.npz: there is no such file"):
        replay(run, probe="test", at="all")
    assert replay(run, probe="train", at="all").exists()


def test_all_chosen_leaves_no_test_examples(tmp_path):
    np.savez(tmp_path / "xy.npz", x=np.random.default_rng(0).normal(size=(9, 4)), y=np.ones(9))
    run = trained(tmp_path / "store", config(data=File(file=str(tmp_path / "xy.npz")), record=Record(eigenpairs=3)))
    with pytest.raises(InputError, match="all 9 examples were chosen, so none is left"):
        replay(run, probe="test")


def net(input_shape, outputs, scale=1.0):
    """A model of the user's own."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(input_shape[0], outputs)

        def forward(self, x):
            return scale * net.factor * self.layer(x)

    return Net()


net.factor = 1.0


def test_an_imported_model_needs_permission_and_must_be_the_same(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "users_own", sys.modules[__name__])
    mine = config(model=Imported(**{"import": "users_own:net"}), record=Record(eigenpairs=3))
    run = trained(tmp_path, mine)
    with pytest.raises(InputError, match="users_own:net runs code from outside this package; pass --allow-imports"):
        replay(run, probe="train")
    stored = read_run(run).read("snapshots/ntk")[-1]
    np.testing.assert_array_equal(
        read_run(replay(run, probe="train", allow_imports=True)).read("snapshots/ntk")[0], stored
    )
    monkeypatch.setattr(net, "factor", 2.0)
    with pytest.raises(InputError, match="predicts other values than were recorded"):
        replay(run, probe="train", at="all", allow_imports=True)


def test_a_run_of_a_loop_of_ones_own_is_replayed_with_its_model(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 2)
    recorder = Recorder(str(tmp_path), model, Probe(x, x[:, :2]), identity={"model": "mine"}, learning_rate=0.1, seed=0,
                        steps=1, eigenpairs=2)  # fmt: skip
    with recorder:
        recorder.record(0, loss=1.0)
        recorder.record(1, loss=1.0)
    (run,) = list_runs(tmp_path)
    with pytest.raises(InputError, match="which alone knows the model"):
        replay(run.path, probe="train")
    with pytest.raises(InputError, match="whose dataset is not known here"):
        replay(run.path, probe="test")
    found = read_run(replay(run.path, probe="train", model=nn.Linear(3, 2)))
    np.testing.assert_array_equal(found.read("snapshots/ntk")[-1], run.read("snapshots/ntk")[-1])
    new = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    given = read_run(replay(run.path, probe=Probe(new, torch.ones(5, 2)), model=nn.Linear(3, 2)))
    # K = Σ_c (x·x' + 1): two outputs of one linear map.
    np.testing.assert_allclose(given.read("snapshots/ntk")[0], 2 * (new @ new.T + 1), rtol=1e-5)
    np.testing.assert_allclose(
        given.read("snapshots/ntk_sharpness")[0] * 5, np.linalg.eigvalsh(new @ new.T + 1)[-1], rtol=1e-5
    )
    with pytest.raises(InputError, match=r"other parameters than run .* stored \(weight\)"):
        replay(run.path, probe="train", at="all", model=nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": [7]}, MissingError, "has no snapshot at step 7; the nearest are at 5 and 10"),
        ({"at": [99]}, MissingError, "the nearest are at 10 and 12"),
        ({"at": "last"}, InputError, "at = 'last': must be 'final', 'all' or steps"),
        ({"kernel": "ntc"}, InputError, "kernel 'ntc': must be one of ntk, weighted, conjugate"),
        ({"kernel": "conjugate", "layers": True}, InputError, "layers: of the kernel ntk only, not of conjugate"),
        ({"probe": "absent.npz"}, MissingError, "probe = absent.npz: there is no such file"),
    ],
)
def test_what_cannot_be_had_is_said_and_nothing_is_written(run, options, error, message):
    with pytest.raises(error, match=message):
        replay(run, **options)
    assert not (run.parent.parent / "analysis").exists()


def test_examples_of_another_shape_are_refused(run, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((3, 5)))
    with pytest.raises(InputError, match=r"probe = x: features of shape \(5,\); run .* has \(64,\)"):
        replay(run, probe=tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=np.ones((3, 64)), y=np.ones((3, 2)))
    with pytest.raises(InputError, match=r"probe = x: outputs of shape \(2,\); run .* has \(1,\)"):
        replay(run, probe=tmp_path / "x.npz")


def test_a_run_without_parameters_says_so(tmp_path):
    recorder = Recorder(str(tmp_path), nn.Linear(3, 1), Probe(torch.ones(4, 3), torch.ones(4, 1)), identity={},
                        learning_rate=0.1, seed=0, steps=1, eigenpairs=2, cadences={})  # fmt: skip
    with recorder:
        recorder.record(0, loss=1.0)
    with pytest.raises(InputError, match="stored no parameters, so there is nothing to compute a kernel from"):
        replay(list_runs(tmp_path)[0].path, probe="train")


def test_the_threads_and_modes_of_the_process_are_left_as_they_were(run):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    replay(run, probe="train")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert not Directory(run).leased("LEASE")
