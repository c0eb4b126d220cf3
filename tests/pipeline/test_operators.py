"""Operators against matrices that are formed, in float64, by other means."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh

from pipeline.errors import InputError
from pipeline.losses import mse
from pipeline.operators import BlockedNTK, GaussNewtonOperator, HessianOperator, NTKOperator, Preconditioned
from pipeline.spectra import as_matrix, lanczos


def problem(n=6, d=3, width=4, c=2, seed=0, dtype=torch.float64):
    """A tanh network, examples and targets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(d, width), torch.nn.Tanh(), torch.nn.Linear(width, c)]
        model = torch.nn.Sequential(*layers).to(dtype)
        return model, torch.randn(n, d, dtype=dtype), torch.randn(n, c, dtype=dtype)


def quartic(prediction, target):
    """A loss whose curvature couples the outputs and depends on the prediction."""
    return ((prediction - target).square().sum(dim=1) + prediction.prod(dim=1)).square().mean()


def double_jacobian(function):
    """The Hessian by torch.func, which the operators do not use."""
    return torch.func.jacrev(torch.func.jacrev(function))


def dense_hessian(model, loss, x, y):
    trained = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    sizes = [tensor.numel() for tensor in trained.values()]

    def of(flat):
        pieces = flat.split(sizes)
        named = {k: piece.view_as(t) for (k, t), piece in zip(trained.items(), pieces, strict=True)}
        return loss(torch.func.functional_call(model, named, (x,)), y)

    return double_jacobian(of)(torch.cat([tensor.reshape(-1) for tensor in trained.values()])).numpy(force=True)


def dense_gauss_newton(model, loss, x, y):
    j = oracles.jacobian(model, x).reshape(y.numel(), -1)
    curvature = double_jacobian(lambda flat: loss(flat.view_as(y), y))(model(x).detach().reshape(-1)).numpy()
    return j.T @ curvature @ j


def formed(operator):
    return operator @ np.eye(operator.shape[1])


SHAPES = {"n": st.integers(1, 6), "d": st.integers(1, 4), "width": st.integers(1, 5), "c": st.integers(1, 3)}
SHAPES["seed"] = st.integers(0, 2**31)
LOSSES = {"mse": mse, "quartic": quartic}


@given(shapes=st.fixed_dictionaries(SHAPES), frozen=st.sampled_from([None, "0.weight", "0.bias", "2.weight"]))
@settings(deadline=None, max_examples=25)
def test_every_operator_is_its_matrix(shapes, frozen):
    model, x, y = problem(**shapes)
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(formed(NTKOperator(model, x)), as_matrix(oracles.ntk(model, x)), **close)
    for loss in LOSSES.values():
        np.testing.assert_allclose(
            formed(HessianOperator(model, loss, x, y)), dense_hessian(model, loss, x, y), **close
        )
        np.testing.assert_allclose(
            formed(GaussNewtonOperator(model, loss, x, y)), dense_gauss_newton(model, loss, x, y), **close
        )


