"""Processes: what every entry promises, and the midpoints against gradient descent written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import schema
from pipeline.config import Compute, Digits, Mlp, Record, RunConfig, Stop
from pipeline.losses import mse
from pipeline.optim import UPDATES
from pipeline.processes import PROCESSES, Problem
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
    return Problem(model, mse, x, y, UPDATES["gd"], learning_rate, seed=0)


def flat(model) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()]).numpy().copy()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, process, dtype):
    run = config(process=process, compute=Compute(dtype=dtype))
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
    process = PROCESSES["midpoint"](Problem(model, mse, x, torch.zeros_like(x), UPDATES["gd"], 2.0, seed=0))
    found = []
    for step in range(4):
        found.append((process.row().columns["oscillation"], model.weight.item()))
        process.advance(step)
    assert found == [(0.0, 3.0), (9.0, 0.0), (9.0, 0.0), (9.0, 0.0)]
