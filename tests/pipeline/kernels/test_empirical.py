"""The empirical kernel against dense Jacobians, finite differences, closed forms and another library."""

import copy
import itertools
import types
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import InputError
from pipeline.kernels import COLUMNS, ELEMENTWISE, KERNELS, NTK, empirical_ntk, layers_obstacle

GOLDEN = Path(__file__).parents[2] / "golden" / "neural_tangents.npz"
METHODS = ["layers", "samples"]


def close(kernel, expected, tolerance=1e-12):
    """Equal to a relative error of the largest entry."""
    assert tuple(kernel.shape) == expected.shape
    assert kernel.dtype == torch.float64
    np.testing.assert_allclose(kernel.numpy(), expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-300))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(sizes=(5, 7, 6, 3), activation=nn.Tanh, bias=True, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(len(sizes))
        layers = []
        for features, width in itertools.pairwise(sizes):
            layers += [nn.Linear(features, width, bias=bias), activation()]
        return nn.Sequential(*layers[:-1]).to(dtype)


@pytest.fixture(scope="module")
def golden():
    """A function that gives the arrays of one case, its parameters as tensors."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        arrays = dict(archive)

    def case(name):
        found = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
        parameters = {k.removeprefix("param."): torch.tensor(v) for k, v in found.items() if k.startswith("param.")}
        return found, parameters

    return case


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model_has_the_gram_matrix_plus_one(method, bias):
    x, model = randn(6, 4), nn.Linear(4, 1, bias=bias).double()
    close(empirical_ntk(nn.Sequential(model), x, method=method), (x @ x.T).numpy() + bias)


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_of_a_linear_model_share_nothing(method):
    x = randn(6, 4)
    full = empirical_ntk(nn.Sequential(nn.Linear(4, 3).double()), x, outputs="full", method=method)
    close(full, np.einsum("ij,ab->ijab", (x @ x.T).numpy() + 1, np.eye(3)))


@pytest.mark.parametrize("method", METHODS)
def test_a_tanh_network_equals_finite_differences_in_numpy(method):
    model, x = mlp((3, 4, 2)), randn(5, 3)
    parameters = [tensor.detach().numpy() for tensor in model.parameters()]
    close(
        empirical_ntk(model, x, outputs="full", method=method),
        oracles.finite_difference_ntk(parameters, x.numpy()),
        1e-8,
    )


# --- another library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_golden_mlp(golden, method):
    case, parameters = golden("mlp")
    model = mlp()
    model.load_state_dict(parameters)
    x, x2 = torch.tensor(case["x"]), torch.tensor(case["x2"])
    np.testing.assert_allclose(model(x).detach().numpy(), case["output"], atol=1e-14)
    close(empirical_ntk(model, x, outputs="full", method=method), case["ntk"])
    close(empirical_ntk(model, x, x2, outputs="full", method=method), case["cross"])
    close(empirical_ntk(model, x, method=method), oracles.trace(case["ntk"]))
    close(empirical_ntk(model, x, x2, method=method), oracles.trace(case["cross"]))


def test_golden_cnn(golden):
    case, parameters = golden("cnn")
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(12, 2),
    ).double()  # fmt: skip
    model.load_state_dict(parameters)
    x = torch.tensor(case["x"])
    np.testing.assert_allclose(model(x).detach().numpy(), case["output"], atol=1e-14)
    close(empirical_ntk(model, x, outputs="full"), case["ntk"])
    close(empirical_ntk(model, x), oracles.trace(case["ntk"]))


class Transformer(nn.Module):
    """One pre-LayerNorm block on 4 tokens, as in the golden case."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(3, 6), nn.Parameter(torch.zeros(4, 6))
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x) + self.position
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.fc2(torch.tanh(self.fc1(self.norm2(x))))
        return self.head(x.mean(dim=1))


