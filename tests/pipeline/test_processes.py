"""Processes: what every entry promises, and the midpoints against gradient descent written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import schema
from pipeline.config import Compute, Digits, Mlp, Record, RunConfig, Stop
from pipeline.data import load_data
from pipeline.errors import InputError
from pipeline.losses import mse
from pipeline.models import build_model
from pipeline.optim import UPDATES, GradientDescent
from pipeline.processes import PROCESSES, Problem
from pipeline.seeds import stream
from pipeline.spectra import NonFiniteKernel
from pipeline.store import find_run
from pipeline.train import train


def config(**changes) -> RunConfig:
    values = {
        "learning_rate": 0.4,
        "data": Digits(n=24),
        "model": Mlp(width=4, depth=1),
        "stop": Stop(steps=9),
        "record": Record(eigenpairs=3, spectra={"every": 4}, snapshots={"log": 2}, hessian={"every": 4}),
        "compute": Compute(dtype="float64"),
    }
    return RunConfig(**(values | changes))


def problem(learning_rate=0.5) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    return Problem(model, mse, x, y, GradientDescent(), learning_rate, seed=0)


def flat(model) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()]).numpy().copy()


def of(name: str) -> dict:
    """The table of an update rule; a batch size that leaves examples over."""
    return {"name": name, **({"batch_size": 7} if name == "sgd" else {})}


RESUMED = [(process, "gd", "float64") for process in PROCESSES]
RESUMED += [("discrete", update, "float32") for update in UPDATES] + [("midpoint", "adam", "float32")]
RESUMED += [("central_flow", "gd", "float32")]


@pytest.mark.parametrize(("process", "update", "dtype"), RESUMED)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, process, update, dtype):
    run = config(process=process, update=of(update), compute=Compute(dtype=dtype))
    assert train(run, str(tmp_path / "whole")) == "complete"
    for count in (0, 4):
        asked = iter([False] * count + [True])
        assert train(run, str(tmp_path / "parts"), should_stop=lambda asked=asked: next(asked)) == "interrupted"
    train(run, str(tmp_path / "parts"))
    assert find_run(tmp_path / "parts", run.run_id).head == find_run(tmp_path / "whole", run.run_id).head


@pytest.mark.parametrize("process", PROCESSES)
def test_a_row_has_the_loss_and_the_kernel_of_its_parameters_and_the_columns_of_its_process(tmp_path, process):
    run = config(process=process)
    train(run, str(tmp_path))
    recorded = find_run(tmp_path, run.run_id)
    columns = set(recorded.arrays("train")) & schema.OF_PROCESS.keys()
    assert columns == set(schema.GIVEN_BY[process])
    x, y = recorded.read("probe/input"), recorded.read("probe/target")
    for theta, loss, norm in zip(
        recorded.read("snapshots/parameter"), recorded.read("snapshots/loss"),
        recorded.read("snapshots/trace"), strict=True,
    ):  # fmt: skip
        w1, b1, w2, b2 = np.split(theta, np.cumsum([4 * 64, 4, 4]))
        hidden = np.tanh(x @ w1.reshape(4, 64).T + b1)
        assert loss == pytest.approx(np.mean((hidden @ w2 + b2 - y[:, 0]) ** 2) / 2, rel=1e-12)
        inner = ((1 - hidden**2) * w2) ** 2
        trace = np.sum(inner.sum(1) * (1 + (x**2).sum(1)) + 1 + (hidden**2).sum(1))
        assert norm == pytest.approx(trace, rel=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_begins_at_the_initial_parameters(process):
    begun = problem()
    start = flat(begun.model)
    PROCESSES[process](begun).row()
    np.testing.assert_array_equal(flat(begun.model), start)


def test_midpoints_and_their_oscillation_are_those_of_gradient_descent():
    begun, learning_rate = problem(), 0.5
    weights = [tensor.detach().numpy().copy() for tensor in begun.model.parameters()]
    x, y = begun.x.numpy(), begun.y.numpy()
    iterates = []
    for _ in range(8):
        iterates.append(np.concatenate([weight.ravel() for weight in weights]))
        w1, b1, w2, b2 = weights
        hidden = np.tanh(x @ w1.T + b1)
        back = (hidden @ w2.T + b2 - y) / len(y)
        inner = (back @ w2) * (1 - hidden**2)
        for weight, gradient in zip(weights, (inner.T @ x, inner.sum(0), back.T @ hidden, back.sum(0)), strict=True):
            weight -= learning_rate * gradient
    process = PROCESSES["midpoint"](begun)
    for step in range(6):
        midpoint = iterates[0] if step == 0 else (iterates[step - 1] + 2 * iterates[step] + iterates[step + 1]) / 4
        row = process.row()
        np.testing.assert_allclose(flat(begun.model), midpoint, rtol=1e-11, atol=1e-13)
        assert row.columns["oscillation"] == pytest.approx(np.sum((iterates[step] - midpoint) ** 2), rel=1e-8)
        process.advance(step)


def test_on_a_quadratic_an_oscillation_of_period_two_leaves_the_midpoints_at_rest():
    x = torch.ones(1, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(3.0)
    process = PROCESSES["midpoint"](Problem(model, mse, x, torch.zeros_like(x), GradientDescent(), 2.0, seed=0))
    found = []
    for step in range(4):
        found.append((process.row().columns["oscillation"], model.weight.item()))
        process.advance(step)
    assert found == [(0.0, 3.0), (9.0, 0.0), (9.0, 0.0), (9.0, 0.0)]


def test_below_the_edge_all_processes_of_gradient_descent_are_one(tmp_path):
    last = {}
    for name in PROCESSES:
        run = config(process=name, learning_rate=0.01, stop=Stop(steps=20), record=Record(eigenpairs=2))
        train(run, str(tmp_path))
        last[name] = find_run(tmp_path, run.run_id)
    assert len({recorded.attrs["family"] for recorded in last.values()}) == 1
    assert last["central_flow"].read("train/critical").tolist() == 21 * [0]
    assert last["central_flow"].read("train/oscillation").tolist() == 21 * [0.0]
    first, *_, end = last["gradient_flow"].read("train/loss")
    for name, away in (("discrete", 3e-2), ("midpoint", 3e-2), ("central_flow", 1e-2)):  # whole steps, and quarters
        assert last[name].read("train/loss")[-1] == pytest.approx(end, abs=away * (first - end))


def test_at_the_edge_the_central_flow_is_stable_and_gradient_flow_goes_past_it(tmp_path):
    found = {}
    for name in ("central_flow", "gradient_flow"):
        record = Record(eigenpairs=2, hessian={"every": 1}, scalars={"every": 20})
        run = config(process=name, learning_rate=1.0, stop=Stop(steps=12), record=record)
        assert train(run, str(tmp_path)) == "complete"
        found[name] = find_run(tmp_path, run.run_id)
        assert (np.diff(found[name].read("train/loss")) < 0).all()
    sharpness = {name: recorded.read("hessian/hessian_eigenvalue")[2:, 0] for name, recorded in found.items()}
    assert np.abs(sharpness["central_flow"] / 2 - 1).max() < 0.01
    assert (sharpness["gradient_flow"] > 4).all()
    assert (found["central_flow"].read("train/oscillation") > 0).all()
    critical = found["central_flow"].read("train/critical")
    assert critical.dtype == np.int64
    assert set(critical[-2:]) == {2}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_learning_rate_without_a_central_flow_ends_as_diverged(tmp_path, activation):
    run = config(process="central_flow", learning_rate=1e3, model=Mlp(width=4, depth=1, activation=activation))
    for _ in range(2):
        assert train(run, str(tmp_path)) == "diverged"
    recorded = find_run(tmp_path, run.run_id)
    assert recorded.status == "diverged"
    assert "above 2/η" in recorded.attrs["stop_reason"] or "no finite Σ" in recorded.attrs["stop_reason"]


def test_a_flow_that_diverges_on_the_way_keeps_its_rows(tmp_path, monkeypatch):
    def advance(self, step):
        if step == 3:
            raise NonFiniteKernel("the gradient is not finite")

    monkeypatch.setattr(PROCESSES["gradient_flow"], "advance", advance)
    run = config(process="gradient_flow")
    assert train(run, str(tmp_path)) == "diverged"
    recorded = find_run(tmp_path, run.run_id)
    assert recorded.attrs["stop_reason"] == "the gradient is not finite"
    assert recorded.read("train/step").tolist() == [0, 1, 2, 3]


def test_a_flow_has_no_preconditioner():
    with pytest.raises(InputError, match="GradientFlow has no preconditioner"):
        PROCESSES["gradient_flow"](problem()).preconditioner()


def test_sgd_takes_the_batches_of_its_epochs_and_measures_all_examples(tmp_path):
    run = config(update=of("sgd"))
    train(run, str(tmp_path))
    data = load_data(run.data, run.seed)
    w1, b1, w2, b2 = (
        tensor.detach().numpy().copy()
        for tensor in build_model(run.model, (64,), 1, run.seed, torch.float64).parameters()
    )
    losses = []
    for step in range(run.stop.steps + 1):
        losses.append(np.mean((np.tanh(data.x @ w1.T + b1) @ w2.T + b2 - data.y) ** 2) / 2)
        order = stream(run.seed, f"order of epoch {step // 3}").permutation(24)
        taken = order[7 * (step % 3) :][:7]
        hidden = np.tanh(data.x[taken] @ w1.T + b1)
        back = (hidden @ w2.T + b2 - data.y[taken]) / 7
        inner = (back @ w2) * (1 - hidden**2)
        gradients = (inner.T @ data.x[taken], inner.sum(0), back.T @ hidden, back.sum(0))
        for weight, gradient in zip((w1, b1, w2, b2), gradients, strict=True):
            weight -= run.learning_rate * gradient
    np.testing.assert_allclose(find_run(tmp_path, run.run_id).read("train/loss"), losses, rtol=1e-10)


@pytest.mark.parametrize("process", ["discrete", "midpoint"])
@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_the_preconditioned_sharpness_is_that_of_the_step_from_the_row(tmp_path, name, process):
    run = config(
        update=of(name), process=process, learning_rate=0.01, data=Digits(n=12), model=Mlp(width=2, depth=1),
        stop=Stop(steps=5), record=Record(eigenpairs=2, hessian={"every": 2}, snapshots={"every": 1}),
    )  # fmt: skip
    train(run, str(tmp_path))
    recorded = find_run(tmp_path, run.run_id)
    assert recorded.attrs["stability_line"] is None
    assert recorded.attrs["preconditioned_stability_line"] == pytest.approx({"rmsprop": 200, "adam": 3800}[name])
    x, y = (torch.tensor(recorded.read(f"probe/{part}")) for part in ("input", "target"))

    def loss(theta):
        w1, b1, w2, b2 = theta.split([128, 2, 2, 1])
        return (torch.tanh(x @ w1.reshape(2, 64).T + b1) @ w2[:, None] + b2 - y).square().mean() / 2

    rows = [torch.tensor(row) for row in recorded.read("snapshots/parameter")]
    iterates = rows[:1]
    parameters = rows[0].clone().requires_grad_()
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name]
    theirs = kind([parameters], lr=0.01)
    expected = []
    for step in range(6):
        parameters.grad = torch.autograd.grad(loss(parameters), parameters)[0]
        theirs.step()
        iterates.append(parameters.detach().clone())
        second = theirs.state[parameters]["exp_avg_sq" if name == "adam" else "square_avg"]
        t = step + 1
        diagonal = (1 - 0.9**t) * ((second / (1 - 0.999**t)).sqrt() + 1e-8) if name == "adam" else second.sqrt() + 1e-8
        hessian = torch.autograd.functional.hessian(loss, rows[step])
        scaled = hessian / torch.outer(diagonal, diagonal).sqrt()
        expected.append(float(torch.linalg.eigvalsh(scaled)[-1]))
    if process == "discrete":
        torch.testing.assert_close(torch.stack(iterates[:6]), torch.stack(rows), rtol=1e-9, atol=1e-11)
    steps = recorded.read("hessian/step")
    np.testing.assert_allclose(recorded.read("hessian/preconditioned_sharpness"), np.array(expected)[steps], rtol=1e-5)


def test_the_line_of_a_rule_is_an_attribute_of_its_runs(tmp_path):
    for update, line in (("gd", 5.0), ("sgd", None), ("heavy_ball", 9.5)):
        run = config(update=of(update), stop=Stop(steps=1))
        train(run, str(tmp_path))
        attrs = find_run(tmp_path, run.run_id).attrs
        assert attrs["stability_line"] == (line if line is None else pytest.approx(line))
        assert "preconditioned_stability_line" not in attrs


def test_cross_entropy_needs_labels(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.normal(size=(20, 3)), y=rng.normal(size=20))
    run = config(data={"file": str(tmp_path / "xy.npz")}, loss={"name": "cross_entropy"})
    with pytest.raises(InputError, match=r"loss.name = 'cross_entropy': the targets must be labels"):
        train(run, str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_the_hessian_of_cross_entropy_is_that_of_its_loss(tmp_path):
    run = config(loss={"name": "cross_entropy"}, model=Mlp(width=2, depth=1), stop=Stop(steps=2))
    train(run, str(tmp_path))
    recorded = find_run(tmp_path, run.run_id)
    x, y = (torch.tensor(recorded.read(f"probe/{part}")) for part in ("input", "target"))

    def loss(theta):
        w1, b1, w2, b2 = theta.split([128, 2, 2, 1])
        return torch.log1p(torch.exp(-y * (torch.tanh(x @ w1.reshape(2, 64).T + b1) @ w2[:, None] + b2))).mean()

    last = torch.tensor(recorded.read("snapshots/parameter")[-1])
    assert recorded.read("train/loss")[-1] == pytest.approx(float(loss(last)), rel=1e-12)
    sharpness = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, last))[-1])
    assert recorded.read("hessian/hessian_eigenvalue")[-1, 0] == pytest.approx(sharpness, rel=1e-5)
