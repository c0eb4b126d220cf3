"""Kernels of infinite width against another library, closed forms, quadrature, sampling and finite networks."""

import itertools
import math
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import InputError
from pipeline.kernels.infinite import infinite_kernels

GOLDEN = Path(__file__).parents[2] / "golden" / "neural_tangents.npz"
ACTIVATIONS = ("relu", "erf")
FUNCTIONS = {"relu": np.vectorize(lambda z: max(z, 0.0)), "erf": np.vectorize(math.erf)}
DEEP = {"relu": {"weight_std": math.sqrt(2), "bias_std": 0.3}, "erf": {"weight_std": 1.5, "bias_std": 0.3}}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(kernels, expected, rtol=1e-12):
    for kernel, wanted in zip(kernels, expected, strict=True):
        np.testing.assert_allclose(kernel.numpy(), wanted, rtol=rtol, atol=1e-13 * np.abs(wanted).max())


# --- another library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("stds", ["W1.41421-b0", "W1.3-b0.4"])
def test_golden(activation, depth, stds):
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        case = {name: arrays[f"infinite/{activation}-depth{depth}-{stds}/{name}"] for name in
                ("x", "nngp", "ntk", "W_std", "b_std", "depth")}  # fmt: skip
    assert case["depth"] == depth
    kernels = infinite_kernels(
        torch.tensor(case["x"]),
        depth=depth,
        activation=activation,
        weight_std=float(case["W_std"]),
        bias_std=float(case["b_std"]),
    )
    for kernel, wanted in zip(kernels, (case["nngp"], case["ntk"]), strict=True):
        difference = np.abs(kernel.numpy() - wanted) / np.abs(wanted)
        assert difference[~np.eye(len(wanted), dtype=bool)].max() < 1e-11
        # That library's arccos of a rounded 1 costs it half of the digits; for ours see the law of the diagonal.
        assert difference.max() < 1e-8


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_one_hidden_relu_layer_is_the_arc_cosine_kernel():
    x, x2, d = randn(6, 4), randn(5, 4, seed=1), 4
    lengths = x.norm(dim=1)[:, None] * x2.norm(dim=1)
    theta = torch.arccos(x @ x2.T / lengths)
    order0 = (math.pi - theta) / math.pi
    order1 = lengths * (theta.sin() + (math.pi - theta) * theta.cos()) / math.pi
    for weight_std in (1.0, math.sqrt(2)):
        nngp = weight_std**4 / d * order1 / 2
        ntk = nngp + weight_std**4 / d * (x @ x2.T) * order0 / 2
        close(infinite_kernels(x, x2, depth=1, weight_std=weight_std), (nngp.numpy(), ntk.numpy()))


@pytest.mark.parametrize("depth", [1, 2, 10, 1500])
def test_the_diagonal_of_relu_grows_by_a_law(depth):
    """Critical ReLU keeps the variance: E[φφ] = Σ/2, E[φ'φ'] = 1/2, so Θ gains one Σ a layer."""
    x = randn(4, 3)
    nngp, ntk = infinite_kernels(x, depth=depth, weight_std=math.sqrt(2))
    variance = 2 * (x**2).sum(1) / 3
    np.testing.assert_allclose(nngp.diagonal(), variance, rtol=1e-12)
    np.testing.assert_allclose(ntk.diagonal(), (depth + 1) * variance, rtol=1e-12)


def test_a_shrinking_and_a_growing_relu_network_have_the_angles_of_the_critical_one():
    """Without biases W_std only scales, by W_std² a layer, down to where no product of variances is a number."""
    x, depth = randn(4, 3), 900
    critical = infinite_kernels(x, depth=depth, weight_std=math.sqrt(2))
    for weight_std in (1.0, 1.9):
        scale = (weight_std / math.sqrt(2)) ** (2 * depth + 2)
        scaled = infinite_kernels(x, depth=depth, weight_std=weight_std)
        close((kernel / scale for kernel in scaled), [kernel.numpy() for kernel in critical], rtol=1e-9)