def test_golden_transformer(golden):
    case, parameters = golden("transformer")
    model = Transformer().double()
    model.load_state_dict(parameters)
    x = torch.tensor(case["x"])
    np.testing.assert_allclose(model(x).detach().numpy(), case["output"], atol=1e-14)
    close(empirical_ntk(model, x, outputs="full"), case["ntk"])


# --- dense Jacobians -------------------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """A random stack of Linear and elementwise layers in float64, some of its tensors frozen, and two sets of x."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    c, biased = draw(st.integers(1, 3)), st.booleans()
    image = draw(st.booleans())
    features = 4
    layers: list[nn.Module] = [nn.Flatten()] if image else []
    torch.manual_seed(draw(st.integers(0, 2**31)))
    for width in (*sizes, c):
        layers.append(nn.Linear(features, width, bias=draw(biased)))
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from(ELEMENTWISE))())
        features = width
    model = nn.Sequential(*layers).double()
    trained = list(model.parameters())
    for tensor in draw(st.lists(st.sampled_from(trained), max_size=len(trained) - 1, unique_by=id)):
        tensor.requires_grad_(False)
    shape = (2, 2) if image else (4,)
    x1, x2 = (torch.randn(draw(st.integers(1, 5)), *shape, dtype=torch.float64) for _ in range(2))
    return model, x1, x2


@settings(max_examples=60, deadline=None)
@given(network=networks())
def test_both_methods_equal_dense_jacobians(network):
    model, x1, x2 = network
    with torch.random.fork_rng():
        same, cross = oracles.ntk(model, x1), oracles.ntk(model, x1, x2)
        for method in METHODS:
            close(empirical_ntk(model, x1, outputs="full", method=method), same)
            close(empirical_ntk(model, x1, x2, outputs="full", method=method), cross)
            close(empirical_ntk(model, x1, method=method), oracles.trace(same))
            close(empirical_ntk(model, x1, x2, method=method), oracles.trace(cross))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), width=st.integers(1, 20), c=st.integers(1, 3), method=st.sampled_from(METHODS))
def test_the_kernel_of_one_set_is_exactly_symmetric(n, width, c, method):
    model, x = mlp((5, width, width, c), dtype=torch.float32), randn(n, 5, seed=n, dtype=torch.float32)
    kernel = empirical_ntk(model, x, method=method)
    full = empirical_ntk(model, x, outputs="full", method=method)
    assert torch.equal(kernel, kernel.T)
    assert torch.equal(full, full.permute(1, 0, 3, 2))
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12 * kernel.trace()


def test_float32_loses_no_more_than_its_own_rounding():
    model, x = mlp((64, 64, 64, 1)), randn(50, 64)
    exact = empirical_ntk(model, x)
    for method in METHODS:
        single = empirical_ntk(copy.deepcopy(model).float(), x.float(), method=method)
        assert single.dtype == torch.float64
        assert torch.linalg.norm(single - exact) < 3e-7 * torch.linalg.norm(exact)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk):
    model, x = mlp(), randn(7, 5)
    close(empirical_ntk(model, x, method="samples", chunk=chunk), oracles.trace(oracles.ntk(model, x)))


