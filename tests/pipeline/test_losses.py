"""Losses and accuracy against loops and by hand."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.losses import LOSSES, accuracy, mse


@settings(deadline=None)
@given(n=st.integers(1, 9), c=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_mse_is_half_the_mean_squared_error_summed_over_outputs(n, c, seed):
    f, y = np.random.default_rng(seed).standard_normal((2, n, c))
    assert float(mse(torch.tensor(f), torch.tensor(y))) == pytest.approx(oracles.half_mean_squared_error(f, y))


def test_mse_gradient_is_the_residual_over_n():
    f = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 0.0]], requires_grad=True)
    mse(f, torch.ones(3, 2)).backward()
    torch.testing.assert_close(f.grad, (f.detach() - 1) / 3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_has_no_loss(name):
    y = torch.tensor([[1.0], [-1.0]])
    assert LOSSES[name](y, y) == 0
    assert LOSSES[name](y + 0.1, y) > 0


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
