"""The built-in loop against gradient descent written out by hand."""

import numpy as np
import pytest
import torch

from pipeline.config import Compute, Digits, Mlp, Record, RunConfig, Stop
from pipeline.data import load_data
from pipeline.errors import InputError
from pipeline.models import build_model
from pipeline.store import find_run
from pipeline.train import train


def config(**changes) -> RunConfig:
    values = {
        "learning_rate": 0.2,
        "data": Digits(n=30),
        "model": Mlp(width=6, depth=1),
        "stop": Stop(steps=12),
        "record": Record(eigenpairs=3, loss_levels=(0.4,), spectra={"every": 5}, snapshots={"log": 2}),
        "compute": Compute(dtype="float64"),
    }
    return RunConfig(**(values | changes))


def run_of(root, run: RunConfig):
    return find_run(root, run.run_id)


def test_it_is_full_batch_gradient_descent(tmp_path):
    run = config()
    assert train(run, str(tmp_path)) == "complete"
    data = load_data(run.data, run.seed)
    model = build_model(run.model, data.x.shape[1:], 1, run.seed, torch.float64)
    w1, b1, w2, b2 = (p.detach().numpy().copy() for p in model.parameters())
    losses, norms, hits = [], [], []
    for _ in range(13):
        hidden = np.tanh(data.x @ w1.T + b1)
        residual = hidden @ w2.T + b2 - data.y
        losses.append(0.5 * np.mean(residual**2))
        hits.append(np.mean(np.sign(residual + data.y) == data.y))
        back = residual / len(data.y)
        inner = (back @ w2) * (1 - hidden**2)
        gradients = [inner.T @ data.x, inner.sum(0), back.T @ hidden, back.sum(0)]
        norms.append(np.sqrt(sum(np.sum(g**2) for g in gradients)))
        for parameter, gradient in zip((w1, b1, w2, b2), gradients, strict=True):
            parameter -= run.learning_rate * gradient
    recorded = run_of(tmp_path, run)
    np.testing.assert_allclose(recorded.read("train/loss"), losses, rtol=1e-12)
    np.testing.assert_allclose(recorded.read("train/grad_norm"), norms, rtol=1e-10)
    np.testing.assert_allclose(recorded.read("train/accuracy"), hits, rtol=1e-12)


def test_it_stops_at_the_first_loss_below_the_goal(tmp_path):
    run = config(stop=Stop(loss=0.45, steps=500))
    train(run, str(tmp_path))
    losses = run_of(tmp_path, run).read("train/loss")
    assert losses[-1] < 0.45
    assert (losses[:-1] >= 0.45).all()
    assert run_of(tmp_path, run).attrs["stop_reason"] == "loss"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, dtype):
    run = config(compute=Compute(dtype=dtype))
    train(run, str(tmp_path / "whole"))
    for count in (1, 4):
        asked = iter([False] * count + [True])
        assert train(run, str(tmp_path / "parts"), should_stop=lambda asked=asked: next(asked)) == "interrupted"
    assert run_of(tmp_path / "parts", run).status == "interrupted"
    train(run, str(tmp_path / "parts"))
    assert run_of(tmp_path / "parts", run).head == run_of(tmp_path / "whole", run).head


def test_same_config_same_head_and_another_seed_another(tmp_path):
    for root in "ab":
        train(config(), str(tmp_path / root))
    other = config(seed=1)
    train(other, str(tmp_path / "a"))
    assert run_of(tmp_path / "a", config()).head == run_of(tmp_path / "b", config()).head
    assert run_of(tmp_path / "a", other).head != run_of(tmp_path / "a", config()).head


def test_a_smaller_loss_or_more_steps_continues_and_an_unchanged_study_does_nothing(tmp_path):
    root = str(tmp_path)
    train(config(), root)
    first = run_of(root, config())
    train(config(), root)
    assert run_of(root, config()).attrs["commits"] == first.attrs["commits"]
    train(config(stop=Stop(steps=20)), root)
    longer = run_of(root, config())
    assert longer.attrs["last_step"] == 20
    np.testing.assert_array_equal(longer.read("train/loss")[:13], first.read("train/loss"))
    goal = float(longer.read("train/loss")[-1]) * 0.9
    train(config(stop=Stop(loss=goal, steps=500)), root)
    assert run_of(root, config()).read("train/loss")[-1] < goal
    # A looser goal than the one already met asks for nothing.
    train(config(stop=Stop(loss=goal * 1.5, steps=500)), root)
    assert run_of(root, config()).read("train/loss")[-1] < goal


def test_a_learning_rate_far_too_large_ends_as_diverged(tmp_path):
    run = config(learning_rate=1e6, model=Mlp(width=6, depth=2, activation="relu"), stop=Stop(steps=200))
    assert train(run, str(tmp_path)) == "diverged"
    recorded = run_of(tmp_path, run)
    assert recorded.status == "diverged"
    assert 0 < recorded.lengths["train"] < 200
    assert np.isfinite(recorded.read("train/loss")).all()
    assert train(run, str(tmp_path)) == "diverged"


def test_targets_that_are_no_labels_have_no_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.normal(size=(20, 3)), y=rng.normal(size=20))
    run = config(data={"file": str(tmp_path / "xy.npz")})
    assert train(run, str(tmp_path / "root")) == "complete"
    assert set(run_of(tmp_path / "root", run).arrays("train")) >= {"loss", "grad_norm"}
    assert "accuracy" not in run_of(tmp_path / "root", run).arrays("train")


def test_a_device_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(InputError, match=r"compute.device = 'cuda': torch finds no such device"):
        train(config(compute=Compute(device="cuda")), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_goal_of_fewer_steps_closes_a_run_that_is_past_it(tmp_path):
    asked = iter([False] * 6 + [True])
    train(config(), str(tmp_path), should_stop=lambda: next(asked))
    assert train(config(stop=Stop(steps=4)), str(tmp_path)) == "complete"
    assert run_of(tmp_path, config()).attrs["last_step"] == 6