@given(shapes=st.fixed_dictionaries(SHAPES), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_a_preconditioned_hessian_is_its_matrix_and_has_the_spectrum_of_the_inverse_times_it(shapes, seed):
    model, x, y = problem(**shapes)
    hessian = dense_hessian(model, mse, x, y)
    diagonal = np.random.default_rng(seed).uniform(0.1, 10, len(hessian))
    operator = Preconditioned(HessianOperator(model, mse, x, y), torch.tensor(diagonal))
    matrix = np.stack([operator.apply(row).numpy() for row in torch.eye(len(hessian), dtype=torch.float64)])
    np.testing.assert_allclose(matrix, hessian / np.sqrt(np.outer(diagonal, diagonal)), rtol=1e-9, atol=1e-11)
    top = lanczos(operator, tolerance=1e-8).values[0].item()
    assert top == pytest.approx(np.linalg.eigvals(hessian / diagonal[:, None]).real.max(), rel=1e-6, abs=1e-9)


def test_a_cross_kernel_and_its_adjoint():
    model, x, _ = problem(n=7)
    operator = NTKOperator(model, x[:3], x[3:])
    wanted = oracles.ntk(model, x[:3], x[3:]).swapaxes(1, 2).reshape(6, 8)
    assert operator.shape == (6, 8)
    np.testing.assert_allclose(formed(operator), wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(formed(operator.H), wanted.T, rtol=1e-10, atol=1e-12)
    vector = torch.arange(6.0, dtype=torch.float64)
    np.testing.assert_allclose(operator.apply_adjoint(vector), wanted.T @ vector.numpy(), rtol=1e-10)


@pytest.mark.parametrize("make", [HessianOperator, GaussNewtonOperator], ids=lambda make: make.__name__)
def test_a_symmetric_operator_is_its_own_adjoint(make):
    model, x, y = problem()
    operator = make(model, mse, x, y)
    assert operator.H is operator
    kernel = NTKOperator(model, x)
    assert kernel.H is kernel


def test_gauss_newton_of_mse_has_the_spectrum_of_the_kernel():
    model, x, y = problem(n=5, c=2)
    curvature = np.linalg.eigvalsh(formed(GaussNewtonOperator(model, mse, x, y)))[::-1]
    kernel = np.linalg.eigvalsh(as_matrix(oracles.ntk(model, x)))[::-1] / 5
    np.testing.assert_allclose(curvature[:10], kernel, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(curvature[10:], 0, atol=1e-13)


def test_of_a_linear_model_the_hessian_is_gauss_newton():
    x, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(5, 1).double()
    model = torch.nn.Linear(3, 1, bias=False).double()
    wanted = (x.T @ x / 5).numpy()
    np.testing.assert_allclose(formed(HessianOperator(model, mse, x, y)), wanted, rtol=1e-12)
    np.testing.assert_allclose(formed(GaussNewtonOperator(model, mse, x, y)), wanted, rtol=1e-12)


def test_a_linear_loss_of_a_linear_model_has_no_curvature():
    model, x, y = torch.nn.Linear(3, 1), torch.ones(5, 3), torch.ones(5, 1)
    for make in (HessianOperator, GaussNewtonOperator):
        np.testing.assert_array_equal(formed(make(model, lambda f, _: f.sum(), x, y)), np.zeros((4, 4)))


def test_a_parameter_that_the_model_does_not_use_has_zeros():
    model, x, y = problem(n=2, d=2, width=2, c=1)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    for operator in (HessianOperator(model, mse, x, y), GaussNewtonOperator(model, mse, x, y)):
        matrix = formed(operator)
        assert matrix.shape == (11, 11)
        assert not matrix[:2].any()  # a module's own parameters come first
        assert matrix[2:, 2:].any()


def test_the_gradient_comes_with_the_hessian():
    model, x, y = problem()
    operator = HessianOperator(model, quartic, x, y)
    quartic(model(x), y).backward()
    expected = torch.cat([tensor.grad.reshape(-1) for tensor in model.parameters()])
    torch.testing.assert_close(operator.gradient, expected)
    assert not operator.gradient.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numpy_and_torch_give_the_same_in_the_models_dtype(dtype):
    model, x, y = problem(dtype=dtype)
    vector = np.linspace(-1, 1, 26)
    with torch.no_grad():  # as in evaluation code
        operator = HessianOperator(model, mse, x, y)
    image = operator.apply(torch.tensor(vector, dtype=dtype))
    assert image.dtype == dtype
    assert operator.dtype == image.numpy().dtype
    np.testing.assert_array_equal(operator @ vector, image)
    assert all(tensor.grad is None for tensor in model.parameters())


def test_scipy_takes_them():
    model, x, y = problem(n=8)
    operator = HessianOperator(model, quartic, x, y)
    top = np.linalg.eigvalsh(dense_hessian(model, quartic, x, y))[-2:]
    np.testing.assert_allclose(eigsh(operator, 2, which="LA")[0], top, rtol=1e-10)


MAKERS = {
    "ntk": lambda model, x, y: NTKOperator(model, x),
    "gauss-newton": lambda model, x, y: GaussNewtonOperator(model, mse, x, y),
    "hessian": lambda model, x, y: HessianOperator(model, mse, x, y),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_after_an_update_it_refuses(make):
    model, x, y = problem()
    operator = make(model, x, y)
    operator @ np.ones(operator.shape[1])
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    with torch.no_grad():
        model[2].bias -= 0.1
    with pytest.raises(InputError, match=r"changed in place after this \w+Operator was made .*before the update"):
        operator @ np.ones(operator.shape[1])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_vector_that_does_not_fit(make):
    with pytest.raises(InputError, match=r"a vector of shape \(3,\): must be \(\d+,\)"):
        make(*problem()).apply(torch.ones(3, dtype=torch.float64))


def test_nothing_to_train():
    model, x, _ = problem()
    model.requires_grad_(False)
    with pytest.raises(InputError, match="Sequential has no parameter with requires_grad: its operators are empty"):
        NTKOperator(model, x)


def test_parameters_of_two_dtypes():
    model, x, _ = problem()
    model[2].float()
    with pytest.raises(InputError, match=r"parameters of Sequential are .*float32.*: must be of one dtype"):
        NTKOperator(model, x)


# --- sharpness -------------------------------------------------------------------------------------------------------


def test_sharpness_along_gradient_descent_needs_few_products():
    model, x, y = problem(n=40, d=6, width=12, c=1)
    start, products = None, []
    for _ in range(6):
        operator = HessianOperator(model, mse, x, y)
        found = lanczos(operator, start=start)
        start = found.vectors
        products.append(found.products)
        exact = np.linalg.eigvalsh(dense_hessian(model, mse, x, y))[-1]
        assert float(found.values[0]) == pytest.approx(exact, rel=1e-6)
        for _ in range(3):
            gradients = torch.autograd.grad(mse(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for tensor, gradient in zip(model.parameters(), gradients, strict=True):
                    tensor -= 0.5 / exact * gradient
    assert max(products[1:]) < products[0]


def test_the_pulled_back_eigenvector_of_the_kernel_is_a_good_first_vector():
    model, x, y = problem(n=40, d=6, width=12, c=1)
    values, vectors = np.linalg.eigh(oracles.ntk(model, x)[..., 0, 0])
    start = torch.from_numpy(oracles.jacobian(model, x)[:, 0].T @ vectors[:, -1])
    cold = lanczos(HessianOperator(model, mse, x, y))
    warm = lanczos(HessianOperator(model, mse, x, y), start=start)
    assert warm.products < cold.products
    assert float(warm.values[0]) == pytest.approx(float(cold.values[0]), rel=1e-6)
    found = lanczos(GaussNewtonOperator(model, mse, x, y), start=start, tolerance=1e-8)
    assert found.products == 1  # there it is the eigenvector itself
    assert float(found.values[0]) == pytest.approx(values[-1] / 40, rel=1e-10)


@given(shapes=st.fixed_dictionaries(SHAPES), at_once=st.integers(1, 7), memory=st.integers(0, 2000))
@settings(deadline=None, max_examples=20)
def test_products_in_blocks_of_examples_are_those_of_the_kernel(shapes, at_once, memory):
    model, x, _ = problem(**shapes)
    full = oracles.ntk(model, x)
    operator = BlockedNTK(model, x, at_once, memory)
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(3, len(x))))
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(operator.traced(vectors), vectors.numpy() @ oracles.trace(full), **close)
    one = torch.from_numpy(np.random.default_rng(1).normal(size=operator.shape[0]))
    np.testing.assert_allclose(operator.apply(one), as_matrix(full) @ one.numpy(), **close)
