"""Update rules: what every entry promises, and each one's own oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.optim import UPDATES, GradientDescent


@pytest.mark.parametrize("name", UPDATES)
def test_a_step_changes_none_of_its_arguments_and_has_no_graph(name):
    rule = UPDATES[name]
    parameters = [torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)]
    gradients = [torch.randn_like(p) for p in parameters]
    state = rule.init(parameters)
    before = [tensor.detach().clone() for tensor in (*parameters, *gradients, *state.values())]
    moved, _ = rule.step(parameters, gradients, state, 0.1)
    after = [tensor.detach() for tensor in (*parameters, *gradients, *state.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(tensor.requires_grad for tensor in moved)
    assert not any(torch.equal(a, b) for a, b in zip(parameters, moved, strict=True))


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)], ids=["below", "above"])
def test_a_quadratic_is_stable_just_below_the_line_and_not_above(name, factor, stable):
    rule, learning_rate = UPDATES[name], 0.3
    line = rule.stability_line(learning_rate)
    if line is None:
        pytest.skip("the rule has no stability line")
    parameters = [torch.ones(1, dtype=torch.float64)]
    state = rule.init(parameters)
    for _ in range(400):
        parameters, state = rule.step(parameters, [factor * line * parameters[0]], state, learning_rate)
    assert (abs(parameters[0].item()) < 1) == stable


@settings(deadline=None)
@given(learning_rate=st.floats(1e-4, 10), seed=st.integers(0, 2**31))
def test_gd_equals_torch_sgd(learning_rate, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((4, 3), (4,))]
    sgd = torch.optim.SGD(parameters, lr=learning_rate)
    mine, state = [p.detach().clone() for p in parameters], {}
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        mine, state = GradientDescent().step(mine, gradients, state, learning_rate)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        sgd.step()
    for a, b in zip(mine, parameters, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_gd_has_the_line_two_over_the_learning_rate():
    assert GradientDescent().stability_line(0.1) == pytest.approx(20)
