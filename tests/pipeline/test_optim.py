"""Update rules: what every entry promises, and torch.optim and closed forms as oracles of each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import KINDS
from pipeline.optim import UPDATES, UpdateRule, listed

NEEDED = {"sgd": {"batch_size": 2}}
TORCH = {
    "gd": lambda rule: (torch.optim.SGD, {}),
    "sgd": lambda rule: (torch.optim.SGD, {}),
    "heavy_ball": lambda rule: (torch.optim.SGD, {"momentum": rule.momentum}),
    "nesterov": lambda rule: (torch.optim.SGD, {"momentum": rule.momentum, "nesterov": True}),
    "rmsprop": lambda rule: (torch.optim.RMSprop, {"alpha": rule.beta2, "eps": rule.epsilon}),
    "adam": lambda rule: (torch.optim.Adam, {"betas": (rule.beta1, rule.beta2), "eps": rule.epsilon}),
}


def built(name: str, **options) -> UpdateRule:
    """A rule as a study builds it."""
    return UPDATES[name](**KINDS["update"][name](**NEEDED.get(name, {}), **options).model_dump(exclude={"name"}))


def drawn_options(name: str, draw) -> dict[str, float]:
    """Options of a rule over what its table allows."""
    fields = KINDS["update"][name].model_fields.keys() - {"name", "batch_size"}
    kinds = {"epsilon": st.floats(1e-8, 1e-2)}
    return {field: draw(kinds.get(field, st.floats(0.01, 0.99))) for field in sorted(fields)}


def test_every_rule_has_a_table_that_says_whether_it_has_a_preconditioner():
    assert UPDATES.keys() == KINDS["update"].keys() == TORCH.keys()
    parameters = [torch.ones(2)]
    for name in UPDATES:
        rule = built(name)
        _, state = rule.step(parameters, parameters, rule.init(parameters), 0.1)
        assert (rule.preconditioner(state) is not None) == KINDS["update"][name].preconditioned


@pytest.mark.parametrize("name", UPDATES)
def test_a_step_changes_none_of_its_arguments_and_has_no_graph(name):
    rule = built(name)
    parameters = [torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)]
    gradients = [torch.randn_like(p) for p in parameters]
    state = rule.init(parameters)
    before = [tensor.detach().clone() for tensor in (*parameters, *gradients, *state.values())]
    moved, _ = rule.step(parameters, gradients, state, 0.1)
    after = [tensor.detach() for tensor in (*parameters, *gradients, *state.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(tensor.requires_grad for tensor in (*moved, *state.values()))
    assert not any(torch.equal(a, b) for a, b in zip(parameters, moved, strict=True))


@pytest.mark.parametrize("name", UPDATES)
@given(data=st.data(), learning_rate=st.floats(1e-4, 10), seed=st.integers(0, 2**31))
def test_a_rule_equals_that_of_torch(name, data, learning_rate, seed):
    generator = torch.Generator().manual_seed(seed)
    rule = built(name, **drawn_options(name, data.draw))
    shapes = ((4, 3), (4,))
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    optimiser, options = TORCH[name](rule)
    theirs = optimiser(parameters, lr=learning_rate, **options)
    mine = [parameter.detach().clone() for parameter in parameters]
    state = rule.init(mine)
    for _ in range(4):
        gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        mine, state = rule.step(mine, gradients, state, learning_rate)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        theirs.step()
    for a, b in zip(mine, parameters, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


LINES = {
    "gd": lambda rule: 2,
    "heavy_ball": lambda rule: 2 + 2 * rule.momentum,
    "nesterov": lambda rule: (2 + 2 * rule.momentum) / (1 + 2 * rule.momentum),
    "rmsprop": lambda rule: 2,
    "adam": lambda rule: (2 + 2 * rule.beta1) / (1 - rule.beta1),
}


@pytest.mark.parametrize("name", LINES)
@given(data=st.data(), learning_rate=st.floats(1e-3, 10))
def test_a_line_is_its_formula(name, data, learning_rate):
    rule = built(name, **drawn_options(name, data.draw))
    assert rule.stability_line(learning_rate) == pytest.approx(LINES[name](rule) / learning_rate)


def test_sgd_has_no_line():
    assert built("sgd").stability_line(0.1) is None


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("momentum", [0.3, 0.8])
@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)], ids=["below", "above"])
def test_a_quadratic_is_stable_just_below_the_line_and_not_above(name, momentum, factor, stable):
    """A preconditioner is kept where it is by an average that hardly moves and has forgotten its start."""
    still = {"beta2": math.nextafter(1, 0)} if KINDS["update"][name].preconditioned else {}
    fields = KINDS["update"][name].model_fields.keys() & {"momentum", "beta1"}
    rule, learning_rate = built(name, **still, **dict.fromkeys(fields, momentum)), 0.3
    parameters = [torch.ones(1, dtype=torch.float64)]
    state, scale = rule.init(parameters), 1.0
    if still:
        state |= {"second.0": torch.tensor([0.25], dtype=torch.float64)}
        state |= {"updates": torch.tensor(10**18)} if "updates" in state else {}
        scale = rule.preconditioner(state)[0].item()
        assert scale == pytest.approx(0.5)
    curvature = factor * rule.stability_line(learning_rate) * scale
    for _ in range(1000):
        parameters, state = rule.step(parameters, [curvature * parameters[0]], state, learning_rate)
        if abs(parameters[0].item()) > 100:  # a preconditioner would grow with it and restore stability
            break
    assert (abs(parameters[0].item()) < 1) == stable


@given(seed=st.integers(0, 2**31), beta1=st.floats(0.01, 0.99))
def test_adam_is_a_moving_average_over_its_preconditioner(seed, beta1):
    generator = torch.Generator().manual_seed(seed)
    rule = built("adam", beta1=beta1)
    parameters = [torch.zeros(5, dtype=torch.float64)]
    state, average = rule.init(parameters), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        average = beta1 * average + (1 - beta1) * gradient
        moved, state = rule.step(parameters, [gradient], state, 0.1)
        step = 0.1 * average / rule.preconditioner(state)[0]
        torch.testing.assert_close(parameters[0] - moved[0], step, rtol=1e-9, atol=1e-12)
        parameters = moved


def test_a_list_in_a_state_keeps_its_order():
    state = {f"m.{i}": torch.tensor(i) for i in reversed(range(12))} | {"mm.0": torch.tensor(99)}
    assert [int(tensor) for tensor in listed("m", state)] == list(range(12))
