"""Held-out examples of a run: which they are, what is measured on them, and that training does not see them."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from study_files import one
from torch import nn

import analysis
from pipeline.cadence import Cadence
from pipeline.config import Compute, Digits, File, Mlp, Record, RunConfig, Stop
from pipeline.data import load_data, load_test
from pipeline.errors import InputError
from pipeline.losses import mse
from pipeline.models import build_model
from pipeline.plan import check_start, plan_runs
from pipeline.record import Probe, Recorder
from pipeline.store import Run, find_run
from pipeline.train import train
from pipeline.verify import verify_root

N, M, STEPS = 9, 5, 6
HELD_OUT = {"ntk_test", "ntk_cross", "prediction_test", "test_loss", "test_accuracy"}


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """What these tests write need not survive a power cut, and the disk is what they wait for."""
    with patch("os.fsync"):
        yield


def config(test: int | None = M, **changes) -> RunConfig:
    values = {
        "learning_rate": 0.2,
        "data": Digits(n=N),
        "model": Mlp(width=6, depth=1),
        "stop": Stop(steps=STEPS),
        "record": Record(eigenpairs=3, test=test, snapshots={"every": 5}, scalars={"every": 2}),
        "compute": Compute(dtype="float64"),
    }
    return RunConfig(**(values | changes))


def trained(root, run: RunConfig, **options) -> Run:
    train(run, str(root), **options)
    return find_run(root, run.run_id)


def arrays_of_a_file(path, outputs: int, examples: int = N + M + 3) -> File:
    rng = np.random.default_rng(outputs)
    y = np.eye(outputs)[rng.integers(0, outputs, examples)] if outputs > 1 else rng.choice([-1.0, 1.0], (examples, 1))
    np.savez(path, x=rng.normal(size=(examples, 4)), y=y)
    return File(file=str(path), n=N)


def jacobian(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """(examples, outputs, parameters), one gradient at a time."""
    rows = []
    for example in x:
        for output in model(example[None])[0]:
            gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy())
    return np.array(rows).reshape(len(x), -1, len(rows[0]))


@pytest.mark.parametrize("outputs", [1, 3])
def test_all_that_is_measured_on_them_is_a_dense_recomputation(tmp_path, outputs):
    config_ = config(data=arrays_of_a_file(tmp_path / "xy.npz", outputs))
    run = trained(tmp_path / "root", config_)
    data, rest = load_data(config_.data, 0), load_data(config_.data, 0, rest=True)
    x, held_out = torch.from_numpy(data.x), torch.from_numpy(rest.x[:M])
    model = build_model(config_.model, x.shape[1:], outputs, 0, torch.float64)
    assert run.read("snapshots/step").tolist() == [0, 5, 6]
    for row in range(3):
        stored = torch.from_numpy(run.read("snapshots/parameter")[row])
        nn.utils.vector_to_parameters(stored, model.parameters())
        test, train_ = jacobian(model, held_out), jacobian(model, x)
        f = model(held_out).detach().numpy()
        residual = f - rest.y[:M]
        right = np.sign(f) == rest.y[:M] if outputs == 1 else f.argmax(1) == rest.y[:M].argmax(1)
        expected = {
            "ntk_test": np.einsum("acp,bcp->ab", test, test),
            "ntk_cross": np.einsum("acp,bcp->ab", test, train_),
            "prediction_test": f,
            "test_loss": 0.5 * np.mean(np.sum(residual**2, axis=1)),
            "test_accuracy": np.mean(right),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(run.read(f"snapshots/{name}")[row], values, rtol=2e-6, atol=1e-6, err_msg=name)


def test_they_are_the_first_of_those_that_were_not_chosen_seen_as_the_chosen_ones(tmp_path):
    run = trained(tmp_path, config())
    chosen = run.read("probe/sample_index")
    rest = np.setdiff1d(np.arange(1797), chosen)[:M]
    np.testing.assert_array_equal(run.read("probe/test_sample_index"), rest)
    every = load_data(Digits(n=1797), 0)
    raw = every.x[np.argsort(every.sample_index)]  # up to the one mean and deviation, the pixels in their order
    known = raw[chosen]
    expected = (raw[rest] - known.mean(0)) / (known - known.mean(0)).std()
    np.testing.assert_allclose(run.read("probe/test_input"), expected, atol=1e-12)
    np.testing.assert_array_equal(run.read("probe/test_target"), every.y[np.argsort(every.sample_index)][rest])
    node = run.node("probe/test_input")
    assert node["dimension_names"] == ["test_sample", "feature"]
    assert run.node("snapshots/ntk_cross")["dimension_names"] == ["step", "test_sample", "sample"]


def test_scalars_have_their_own_cadence_and_training_sees_none_of_it(tmp_path):
    with_, without = trained(tmp_path / "with", config()), trained(tmp_path / "without", config(test=None))
    assert with_.read("scalars/step").tolist() == [0, 2, 4, 6]
    assert set(with_.arrays("scalars")) - set(without.arrays("scalars")) == {"test_loss", "test_accuracy"}
    assert set(with_.arrays("snapshots")) - set(without.arrays("snapshots")) == HELD_OUT
    assert not any("test" in name for name in (*without.arrays("probe"), *without.arrays("snapshots")))
    at_snapshots, at_scalars = (with_.read(f"{group}/test_loss") for group in ("snapshots", "scalars"))
    np.testing.assert_array_equal(at_snapshots[[0, -1]], at_scalars[[0, -1]])
    for name in ("snapshots/ntk", "snapshots/parameter", "train/loss", "scalars/trace"):
        np.testing.assert_array_equal(with_.read(name), without.read(name), err_msg=name)
    cost = with_.read("train/seconds_test")
    assert with_.read("train/step")[cost > 0].tolist() == [0, 2, 4, 5, 6]
    assert not without.read("train/seconds_test").any()


def test_runs_that_hold_nothing_out_keep_their_names():
    assert "test" not in config(test=None).identity()["record"]
    assert config(test=None).run_id != config(test=M).run_id != config(test=M + 1).run_id


def test_targets_that_are_no_labels_have_no_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.normal(size=(20, 2)), y=rng.normal(size=20))
    run = trained(tmp_path / "root", config(data=File(file=str(tmp_path / "xy.npz"), n=N)))
    assert "test_loss" in run.arrays("scalars")
    assert "test_accuracy" not in run.arrays("scalars")


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = trained(tmp_path / "whole", config())
    asked = iter([False, False, True])
    trained(tmp_path / "parts", config(), should_stop=lambda: next(asked))
    parts = trained(tmp_path / "parts", config())
    assert parts.attrs["commits"] > whole.attrs["commits"]
    assert parts.head == whole.head


@pytest.mark.parametrize(
    "name", ["snapshots/ntk_cross", "snapshots/ntk_test", "scalars/test_loss", "probe/test_target"]
)
def test_damage_to_them_is_found(tmp_path, name):
    run = trained(tmp_path, config())
    assert verify_root(tmp_path, deep=True) == []
    chunk = next(path for path in sorted((run.path / name).iterdir()) if path.name.startswith("c"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert any(name in problem.where or name in problem.what for problem in verify_root(tmp_path, deep=True))


def test_a_linear_network_from_zero_ends_at_the_regression_with_its_kernel(tmp_path):
    """Its kernel never moves and its initial function is zero, so the two are one function."""
    rng = np.random.default_rng(0)
    x, test_x = (torch.from_numpy(rng.normal(size=(count, 2 * N))) for count in (N, M))
    y, test_y = (torch.from_numpy(rng.choice([-1.0, 1.0], (count, 2))) for count in (N, M))
    model = nn.Linear(2 * N, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    steps, rate = 600, 0.2
    recorder = Recorder(
        str(tmp_path), model, Probe(x, y), identity={}, learning_rate=rate, seed=0, steps=steps, eigenpairs=2,
        criterion=mse, test=Probe(test_x, test_y), cadences={"snapshots": Cadence()},
    )  # fmt: skip
    with recorder:
        for step in recorder:
            residual = model(x).detach() - y
            if recorder.record(step, loss=float((residual**2).sum() / (2 * N))):
                model.weight.data -= rate * residual.T @ x / N
    ds = analysis.open_sweep(tmp_path).isel(snapshot=[-1])
    found = analysis.kernel_regression(ds)
    np.testing.assert_allclose(found.regression_prediction, ds.prediction_test, atol=1e-4)
    np.testing.assert_allclose(found.regression_agreement, 1)
    np.testing.assert_allclose(found.regression_squared_error, ds.test_loss, rtol=1e-4)


def test_other_held_out_examples_are_another_run(tmp_path):
    file = arrays_of_a_file(tmp_path / "xy.npz", 1)
    trained(tmp_path / "root", config(data=file))
    with np.load(tmp_path / "xy.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    x[load_test(file, 0, M).sample_index[0]] += 1
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    with pytest.raises(InputError, match="was recorded on other data"):
        plan_runs([config(data=file)], str(tmp_path / "root"))
    with pytest.raises(InputError, match="was recorded on other data"):
        train(config(data=file), str(tmp_path / "root"))


def test_they_are_planned_with_their_bytes(study, tmp_path):
    arrays_of_a_file(tmp_path / "xy.npz", 3)
    plain = [f"data.file={tmp_path}/xy.npz", f"data.n={N}", "record.eigenpairs=3", "stop.steps=20"]
    (bare,) = plan_runs([one(study, *plain)], "nowhere")
    (planned,) = plan_runs([one(study, *plain, f"record.test={M}")], "nowhere")
    snapshot = 4 * (M * M + M * N) + 4 * M * 3 + 2 * 8
    expected = planned.rows["snapshots"] * snapshot + planned.rows["scalars"] * 2 * 8 + M * (8 + 4 * 4 + 4 * 3)
    assert planned.nbytes - bare.nbytes == expected


def test_more_than_there_are_is_refused_before_anything_is_written(tmp_path):
    run = config(data=arrays_of_a_file(tmp_path / "xy.npz", 1), test=M + 4)
    expected = rf"record.test = {M + 4}: only {M + 3} examples are not trained on"
    with pytest.raises(InputError, match=expected):
        check_start(plan_runs([run], str(tmp_path / "root")))
    with pytest.raises(InputError, match=expected):
        train(run, str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("shape", "targets", "criterion", "said"),
    [
        ((M, 2), (M, 1), None, r"test: needs the loss; give criterion="),
        ((M, 3), (M, 1), mse, r"test of shapes \(5, 3\) and \(5, 1\): must be .* of shape \(2,\) and \(1,\)"),
        ((M, 2), (M, 2), mse, r"test of shapes \(5, 2\) and \(5, 2\)"),
        ((M, 2), (M - 1, 1), mse, r"test of shapes \(5, 2\) and \(4, 1\)"),
        ((0, 2), (0, 1), mse, r"test of shapes \(0, 2\) and \(0, 1\)"),
    ],
)
def test_examples_that_do_not_fit_the_probe_are_refused(tmp_path, shape, targets, criterion, said):
    with pytest.raises(InputError, match=said):
        Recorder(
            str(tmp_path), nn.Linear(2, 1), Probe(torch.zeros(N, 2), torch.zeros(N, 1)), identity={}, learning_rate=0.1,
            seed=0, steps=1, eigenpairs=1, criterion=criterion, test=Probe(torch.zeros(shape), torch.zeros(targets)),
        )  # fmt: skip
