"""The models of the property tests are what their tables say."""

import architectures
import numpy as np
import oracles
import pytest
import torch
from architectures import CASES, NO_VMAP, REFUSED, convnets, mlps, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import first_tensor, mapped

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # a case


def per_example(model, x):
    """The output of each example in a batch of its own."""
    return torch.cat([model(mapped(lambda leaf, i=i: leaf[i : i + 1], x)) for i in range(len(first_tensor(x)))])


def check(model, x):
    """What every case promises."""
    output = model(x)
    assert output.dtype == torch.float64
    assert output.ndim == 2
    assert len(output) == len(first_tensor(x))
    assert output.isfinite().all()
    torch.testing.assert_close(per_example(model, x), output, rtol=1e-9, atol=1e-9)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    j = oracles.jacobian(model, x)
    assert j.shape == (*output.shape, sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert np.isfinite(j).all()
    return j


def by_vmap(model, x):
    """The Jacobian that torch.func gives, (n, c, p)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trained.items()}
    # functional_call leaves its replacements behind in a module that stands in two places, unless each is named once.
    places = {
        f"{prefix}.{name}".removeprefix("."): names[id(p)]
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if p.requires_grad
    }

    def outputs(parameters, example):
        replaced = {place: parameters[name] for place, name in places.items()}
        batch = mapped(lambda leaf: leaf[None], example)
        return torch.func.functional_call(model, replaced, (batch,), tie_weights=False)[0]

    trained = {name: p.detach() for name, p in trained.items()}
    jacobians = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(trained, x)
    return torch.cat([j.flatten(2) if j.ndim > 2 else j[:, :, None] for j in jacobians.values()], dim=2).numpy()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_case_is_differentiable_and_treats_examples_alone(name):
    model, x = CASES[name]()
    j = check(model, x)
    assert np.abs(j).max() > 0
    if name in NO_VMAP:
        with pytest.raises(RuntimeError, match=r"size|shape|vmap|hooks"):
            by_vmap(model, x)
    else:
        np.testing.assert_allclose(by_vmap(model, x), j, rtol=1e-9, atol=1e-11 * np.abs(j).max())


@pytest.mark.parametrize("name", [*CASES, *REFUSED])
def test_a_case_is_always_the_same(name):
    generator = torch.random.get_rng_state()
    (model, x), (again, y) = [{**CASES, **REFUSED}[name]() for _ in range(2)]
    assert torch.equal(generator, torch.random.get_rng_state())
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first_tensor(x), first_tensor(y))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_case_mixes_examples_or_is_random(name):
    model, x = REFUSED[name]()
    output = model(x)
    assert output.shape == (len(x), architectures.C)
    assert not torch.allclose(model(x[1:3]), output[1:3])


def test_parameters_are_moved_from_where_they_start():
    for name in ("LayerNorm", "BatchNorm2d in eval mode", "scale and shift", "learned positions"):
        for tensor in CASES[name]()[0].parameters():
            assert not torch.isin(tensor, torch.tensor([0.0, 1.0])).any()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@settings(max_examples=100, deadline=None)
@given(network=st.one_of(mlps(), convnets(), sequences()))
def test_random_models_keep_the_promises_of_the_table(network):
    model, x1, x2 = network
    assert any(parameter.requires_grad for parameter in model.parameters())
    for x in (x1, x2):
        j = check(model, x)
        np.testing.assert_allclose(by_vmap(model, x), j, rtol=1e-7, atol=1e-9 * np.abs(j).max())