def test_a_tensor_wider_than_a_block_of_columns():
    model, x = nn.Sequential(nn.Linear(COLUMNS // 2 + 1, 3).double()), randn(3, COLUMNS // 2 + 1)
    for outputs, expected in (("full", oracles.ntk(model, x)), ("trace", oracles.trace(oracles.ntk(model, x)))):
        close(empirical_ntk(model, x, outputs=outputs, method="samples"), expected)


# --- many evaluations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("two_sets", [False, True], ids=["same", "cross"])
def test_one_object_follows_changing_parameters_and_hands_out_kernels_of_its_own(method, outputs, two_sets):
    x, x2 = randn(6, 5), randn(4, 5, seed=1) if two_sets else None
    ntk, model = NTK(x, x2, outputs=outputs, method=method), mlp()
    first = ntk(model)
    kept = first.clone()
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        full = oracles.ntk(model, x, x2)
        close(ntk(model), full if outputs == "full" else oracles.trace(full))
    assert torch.equal(first, kept)


def test_one_object_serves_models_of_other_sizes():
    x = randn(6, 5)
    ntk = NTK(x, outputs="full")
    for sizes in ((5, 4, 2), (5, 3), (5, 8, 8, 1)):
        close(ntk(mlp(sizes)), oracles.ntk(mlp(sizes), x))
    frozen = mlp()
    frozen[0].requires_grad_(False)
    close(ntk(frozen), oracles.ntk(frozen, x))


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_symmetric_and_positive(name):
    kernel = KERNELS[name](randn(9, 5))(mlp())
    assert torch.equal(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method):
    model, x = mlp(), randn(6, 5)
    model(x).sum().backward()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        kernel = empirical_ntk(model, x, method=method)
    assert not kernel.requires_grad
    assert not x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(generator, torch.random.get_rng_state())


# --- where the layer formula would be wrong --------------------------------------------------------------------------


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class MySequential(nn.Sequential):
    """A Sequential that computes something else."""

    def forward(self, x):
        return super().forward(x) ** 2


class Scale(nn.Module):
    """Has a parameter without axes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * x


class TwoNames(nn.Module):
    """Has one parameter under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Parameter(torch.ones(5, 1) / 2)

    def forward(self, x):
        return torch.tanh(x @ self.first) + x**2 @ self.second


def tied():
    model = mlp((5, 5, 5, 1))
    model[2].weight = model[0].weight
    return model


def repeated():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 1)).double()


def hooked():
    model = mlp((5, 5, 1))
    model[0].register_forward_hook(lambda module, inputs, output: output**2)
    return model


def pre_hooked():
    model = mlp((5, 5, 1))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,))
    return model


def patched():
    model = mlp((5, 5, 1))
    model[0].forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) ** 2, model[0])
    return model


def parametrised():
    model = mlp((5, 5, 1))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


OTHER = {
    "a subclass of Linear": lambda: nn.Sequential(Doubled(5, 4), nn.Tanh(), nn.Linear(4, 1)),
    "a subclass of Sequential": lambda: MySequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
    "another layer": lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    "softmax is not elementwise": lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 1)),
    "a layer with parameters of its own": lambda: nn.Sequential(nn.Linear(5, 4), Scale(), nn.Linear(4, 1)),
    "an activation in place": lambda: nn.Sequential(nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 1)),
    "a parameter of two names": TwoNames,
    "tied weights": tied,
    "a layer used twice": repeated,
    "a hook": hooked,
    "a hook on the model": pre_hooked,
    "a patched forward": patched,
    "a parametrisation": parametrised,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch on weight_norm
@pytest.mark.parametrize("name", OTHER)
def test_other_models_go_by_samples(name):
    model, x = OTHER[name]().double(), randn(6, 5)
    assert layers_obstacle(model, x) is not None
    before = [tensor.clone() for tensor in model.parameters()]
    close(empirical_ntk(model, x, outputs="full"), oracles.ntk(model, x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(InputError, match=r"method = 'layers': .*; use 'samples' or 'auto'"):
        empirical_ntk(model, x, method="layers")


def test_a_linear_on_sequences_goes_by_samples():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double(), randn(5, 4, 3)
    with pytest.raises(InputError, match="layer 0 is a Linear on examples that are not flattened"):
        empirical_ntk(model, x, method="layers")
    close(empirical_ntk(model, x, outputs="full"), oracles.ntk(model, x))


def test_an_activation_used_twice_still_goes_by_layers():
    tanh, x = nn.Tanh(), randn(6, 5)
    model = nn.Sequential(nn.Linear(5, 4), tanh, nn.Linear(4, 3), tanh, nn.Linear(3, 2)).double()
    assert layers_obstacle(model, x) is None
    close(empirical_ntk(model, x, outputs="full"), oracles.ntk(model, x))


def test_auto_takes_the_layers_where_it_can(monkeypatch):
    monkeypatch.setattr("pipeline.kernels._jacobians", None)
    close(empirical_ntk(mlp(), randn(6, 5)), oracles.trace(oracles.ntk(mlp(), randn(6, 5))))


# --- models that treat no example on its own -------------------------------------------------------------------------


def with_layer(layer):
    return nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 1)).double()


