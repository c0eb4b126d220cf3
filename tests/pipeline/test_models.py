"""Models: what plan says of them, where they start, what they compute, and a user's own by import path."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from architectures import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.config import Cnn, DeepLinear, Mlp, Resnet, TwoLayerLinear, Vit
from pipeline.errors import InputError
from pipeline.kernels import empirical_ntk
from pipeline.kernels.infinite import infinite_kernels
from pipeline.kernels.structure import structure
from pipeline.models import ACTIVATIONS, MODELS, LayerNorm, build_model
from pipeline.models.layers import INITS
from pipeline.models.vit import sincos
from pipeline.seeds import stream

IMAGE = (1, 8, 8)
SMALL = {
    "mlp": Mlp(width=5),
    "two_layer_linear": TwoLayerLinear(width=5),
    "deep_linear": DeepLinear(width=5, depth=4),
    "cnn": Cnn(channels=[3, 4]),
    "cnn with max pooling and a hidden layer": Cnn(channels=[3], pooling="max", hidden=5, bias=False),
    "vit": Vit(dim=8, heads=2, depth=1),
    "vit with learned positions": Vit(dim=6, heads=3, depth=2, patch=4, position="learned"),
    "resnet": Resnet(width=3, blocks=[1, 2]),
}
SCALED = {name: table for name, table in SMALL.items() if name != "two_layer_linear"}


def build(options, input_shape=IMAGE, outputs=1, seed=0, dtype=torch.float32):
    return build_model(options, input_shape, outputs, seed, dtype)


def imported(path, **options):
    return SimpleNamespace(name="import", import_path=path, options=options)


def changed(table, **keys):
    return type(table).model_validate(table.model_dump() | keys)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


# --- every entry -----------------------------------------------------------------------------------------------------


def test_every_entry_is_tested_here():
    assert {table.name for table in SMALL.values()} | {"import"} == MODELS.keys()


sizes = st.integers(1, 5)
scales = {
    "parametrisation": st.sampled_from([None, "pytorch", "ntk", "mean_field"]),
    "init_scale": st.sampled_from([None, 1.5]),
    "output_scale": st.sampled_from([None, 3.0]),
}
activations = st.sampled_from(sorted(ACTIVATIONS))
tables = st.one_of(
    st.builds(Mlp, width=sizes, depth=sizes, activation=activations, bias=st.booleans(), **scales),
    st.builds(TwoLayerLinear, width=sizes),
    st.builds(DeepLinear, width=sizes, depth=sizes, **scales),
    st.builds(
        Cnn, channels=st.lists(sizes, min_size=1, max_size=3), activation=activations, hidden=sizes | st.none(),
        pooling=st.sampled_from(["avg", "max"]), bias=st.booleans(), **scales,
    ),
    st.builds(
        Vit, patch=st.sampled_from([1, 2, 4]), dim=st.sampled_from([4, 8]), depth=st.integers(1, 2), mlp_ratio=sizes,
        heads=st.sampled_from([1, 2, 4]), activation=activations, position=st.sampled_from(["sincos", "learned"]),
        head_scale=st.sampled_from([None, 0.0, 2.0]), **scales,
    ),
    st.builds(
        Resnet, width=sizes, blocks=st.lists(st.integers(1, 2), min_size=1, max_size=3), activation=activations,
        **scales,
    ),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(tables, st.integers(1, 3), st.sampled_from([8, 12]), st.sampled_from([8, 16]), st.integers(1, 3))
def test_a_model_has_the_tensors_that_its_table_says(table, channels, height, width, outputs):
    shape = (channels, height, width)
    model = build(table, shape, outputs)
    assert table.shapes(shape, outputs) == [tuple(tensor.shape) for tensor in model.parameters()]
    assert table.parameters(shape, outputs) == len(flat(model))
    assert table.tensors(shape, outputs) == len(list(model.parameters()))
    assert model(torch.zeros(2, *shape)).shape == (2, outputs)


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_alone_decides_the_weights(name):
    generator = torch.random.get_rng_state()
    first = flat(build(SMALL[name], seed=1))
    assert torch.equal(generator, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, flat(build(SMALL[name], seed=1)))
    assert not torch.equal(first, flat(build(SMALL[name], seed=2)))


@pytest.mark.parametrize("name", SMALL)
def test_float64_starts_where_float32_does_and_computes_the_same(name):
    single, double = build(SMALL[name]), build(SMALL[name], dtype=torch.float64)
    assert torch.equal(flat(single).double(), flat(double))
    x = randn(3, *IMAGE)
    torch.testing.assert_close(single(x.float()).double(), double(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("parametrisation", [None, "ntk", "mean_field"])
def test_the_kernel_is_the_dense_one_by_structure(name, parametrisation):
    table = changed(SMALL[name], parametrisation=parametrisation) if name in SCALED else SMALL[name]
    model, x = moved(build(table, outputs=2)), randn(4, *IMAGE)
    assert structure(model, x).generic == ()
    expected = oracles.trace(oracles.ntk(model, x))
    np.testing.assert_allclose(empirical_ntk(model, x), expected, rtol=0, atol=1e-12 * expected.max())


# --- parametrisations and scales -------------------------------------------------------------------------------------


def test_the_default_is_torchs_default_from_the_stream_init():
    torch_seed = int(stream(4, "init").integers(2**63))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        expected = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model = build(Mlp(width=5, depth=1), (3,), 2, seed=4)
    assert [type(layer) for layer in model] == [type(layer) for layer in expected]
    assert torch.equal(flat(model), flat(expected))


def check_normal(weight, std):
    """Entries look as if drawn from N(0, std²): deviation, mean, and kurtosis within five of their own deviations."""
    z = weight.detach().double().flatten() / std
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < 5 * math.sqrt(variance / len(z))


@pytest.mark.parametrize(
    ("keys", "std"),
    [
        ({"init": "lecun_normal"}, lambda i, o: 1 / i**0.5),
        ({"init": "he_normal"}, lambda i, o: (2 / i) ** 0.5),
        ({"init": "xavier_normal"}, lambda i, o: (2 / (i + o)) ** 0.5),
        ({"parametrisation": "ntk"}, lambda i, o: 1.0),
        ({"parametrisation": "mean_field"}, lambda i, o: 1.0),
    ],
    ids=["lecun_normal", "he_normal", "xavier_normal", "ntk", "mean_field"],
)
def test_initial_weights_are_normal_and_biases_zero(keys, std):
    assert INITS.keys() == {"lecun_normal", "he_normal", "xavier_normal"}
    model = build(Cnn(channels=[20, 30], hidden=50, init_scale=0.5, **keys), outputs=20)
    for layer, fan_in, fan_out in [(0, 9, 180), (3, 180, 270), (7, 120, 50), (9, 50, 20)]:
        check_normal(model[layer].weight, 0.5 * std(fan_in, fan_out))
        assert not model[layer].bias.any()


def test_models_with_an_initialisation_of_their_own():
    w, a = build(TwoLayerLinear(width=50, init_std=0.3), (40,), 30).parameters()
    for weight in (w, a):
        check_normal(weight, 0.3 / 50**0.5)
    for weight in build(DeepLinear(width=50, depth=3), (80,), 20).parameters():
        check_normal(weight, (2 / sum(weight.shape)) ** 0.5)
    for weight in build(Resnet(width=20, blocks=[1, 1])).parameters():
        if weight.ndim > 1 and len(weight) > 1:
            check_normal(weight, (2 / weight[0].numel()) ** 0.5)
    check_normal(build(Vit(position="learned"))[2].table, 0.02)


def test_the_two_layer_net_of_rank_one_is_so_to_the_last_bit():
    options = TwoLayerLinear(width=50, init_std=0.3, rank_one=True)
    w, a = (tensor.detach() for tensor in build(options, (40,), dtype=torch.float64).parameters())
    p = a[0] @ w / (a[0] @ a[0])
    torch.testing.assert_close(w, torch.outer(a[0], p), rtol=1e-15, atol=0)
    assert torch.unique(a.abs()).tolist() == pytest.approx([0.3 / 50**0.5])
    assert 10 < (a > 0).sum() < 40
    assert w[0].std().item() == pytest.approx(0.3 / 50**0.5, rel=0.4)


def test_the_two_layer_net_draws_a_before_w():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(3, "init").integers(2**63)))
        nn.Linear(7, 50, bias=False), nn.Linear(50, 1, bias=False)  # their default weights, which are drawn over
        a, w = torch.randn(1, 50), torch.randn(50, 7)
    model = build(TwoLayerLinear(width=50), (7,), seed=3)
    torch.testing.assert_close(model[1].weight, a * 0.05 / 50**0.5)
    torch.testing.assert_close(model[0].weight, w * 0.05 / 50**0.5)


@pytest.mark.parametrize("name", SCALED)
def test_init_scale_multiplies_the_weights_and_output_scale_the_network(name):
    x, model = randn(3, *IMAGE), build(SCALED[name], dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    spared = {id(tensor) for norm in norms for tensor in norm.parameters()}
    scaled = build(changed(SCALED[name], init_scale=0.5), dtype=torch.float64)
    for (path, one), two in zip(model.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(one if id(one) in spared or path.endswith("table") else 0.5 * one, two)
    lazy = build(changed(SCALED[name], output_scale=7.0), dtype=torch.float64)
    torch.testing.assert_close(lazy(x), 7 * model(x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(empirical_ntk(lazy, x), 49 * empirical_ntk(model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [0.5, 1], ids=["ntk", "mean_field"])
def test_the_equations_of_the_parametrisations(power):
    table = Mlp(width=11, depth=2, parametrisation="mean_field" if power == 1 else "ntk")
    model, x = moved(build(table, (5,), 2)), randn(6, 5)
    w1, b1, w2, b2, w3, b3 = (tensor.detach().numpy() for tensor in model.parameters())
    plain = [w1 / 5**0.5, b1, w2 / 11**0.5, b2, w3 / 11**power, b3]
    np.testing.assert_allclose(model(x).detach(), oracles.tanh_mlp(plain, x.numpy()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wide_network_has_the_infinite_kernel(depth):
    x, errors = randn(5, 9), []
    _, expected = infinite_kernels(x, depth=depth)
    for width in (64, 1024):
        table = Mlp(width=width, depth=depth, activation="relu", bias=False, parametrisation="ntk")
        found = [empirical_ntk(build(table, (9,), seed=seed, dtype=torch.float64), x) for seed in range(6)]
        errors.append(np.mean([float((kernel - expected).norm() / expected.norm()) for kernel in found]))
    assert errors[1] < 0.1
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.5)  # 1/√width


def kernel_change(width, parametrisation, learning_rate):
    """‖K_t - K_0‖ / ‖K_0‖ after ten steps of gradient descent."""
    table = Mlp(width=width, depth=1, bias=False, parametrisation=parametrisation)
    model, x = build(table, (9,), dtype=torch.float64), randn(8, 9)
    y, before = torch.sign(randn(8, 1, seed=1)), empirical_ntk(model, x)
    for _ in range(10):
        loss = (model(x) - y).square().mean() / 2
        with torch.no_grad():
            for tensor, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                tensor -= learning_rate * gradient
    return float((empirical_ntk(model, x) - before).norm() / before.norm())


def test_width_stops_the_kernel_of_ntk_but_not_of_mean_field():
    narrow, wide = (kernel_change(width, "ntk", 1.0) for width in (256, 4096))
    assert wide < narrow / 2.5  # 1/√width would be 4
    narrow, wide = (kernel_change(width, "mean_field", 1.0 * width) for width in (256, 4096))
    assert narrow > 0.1
    assert wide == pytest.approx(narrow, rel=0.25)


# --- what each architecture computes ---------------------------------------------------------------------------------


def test_the_digits_network_has_8385_parameters():
    assert len(flat(build(Mlp(), (64,)))) == Mlp().parameters((64,), 1) == 8385


def test_linear_networks_are_products_of_their_matrices():
    x = randn(6, 8)
    two = moved(build(TwoLayerLinear(width=5), (8,)))
    w, a = (tensor.detach().numpy() for tensor in two.parameters())
    f = x.numpy() @ w.T @ a.T
    np.testing.assert_allclose(two(x).detach(), f, rtol=1e-12)
    xw = x.numpy() @ w.T
    kernel = np.sum(a**2) * (x @ x.T).numpy() + xw @ xw.T
    np.testing.assert_allclose(empirical_ntk(two, x), kernel, rtol=1e-11, atol=1e-13)
    deep = build(DeepLinear(width=7, depth=5), (8,), 3, dtype=torch.float64)
    product = np.linalg.multi_dot([tensor.detach().numpy() for tensor in reversed(list(deep.parameters()))])
    np.testing.assert_allclose(deep(x).detach(), x.numpy() @ product.T, rtol=1e-11, atol=1e-13)
    assert DeepLinear().shapes((50,), 50) == [(50, 50)] * 20


def published(pooling, *widths, activation, hidden, bias):
    """A CNN for CIFAR-10 written as it is published."""
    layers, channels = [], 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding="same", bias=bias), activation(), pooling(2)]
        channels = width
    layers.append(nn.Flatten())
    features = channels * 64
    if hidden:
        layers += [nn.Linear(features, hidden, bias=False), activation()]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, 10)).double()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (Cnn(channels=[32, 64], activation="gelu", hidden=128, bias=False),
         published(nn.AvgPool2d, 32, 64, activation=nn.GELU, hidden=128, bias=False)),
        (Cnn(channels=[32, 32], activation="relu", pooling="max"),
         published(nn.MaxPool2d, 32, 32, activation=nn.ReLU, hidden=0, bias=True)),
    ],
    ids=["Cohen 2024", "Cohen 2021"],
)  # fmt: skip
def test_the_published_cnns(table, expected):
    model, x = build(table, (3, 32, 32), 10, dtype=torch.float64), randn(3, 3, 32, 32)
    expected.load_state_dict(model.state_dict())
    assert len(flat(model)) == len(flat(expected))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["sincos", "learned"])
def test_the_vit_is_made_of_torchs_own_transformer_layers(position):
    table = Vit(dim=8, heads=2, depth=2, patch=2, mlp_ratio=3, position=position)
    model, x = moved(build(table, (3, 4, 6), 5)), randn(4, 3, 4, 6)
    embed, places, *branches = model[1:7]
    tokens = F.unfold(x, 2, stride=2).mT @ embed.weight.T + embed.bias + places.table
    for one, two in zip(branches[::2], branches[1::2], strict=True):
        theirs = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        theirs = theirs.double()
        (norm1, attention), (norm2, inner, _, outer) = one.branch, two.branch
        zero = torch.zeros(24)
        ours = {
            "norm1": norm1, "norm2": norm2, "linear1": inner, "linear2": outer, "self_attn.out_proj": attention.out
        }  # fmt: skip
        state = {f"{name}.{key}": value for name, part in ours.items() for key, value in part.state_dict().items()}
        theirs.load_state_dict(
            state | {"self_attn.in_proj_weight": attention.qkv.weight, "self_attn.in_proj_bias": zero}
        )
        tokens = theirs(tokens)
    norm, _, head = model[7:]
    tokens = F.layer_norm(tokens, (8,), norm.weight, norm.bias)
    torch.testing.assert_close(model(x), head(tokens.mean(1)), rtol=1e-10, atol=1e-11)


def test_the_head_of_a_vit_may_start_at_zero():
    assert not build(Vit(dim=8, head_scale=0.0))(randn(2, *IMAGE).float()).any()
    plain, doubled = (build(Vit(dim=8, head_scale=scale))[-1].weight for scale in (None, 2.0))
    assert torch.equal(2 * plain, doubled)


def test_fixed_positions_know_their_distances():
    rows, columns, q = 3, 5, 4
    table = sincos(rows, columns, 4 * q).double()
    frequencies = 10000.0 ** (-np.arange(q) / q)
    for i, j in np.ndindex(len(table), len(table)):
        (r1, c1), (r2, c2) = divmod(i, columns), divmod(j, columns)
        expected = np.cos((r1 - r2) * frequencies).sum() + np.cos((c1 - c2) * frequencies).sum()
        assert float(table[i] @ table[j]) == pytest.approx(expected, abs=1e-5)
    assert (table[:columns, 2 * q :] == table[0, 2 * q :]).all()  # the row is in the second half


def test_the_resnet_is_the_sum_of_its_branches():
    model, x = moved(build(Resnet(width=3, blocks=[2, 1]), (2, 9, 8), 4)), randn(3, 2, 9, 8)
    state = model.state_dict()

    def conv(name, h, **options):
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def branch(number, h, stride):
        inner = conv(f"{number}.branch.1", h.clamp(min=0), padding=1, stride=stride)
        return conv(f"{number}.branch.3", inner.clamp(min=0), padding=1) / 3**0.5

    h = conv("0", x, padding=1)
    h = h + branch(1, h, 1)
    h = h + branch(2, h, 1)
    h = conv("3.shortcut", h, stride=2) + branch(3, h, 2)
    assert h.shape == (3, 6, 5, 4)
    expected = h.clamp(min=0).mean((2, 3)) @ state["6.weight"].T + state["6.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 30])
def test_the_size_of_a_resnets_outputs_does_not_grow_with_its_depth(blocks):
    found = [build(Resnet(width=20, blocks=[blocks]), seed=seed)(randn(8, *IMAGE).float()) for seed in range(5)]
    assert 0.2 < torch.stack(found).square().mean().sqrt().item() < 5


# --- layer norm ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99))
def test_the_layer_norm_is_torchs(features, seed):
    ours, theirs = moved(LayerNorm(features)), nn.LayerNorm(features).double()
    theirs.load_state_dict(ours.state_dict())
    x = randn(3, 4, features, seed=seed).requires_grad_()
    for one, two in zip(*(torch.autograd.grad(norm(x).sin().sum(), (x, *norm.parameters())) for norm in (ours, theirs)),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_third_derivatives_are_those_of_finite_differences(name):
    table = changed(SMALL[name], activation="gelu")
    model, x, y = moved(build(table)), randn(5, *IMAGE), randn(5, 1, seed=1)
    parameters = list(model.parameters())
    u, v = ([randn(*tensor.shape, seed=seed + i) for i, tensor in enumerate(parameters)] for seed in (10, 900))

    def along(gradients, direction):
        return sum((one * two).sum() for one, two in zip(gradients, direction, strict=True))

    def curvature():  # uᵀ H u
        loss = (model(x) - y).square().mean()
        first = along(torch.autograd.grad(loss, parameters, create_graph=True), u)
        return along(torch.autograd.grad(first, parameters, create_graph=True), u)

    found, values, step = along(torch.autograd.grad(curvature(), parameters), v), [], 1e-5
    for sign in (1, -2):
        for tensor, direction in zip(parameters, v, strict=True):
            tensor.data += sign * step * direction
        values.append(curvature().item())
    assert found.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "shape", "said"),
    [
        (Cnn(), (64,), r"name = cnn: one example has shape \(64,\); must be .* data\.shape = \"image\""),
        (Vit(), (8, 8), r"name = vit: .* must be \(channels, height, width\)"),
        (Resnet(), (64,), r"name = resnet: .* must be \(channels, height, width\)"),
        (Cnn(channels=[1] * 3), (1, 8, 7), r"shape \(1, 8, 7\); height and width must be at least 8: choose fewer"),
        (Vit(patch=3), (1, 9, 8), r"must be multiples of model\.patch = 3: choose another patch"),
        (Vit(patch=3), (1, 8, 9), r"must be multiples of model\.patch = 3: choose another patch"),
    ],
    ids=str,
)  # fmt: skip
def test_examples_that_a_model_does_not_take(table, shape, said):
    for refuse in (lambda: build(table, shape), lambda: table.parameters(shape, 1)):
        with pytest.raises(InputError, match=said) as caught:
            refuse()
        assert "\n" not in str(caught.value)


# --- import ----------------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

calls = []

def linear(input_shape, outputs, bias=True):
    calls.append((input_shape, outputs, bias))
    return nn.Linear(input_shape[0], outputs, bias=bias)

def normalised(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 4), nn.BatchNorm1d(4), nn.Dropout().eval(), nn.Linear(4, outputs))

def raises(input_shape, outputs):
    raise KeyError("some key")

def number(input_shape, outputs):
    return 3

def flat(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 1), nn.Flatten(0))

def pair(input_shape, outputs):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(1, 1)

def wrong_features(input_shape, outputs):
    return nn.Linear(input_shape[0] + 1, outputs)

def frozen(input_shape, outputs):
    return nn.Linear(input_shape[0], outputs).requires_grad_(False)

not_callable = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(SOURCE)
    (tmp_path / "users_broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("users_models", None)


@pytest.mark.usefixtures("user_module")
def test_an_imported_model_gets_shapes_and_options():
    model = build(imported("users_models:linear", bias=False), (5,), outputs=2, dtype=torch.float64)
    assert sys.modules["users_models"].calls == [((5,), 2, False)]
    assert model.weight.shape == (2, 5)
    assert model.weight.dtype == torch.float64
    assert torch.equal(model.weight, build(imported("users_models:linear", bias=False), (5,), 2).weight.double())


@pytest.mark.usefixtures("user_module")
def test_trying_an_imported_model_changes_neither_modes_nor_statistics():
    model = build(imported("users_models:normalised"), (5,))
    assert [layer.training for layer in model] == [True, True, False, True]
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_such_module:model", {}, r"importing no_such_module failed: ModuleNotFoundError"),
        ("users_broken:model", {}, r"importing users_broken failed: .*no_such_package_at_all"),
        ("users_models:absent", {}, r"users_models has no callable absent"),
        ("users_models:not_callable", {}, r"has no callable not_callable"),
        ("users_models:raises", {}, r"calling it with input_shape, outputs failed: KeyError: 'some key'"),
        ("users_models:linear", {"depth": 3}, r"calling it with input_shape, outputs, depth failed: TypeError"),
        ("users_models:number", {}, r"it returned a int; it must return a torch\.nn\.Module"),
        ("users_models:flat", {}, r"on 2 examples gave \(2,\); it must give \(2, 1\)"),
        ("users_models:pair", {}, r"on 2 examples gave tuple; it must give \(2, 1\)"),
        ("users_models:wrong_features", {}, r"a forward pass on 2 examples of shape \(5,\) failed: RuntimeError"),
        ("users_models:frozen", {}, r"no parameter with requires_grad"),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value and " " not in value else "",
)
def test_an_imported_model_that_cannot_be_used(path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(imported(path, **options), (5,))
    assert str(caught.value).startswith(f"model.import = {path}: ")
    assert "\n" not in str(caught.value)
