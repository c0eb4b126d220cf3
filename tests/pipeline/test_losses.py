"""Losses and accuracy against loops and by hand."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.losses import LOSSES, accuracy, cross_entropy, mse


@settings(deadline=None)
@given(n=st.integers(1, 9), c=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_mse_is_half_the_mean_squared_error_summed_over_outputs(n, c, seed):
    f, y = np.random.default_rng(seed).standard_normal((2, n, c))
    assert float(mse(torch.tensor(f), torch.tensor(y))) == pytest.approx(oracles.half_mean_squared_error(f, y))


def test_mse_of_a_perfect_prediction_is_zero():
    y = torch.tensor([[1.0], [-1.0]])
    assert mse(y, y) == 0


def test_mse_gradient_is_the_residual_over_n():
    f = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 0.0]], requires_grad=True)
    mse(f, torch.ones(3, 2)).backward()
    torch.testing.assert_close(f.grad, (f.detach() - 1) / 3)


@settings(deadline=None)
@given(n=st.integers(1, 9), c=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_cross_entropy_is_the_mean_surprise_at_the_label(n, c, seed):
    rng = np.random.default_rng(seed)
    f, labels = 3 * rng.standard_normal((n, c)), rng.integers(c, size=n)
    total = 0.0
    for row, label in zip(f, labels, strict=True):
        total -= np.log(np.exp(row[label]) / sum(np.exp(value) for value in row))
    assert float(cross_entropy(torch.tensor(f), torch.eye(c).double()[labels])) == pytest.approx(total / n)


@settings(deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_cross_entropy_of_one_output_is_that_of_two_with_half_of_it_each(n, seed):
    rng = np.random.default_rng(seed)
    f, y = 3 * torch.tensor(rng.standard_normal((n, 1))), torch.tensor(rng.choice([-1.0, 1.0], (n, 1)))
    two, one_hot = torch.cat([f, -f], 1) / 2, torch.cat([y > 0, y < 0], 1).double()
    assert float(cross_entropy(f, y)) == pytest.approx(float(cross_entropy(two, one_hot)), rel=1e-12)


def test_cross_entropy_of_huge_outputs_does_not_overflow():
    f = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = cross_entropy(f, -torch.sign(f.detach()))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert torch.isfinite(f.grad).all()


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None)
@given(n=st.integers(2, 8), c=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_loss_of_a_batch_is_the_mean_of_its_parts_by_size(name, n, c, seed):
    rng = np.random.default_rng(seed)
    f = torch.tensor(rng.standard_normal((n, c)))
    y = torch.tensor(rng.choice([-1.0, 1.0], (n, 1))) if c == 1 else torch.eye(c).double()[rng.integers(c, size=n)]
    parts = float(LOSSES[name](f[:1], y[:1])) + (n - 1) * float(LOSSES[name](f[1:], y[1:]))
    assert float(LOSSES[name](f, y)) == pytest.approx(parts / n, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_axis_does_not_broadcast(name):
    with pytest.raises(InputError, match=r"shapes \(3,\) and \(3, 1\)"):
        LOSSES[name](torch.zeros(3), torch.zeros(3, 1))


def test_accuracy_of_one_output_counts_equal_signs_and_zero_as_wrong():
    prediction = torch.tensor([[0.2], [-3.0], [1.0], [0.0]])
    assert accuracy(prediction, torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])) == 0.5


def test_accuracy_of_several_outputs_counts_equal_largest():
    prediction = torch.tensor([[0.2, 0.1, 0.0], [0.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    assert accuracy(prediction, torch.eye(3)[[0, 1, 0]]) == pytest.approx(2 / 3)


def test_accuracy_refuses_other_shapes():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 1\)"):
        accuracy(torch.zeros(2, 3), torch.zeros(2, 1))