def test_batch_norm_is_refused_in_training_and_exact_on_running_statistics():
    model, x = with_layer(nn.BatchNorm1d(4)), randn(6, 5)
    model(x)
    with pytest.raises(InputError, match=r"module '1' is a BatchNorm1d on batch statistics.*call model\.eval\(\)"):
        empirical_ntk(model, x)
    model.eval()
    statistics = model[1].running_mean.clone()
    close(empirical_ntk(model, x, outputs="full"), oracles.ntk(model, x))
    assert torch.equal(statistics, model[1].running_mean)


def test_batch_norm_without_running_statistics_is_refused_in_eval_too():
    with pytest.raises(InputError, match="couples the examples"):
        empirical_ntk(with_layer(nn.BatchNorm1d(4, track_running_stats=False)).eval(), randn(6, 5))


def test_live_dropout_is_refused_and_dead_dropout_is_not():
    model, x = with_layer(nn.Dropout(0.5)), randn(6, 5)
    with pytest.raises(InputError, match=r"module '1' is a live Dropout.*call model\.eval\(\)"):
        empirical_ntk(model, x)
    close(empirical_ntk(model.eval(), x, outputs="full"), oracles.ntk(model, x))
    model = with_layer(nn.Dropout(0.0))
    close(empirical_ntk(model, x, outputs="full"), oracles.ntk(model, x))


class Noisy(nn.Linear):
    """Draws random numbers that no module shows."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x))


class Counting(nn.Linear):
    """Changes a buffer at every call."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("kind", "reason"), [(Noisy, "random"), (Counting, "in-place")])
def test_what_no_module_shows_is_refused(kind, reason):
    model, generator = kind(5, 1).double(), torch.random.get_rng_state()
    with pytest.raises(InputError, match=f"per-example gradients of {kind.__name__} failed: .*{reason}"):
        empirical_ntk(model, randn(6, 5))
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(buffer, torch.zeros(())) for buffer in model.buffers())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_a_gpu_gives_the_same_kernel(method, outputs):
    model, x = mlp((5, 40, 40, 2)), randn(50, 5)
    expected = empirical_ntk(model, x, outputs=outputs, method=method)
    kernel = empirical_ntk(model.cuda(), x.cuda(), outputs=outputs, method=method).cpu()
    close(kernel, expected.numpy())
    assert torch.equal(kernel, kernel.T if outputs == "trace" else kernel.permute(1, 0, 3, 2))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((randn(3, 5),), {"outputs": "all"}, "outputs = 'all': must be 'trace' or 'full'"),
        ((randn(3, 5),), {"method": "fast"}, "method = 'fast': must be 'auto', 'layers' or 'samples'"),
        ((randn(3),), {}, r"examples of shape \(3,\): must be \(n, features"),
        ((randn(3, 5), randn(2, 4)), {}, r"examples of shape \(3, 5\) and \(2, 4\)"),
    ],
    ids=["outputs", "method", "one axis", "two sizes"],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        empirical_ntk(mlp(), *arguments, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_trained_parameters(method):
    with pytest.raises(InputError, match="Sequential has no parameter with requires_grad"):
        empirical_ntk(mlp().requires_grad_(False), randn(3, 5), method=method)


class Squeezed(nn.Linear):
    """Gives (n,) instead of (n, c)."""

    def forward(self, x):
        return super().forward(x)[:, 0]


def test_an_output_without_its_axis():
    with pytest.raises(InputError, match=r"output for n examples has shape \(1,\): it must have shape \(n, outputs\)"):
        empirical_ntk(Squeezed(5, 1).double(), randn(3, 5))