def test_erf_of_huge_inputs_is_the_sign():
    x = randn(6, 4)
    unit = x / x.norm(dim=1, keepdim=True)
    arcsine = 2 / math.pi * torch.arcsin((unit @ unit.T).clamp(-1, 1))
    for size in (1e20, 1e90, 1e150):
        np.testing.assert_allclose(infinite_kernels(size * x, depth=1, activation="erf").nngp, arcsine, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_weights_only_biases_are_left(activation):
    kernels = infinite_kernels(randn(3, 2), depth=2, activation=activation, weight_std=0.0, bias_std=0.5)
    close(kernels, (np.full((3, 3), 0.25),) * 2)


# --- quadrature and sampling -----------------------------------------------------------------------------------------


def covariance(x, weight_std, bias_std):
    return bias_std**2 + weight_std**2 * (x @ x.T).numpy() / x.shape[1]


def factors(covariance):
    """Standard normals to the preactivations of two examples."""
    (a, c), (_, b) = covariance
    return np.array([[math.sqrt(a), 0], [c / math.sqrt(a), math.sqrt(b - c**2 / a)]])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.floats(0.1, 1.2),
    weight_std=st.floats(0.1, 1.2),
    bias_std=st.floats(0, 0.5),
)
def test_erf_equals_quadrature(seed, size, weight_std, bias_std):
    x = size * randn(2, 3, seed=seed)
    nodes, weights = np.polynomial.hermite_e.hermegauss(160)
    weights = weights / weights.sum()
    first = covariance(x, weight_std, bias_std)
    u, v = np.einsum("ab,bij->aij", factors(first), np.stack(np.meshgrid(nodes, nodes, indexing="ij")))
    slope = [2 / math.sqrt(math.pi) * np.exp(-(z**2)) for z in (u, v)]
    values = weights @ (FUNCTIONS["erf"](u) * FUNCTIONS["erf"](v)) @ weights
    slopes = weights @ (slope[0] * slope[1]) @ weights
    nngp, ntk = infinite_kernels(x, depth=1, activation="erf", weight_std=weight_std, bias_std=bias_std)
    expected = bias_std**2 + weight_std**2 * values
    assert nngp[0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert ntk[0, 1].item() == pytest.approx(expected + weight_std**2 * first[0, 1] * slopes, abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_layer_equals_its_samples(activation):
    """Within five standard errors of 10^6 samples of the first layer's preactivations."""
    x, options = randn(2, 3), DEEP[activation]
    weight, bias = options["weight_std"] ** 2, options["bias_std"] ** 2
    first = covariance(x, **options)
    z = torch.tensor(factors(first)) @ randn(2, 1_000_000, seed=7)
    if activation == "relu":
        values, slopes = z.relu(), (z > 0).double()
    else:
        values, slopes = torch.erf(z), 2 / math.sqrt(math.pi) * torch.exp(-(z**2))
    nngp, ntk = infinite_kernels(x, depth=1, activation=activation, **options)
    exact = ((nngp - bias) / weight, (ntk - nngp) / weight / torch.tensor(first))
    for found, samples in zip(exact, (values, slopes), strict=True):
        for i, j in ((0, 0), (0, 1), (1, 1)):
            products = samples[i] * samples[j]
            assert abs(found[i, j] - products.mean()) < 5 * products.std() / 1000


# --- finite networks -------------------------------------------------------------------------------------------------


class Finite(nn.Module):
    """The network of the module's docstring, at a finite width."""

    def __init__(self, sizes, activation, weight_std, bias_std, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape for before, after in itertools.pairwise(sizes) for shape in ((after, before), (after,))]
        self.tensors = nn.ParameterList(torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
        self.activation = {"relu": torch.relu, "erf": torch.erf}[activation]
        self.weight_std, self.bias_std = weight_std, bias_std

    def layers(self, h):
        *_, last = range(0, len(self.tensors), 2)
        for index in range(0, len(self.tensors), 2):
            w, b = self.tensors[index], self.tensors[index + 1]
            z = self.weight_std / math.sqrt(w.shape[1]) * h @ w.T + self.bias_std * b
            h = z if index == last else self.activation(z)
        return h

    def forward(self, x):
        return self.layers(x.flatten(1))


@pytest.mark.parametrize(("activation", "depth"), [("relu", 1), ("relu", 2), ("erf", 2)])
def test_the_empirical_ntk_approaches_the_limit_as_one_over_the_root_of_the_width(activation, depth):
    x, widths, seeds = randn(4, 3), np.array([16, 32, 64, 128, 256]), range(150)
    exact = infinite_kernels(x, depth=depth, activation=activation, **DEEP[activation]).ntk.numpy()
    rms = []
    for width in widths:
        models = (Finite([3, *[width] * depth, 1], activation, **DEEP[activation], seed=seed) for seed in seeds)
        kernels = np.stack([oracles.trace(oracles.ntk(model, x)) for model in models])
        rms.append(np.sqrt(((kernels - exact) ** 2).mean(0).sum() / (exact**2).sum()))
    exponent, _ = np.polyfit(np.log(widths), np.log(rms), 1)
    # The logarithm of a root mean square over 150 seeds is known to about 0.08, which is 0.04 in this fit.
    assert exponent == pytest.approx(-0.5, abs=0.1)
    # The mean over seeds, of the widest: within five standard errors, where a bias of order 1 / width disappears.
    assert (np.abs(kernels.mean(0) - exact) < 5 * kernels.std(0) / math.sqrt(len(seeds))).all()
    assert rms[-1] < 0.2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_outputs_of_finite_networks_have_the_covariance_of_the_nngp(activation):
    """With one hidden layer at any width, so that only sampling noise is left: five standard errors."""
    x, draws = randn(3, 3), 4000
    outputs = torch.stack(
        [Finite([3, 8, 1], activation, **DEEP[activation], seed=s)(x)[:, 0].detach() for s in range(draws)]
    )
    products = outputs[:, :, None] * outputs[:, None, :]
    nngp = infinite_kernels(x, depth=1, activation=activation, **DEEP[activation]).nngp
    assert ((products.mean(0) - nngp).abs() < 5 * products.std(0) / math.sqrt(draws)).all()


def test_c_outputs_have_the_kernel_c_times_in_the_trace():
    x, width, c = randn(3, 2), 20_000, 3
    full = oracles.ntk(Finite([2, width, c], "relu", **DEEP["relu"], seed=0), x)
    ntk = infinite_kernels(x, depth=1, **DEEP["relu"]).ntk.numpy()
    np.testing.assert_allclose(oracles.trace(full), c * ntk, atol=0.03 * c * ntk.max())


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """Options, and examples of which some are 0, some are copies and some are multiples of others."""
    x = randn(draw(st.integers(1, 8)), *draw(st.sampled_from([(1,), (3,), (2, 2)])), seed=draw(st.integers(0, 2**31)))
    x = x * 10 ** draw(st.floats(-3, 3))
    picks = draw(st.lists(st.tuples(st.integers(0, len(x) - 1), st.sampled_from([0.0, 1.0, -1.0, 2.0])), max_size=4))
    x = torch.cat([x, *(x[i : i + 1] * factor for i, factor in picks)])
    options = {
        "depth": draw(st.integers(1, 5)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "weight_std": draw(st.floats(0, 2)),
        "bias_std": draw(st.sampled_from([0.0, 0.5])),
    }
    return x, options


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_kernels_of_one_set_are_symmetric_and_positive(case):
    x, options = case
    for kernel in infinite_kernels(x, **options):
        assert torch.equal(kernel, kernel.T)
        scale = kernel.diagonal().sqrt()
        assert (kernel.abs() <= scale[:, None] * scale * (1 + 1e-12) + 1e-300).all()
        assert torch.linalg.eigvalsh(kernel).min() >= -1e-7 * kernel.trace()


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_two_sets_give_a_block_of_the_kernels_of_their_union(case, data):
    x, options = case
    cut = data.draw(st.integers(0, len(x) - 1))
    cross = infinite_kernels(x, x[cut:], **options)
    same = infinite_kernels(x, **options)
    for block, whole in zip(cross, same, strict=True):
        # A product that rounds in another way turns parallel examples by an angle of 1e-8.
        np.testing.assert_allclose(block, whole[:, cut:], atol=1e-7 * whole.abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_examples_have_equal_kernels(activation):
    x = randn(7, 1000)
    x = torch.cat([x, x[[2, 2, 5]]])
    for kernel in infinite_kernels(x, depth=4, activation=activation, **DEEP[activation]):
        for copy, original in ((7, 2), (8, 2), (9, 5)):
            assert kernel[copy, original].item() == pytest.approx(kernel[original, original].item(), rel=1e-14)
    cross = infinite_kernels(x, x.clone(), depth=4, activation=activation, **DEEP[activation])
    close(cross, [kernel.numpy() for kernel in infinite_kernels(x, depth=4, activation=activation, **DEEP[activation])])


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
def test_close_examples_lose_half_of_the_digits_and_no_more(distance):
    """At the angle θ = distance, to the first order in it: E[φφ] = Σ/2 and E[φ'φ'] = 1/2 - θ/2π."""
    x = torch.tensor([[1.0, 0.0], [math.cos(distance), math.sin(distance)]], dtype=torch.float64)
    nngp, ntk = infinite_kernels(x, depth=1, weight_std=math.sqrt(2))
    assert nngp[0, 1].item() == pytest.approx(1, abs=distance**2 + 1e-14)
    assert ntk[0, 1].item() == pytest.approx(2 - distance / math.pi, abs=2 * distance**2 + 2e-8)


def test_zero_inputs_have_zero_kernels_without_biases():
    x = randn(4, 3)
    x[1] = 0
    for activation in ACTIVATIONS:
        for kernel in infinite_kernels(x, depth=3, activation=activation):
            assert kernel.isfinite().all()
            assert (kernel[1] == 0).all()
            assert (kernel[0, [0, 2, 3]] != 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2)], ids=str)
def test_any_shape_and_dtype(activation, dtype, shape):
    x = (50 * randn(5, *shape).abs()).to(dtype)
    kernels = infinite_kernels(x, depth=2, activation=activation)
    expected = infinite_kernels(x.double().reshape(5, 12), depth=2, activation=activation)
    for kernel, wanted in zip(kernels, expected, strict=True):
        assert kernel.dtype == torch.float64
        assert torch.equal(kernel, wanted)


def test_nothing_is_kept_of_the_examples():
    x = randn(4, 3).requires_grad_()
    before = x.detach().clone()
    assert not any(kernel.requires_grad for kernel in infinite_kernels(x, depth=2))
    assert torch.equal(x, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gpu_gives_the_same_kernels(activation):
    x = torch.cat([randn(50, 10), randn(5, 10), torch.zeros(1, 10)])
    on_gpu = infinite_kernels(x.cuda(), depth=3, activation=activation, **DEEP[activation])
    assert all(kernel.is_cuda and torch.equal(kernel, kernel.T) for kernel in on_gpu)
    expected = infinite_kernels(x, depth=3, activation=activation, **DEEP[activation])
    close((kernel.cpu() for kernel in on_gpu), [kernel.numpy() for kernel in expected])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, r"activation = 'tanh': must be one of 'relu', 'erf'"),
        ({"depth": 0}, "depth = 0: must be a whole number of hidden layers, 1 or more"),
        ({"depth": 1.5}, "depth = 1.5: must be a whole number"),
        ({"weight_std": -1.0}, r"weight_std = -1\.0: must be a finite number, 0 or more"),
        ({"weight_std": math.nan}, "weight_std = nan: must be a finite number"),
        ({"bias_std": -0.1}, r"bias_std = -0\.1: must be a finite number"),
        ({"bias_std": math.inf}, "bias_std = inf: must be a finite number"),
        ({"depth": 600, "weight_std": 4.0}, "a kernel overflows float64 at depth = 600, weight_std = 4, bias_std = 0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        infinite_kernels(randn(3, 2), **{"depth": 1, **options})


NOT_FINITE = randn(3, 2)
NOT_FINITE[1] = torch.tensor([math.nan, math.inf])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ((randn(3),), r"x1 has shape \(3,\) and dtype torch.float64: must be \(n, features...\), real and not empty"),
        ((randn(3, 0),), r"x1 has shape \(3, 0\)"),
        ((randn(0, 3),), r"x1 has shape \(0, 3\)"),
        ((randn(3, 2), randn(2)), r"x2 has shape \(2,\)"),
        ((randn(3, 2).cfloat(),), r"x1 has shape \(3, 2\) and dtype torch.complex64"),
        ((randn(3, 2), randn(3, 4)), r"x1 and x2 have examples of shape \(2,\) and \(4,\): must be the same"),
        ((randn(3, 2, 2), randn(3, 4)), r"x1 and x2 have examples of shape \(2, 2\) and \(4,\)"),
        ((NOT_FINITE,), "x1 has 2 of 6 values that are not finite: leave those examples out"),
        ((randn(3, 2), NOT_FINITE), "x2 has 2 of 6 values that are not finite"),
        ((1e200 * randn(3, 2),), "a kernel overflows float64"),
    ],
    ids=["one axis", "no features", "no examples", "second", "complex", "sizes", "shapes", "nan", "second nan", "huge"],
)
def test_bad_examples(examples, message):
    with pytest.raises(InputError, match=message):
        infinite_kernels(*examples, depth=1)
