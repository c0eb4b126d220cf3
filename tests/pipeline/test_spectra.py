"""Eigenpairs against numpy and closed forms, on friendly and on degenerate matrices."""

import numpy as np
import oracles
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import spectra
from pipeline.errors import InputError, NtkEosError
from pipeline.kernels import NTK
from pipeline.spectra import (
    DENSE,
    GUARDS,
    NonFiniteKernel,
    as_matrix,
    eigenpairs,
    lanczos,
    leading_pairs,
    top_eigenvalue,
)


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def with_spectrum(values, seed=0):
    """A symmetric matrix that has these eigenvalues."""
    q = orthogonal(len(values), seed)
    matrix = (q * np.asarray(values)) @ q.T
    return (matrix + matrix.T) / 2


def power_law(n, exponent=1.0):
    return np.arange(1, n + 1.0) ** -exponent


CASES = {
    "power law": lambda n: with_spectrum(power_law(n)),
    "one outlier": lambda n: with_spectrum([1e6, *power_law(n)[1:]]),
    "flat": lambda n: with_spectrum(np.linspace(1, 0.99, n)),
    "double top": lambda n: with_spectrum([1, 1, *power_law(n)[2:] / 2][:n]),
    "identity": lambda n: np.eye(n),
    "rank one": lambda n: np.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1)),
    "ones": lambda n: np.ones((n, n)),
    "zeros": lambda n: np.zeros((n, n)),
    "diagonal": lambda n: np.diag(np.arange(n, 0.0, -1)),
    "one entry": lambda n: np.diag([0.0] * (n - 1) + [3.0]),
    "two blocks": lambda n: scipy.linalg.block_diag(np.ones((n // 2, n // 2)), np.ones((n - n // 2, n - n // 2))),
    "indefinite": lambda n: with_spectrum([1, *-power_law(n)[1:] * 50]),
    "negative": lambda n: with_spectrum(-power_law(n)),
    "tiny": lambda n: with_spectrum(power_law(n)) * 1e-200,
    "huge": lambda n: with_spectrum(power_law(n)) * 1e200,
    "subnormal": lambda n: with_spectrum(power_law(n)) * 1e-312,
}


# --- eigenpairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (100, 5), (100, 100), (300, 20)], ids=str)
def test_pairs_are_pairs(case, n, k):
    kernel = CASES[case](n)
    values, vectors, *_ = eigenpairs(kernel, k)
    scale = max(np.abs(kernel).max(), 1e-300)
    assert (values.shape, vectors.shape) == ((k,), (n, k))
    assert (values.dtype, vectors.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(values / scale, np.linalg.eigvalsh(kernel / scale)[::-1][:k], atol=1e-12 * n)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(kernel / scale @ vectors, vectors * (values / scale), atol=1e-12 * n)
    assert np.all(np.diff(values) <= 0)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**31), data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_known_spectrum_is_found(n, seed, data):
    wanted = np.sort(np.random.default_rng(seed).exponential(size=n))[::-1]
    k = data.draw(st.integers(1, n))
    values = eigenpairs(with_spectrum(wanted, seed), k).values
    np.testing.assert_allclose(values, wanted[:k], atol=1e-13 * n * wanted[0])


def test_few_and_all_pairs_agree():
    kernel = with_spectrum(power_law(100))
    few, all_ = eigenpairs(kernel, 10), eigenpairs(kernel, 100)
    np.testing.assert_allclose(few[0], all_[0][:10], rtol=1e-12)
    np.testing.assert_allclose(few[1], all_[1][:, :10], atol=1e-11)


@pytest.mark.parametrize("n", [5, 60, 200])
def test_the_component_of_largest_modulus_is_positive(n):
    vectors = eigenpairs(with_spectrum(power_law(n), seed=n), min(n, 20)).vectors
    largest = np.abs(vectors).argmax(axis=0)
    assert np.all(vectors[largest, np.arange(vectors.shape[1])] > 0)


@pytest.mark.parametrize("flip", [1, -1])
def test_among_equal_moduli_the_first_decides(monkeypatch, flip):
    vectors = flip * np.array([[0.0, 0.6], [-0.5, 0.8], [0.5, -0.8]])
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *args, **kwargs: (np.array([1.0, 2.0]), vectors))
    np.testing.assert_array_equal(eigenpairs(np.eye(3), 2)[1], [[0.6, 0.0], [0.8, 0.5], [-0.8, -0.5]])


def test_the_kernel_is_not_changed():
    kernel = with_spectrum(power_law(100))
    before = kernel.copy()
    eigenpairs(kernel, 5), eigenpairs(kernel, 100), top_eigenvalue(kernel)
    np.testing.assert_array_equal(kernel, before)


def test_float32_is_solved_in_float64():
    kernel = with_spectrum(power_law(30)).astype(np.float32)
    values = eigenpairs(kernel, 3).values
    np.testing.assert_allclose(values, np.linalg.eigvalsh(kernel.astype(np.float64))[::-1][:3], rtol=1e-13)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_number_of_pairs_that_does_not_fit(k):
    with pytest.raises(InputError, match=rf"k = {k} eigenpairs of a kernel on 3 examples: must be from 1 to 3"):
        eigenpairs(np.eye(3), k)


# --- eigenpairs of large kernels, from the last ones -----------------------------------------------------------------

LARGE, K = DENSE + 40, 20


@pytest.fixture(scope="module")
def kernels():
    """NTKs of a network every 25 steps of gradient descent, on inputs of power-law variances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LARGE, 60, generator=generator, dtype=torch.float64) * torch.arange(1, 61) ** -0.5
    y = torch.sign(torch.sin(3 * x[:, :1]) + 0.3 * torch.randn(LARGE, 1, generator=generator, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)).double()
    ntk = NTK(x)
    rate, kernels = LARGE / top_eigenvalue(ntk(model).numpy()), []
    for step in range(101):
        if step % 25 == 0:
            kernels.append(ntk(model).numpy().copy())
        model.zero_grad()
        ((model(x) - y).square().sum() / (2 * LARGE)).backward()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor -= rate * tensor.grad
    return kernels


def check(kernel, found, k, tolerance):
    """Orthonormal, as accurate as promised, and none missed: the values bound all others from above."""
    spectrum = np.linalg.eigvalsh(kernel)[::-1]
    n, expected, scale = len(kernel), spectrum[:k], np.abs(spectrum).max() or 1.0
    rounding = 3e-6 if tolerance >= 1e-4 else 1e-11
    residuals = np.linalg.norm((kernel / scale) @ found.vectors - found.vectors * (found.values / scale), axis=0)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-11)
    np.testing.assert_allclose(found.residuals / scale, residuals, atol=rounding)
    assert residuals.max() <= tolerance + rounding
    np.testing.assert_allclose(found.values / scale, expected / scale, atol=tolerance + 1e-14 * n)
    return np.abs(found.values - expected).max() / scale


@pytest.mark.parametrize(
    ("tolerance", "error", "iterations"), [(1e-8, 1e-13, 8), (1e-6, 1e-10, 6), (1e-4, 1e-6, 4)], ids=str
)
def test_along_gradient_descent_they_are_lapacks(kernels, tolerance, error, iterations):
    start = None
    for i, kernel in enumerate(kernels):
        found = eigenpairs(kernel, K, start=start, tolerance=tolerance)
        assert check(kernel, found, K, tolerance) <= error
        assert found.iterations > 0
        assert found.iterations <= iterations or i == 0
        assert found.start.shape == (LARGE, K + GUARDS)
        start = found.start


def test_few_decimals_take_three_products_when_little_has_changed(kernels):
    start = eigenpairs(kernels[2], K).start
    nearby = 0.95 * kernels[2] + 0.05 * kernels[3]
    assert eigenpairs(nearby, K, start=start, tolerance=1e-4).iterations == 3


def test_a_start_from_afar_costs_time_alone(kernels):
    cold = eigenpairs(kernels[4], K)
    for start in (eigenpairs(kernels[0], K).start, orthogonal(LARGE)[:, : K + GUARDS], np.ones((LARGE, K + GUARDS))):
        found = eigenpairs(kernels[4], K, start=start)
        np.testing.assert_allclose(found.values, cold.values, rtol=1e-10)
        np.testing.assert_allclose(found.vectors, cold.vectors, atol=1e-5)


@pytest.mark.parametrize("tolerance", [1e-8, 1e-4], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_large_kernels_of_any_kind(case, tolerance):
    kernel, k = CASES[case](LARGE), 5
    found = eigenpairs(kernel, k, tolerance=tolerance)
    check(kernel, found, k, tolerance)
    assert np.all(np.diff(found.values) <= 0)
    largest = np.abs(found.vectors).argmax(axis=0)
    assert np.all(found.vectors[largest, np.arange(k)] > 0)
    if found.start is not None:
        check(kernel, eigenpairs(kernel, k, start=found.start, tolerance=tolerance), k, tolerance)


@pytest.mark.parametrize("risen", [5, 6, 12, 200, LARGE - 1])
@pytest.mark.parametrize("place", [0, 4])
def test_an_eigenvector_that_rises_is_not_missed(risen, place):
    """The old vectors still are exact eigenvectors then: nothing but guards and random vectors can show the new one."""
    values, q = power_law(LARGE), orthogonal(LARGE)
    start = np.ascontiguousarray(q[:, : 5 + GUARDS])
    moved = values.copy()
    moved[risen] = 1.01 * values[place]
    kernel = (q * moved) @ q.T
    found = eigenpairs((kernel + kernel.T) / 2, 5, start=start)
    np.testing.assert_allclose(found.values, np.sort(moved)[::-1][:5], rtol=1e-10)
    assert abs(found.vectors[:, place] @ q[:, risen]) == pytest.approx(1, abs=1e-9)


def test_a_cluster_across_the_last_pair_wanted():
    values = power_law(LARGE)
    values[3:9] = 0.2 + 1e-6 * np.arange(6)[::-1]
    kernel = with_spectrum(values)
    check(kernel, eigenpairs(kernel, 5), 5, 1e-8)


@pytest.mark.parametrize("power", [-400, -100, 100, 400])
@pytest.mark.parametrize("tolerance", [1e-8, 1e-4], ids=str)
def test_the_scale_changes_no_bit(kernels, power, tolerance):
    factor = 2.0**power
    one, scaled = (eigenpairs(kernel, K, tolerance=tolerance) for kernel in (kernels[0], factor * kernels[0]))
    assert scaled.iterations > 0
    np.testing.assert_array_equal(scaled.values, factor * one.values)
    np.testing.assert_array_equal(scaled.residuals, factor * one.residuals)
    np.testing.assert_array_equal(scaled.vectors, one.vectors)


def test_equal_arguments_give_equal_bits(kernels):
    start = eigenpairs(kernels[0], K).start
    first = eigenpairs(kernels[1], K, start=start)
    eigenpairs(kernels[3], K, start=first.start)
    again = eigenpairs(kernels[1].copy(), K, start=np.asfortranarray(start))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_large_kernel_is_not_changed(kernels):
    kernel, start = kernels[0].copy(), eigenpairs(kernels[1], K).start
    before = start.copy()
    eigenpairs(kernel, K, start=start, tolerance=1e-4), eigenpairs(kernel, K, start=start)
    np.testing.assert_array_equal(kernel, kernels[0])
    np.testing.assert_array_equal(start, before)


def test_a_float32_kernel_is_solved_in_float64_too(kernels):
    kernel = kernels[0].astype(np.float32)
    check(kernel.astype(np.float64), eigenpairs(kernel, K), K, 1e-8)


def test_what_does_not_converge_goes_to_lapack():
    kernel = CASES["flat"](LARGE)
    found = eigenpairs(kernel, 5)
    assert found.iterations == 0
    assert check(kernel, found, 5, 1e-8) < 1e-13
    np.testing.assert_array_equal(np.abs(found.start[:, :5]), np.abs(found.vectors))


def test_vectors_that_are_not_orthonormal_are_not_returned(monkeypatch, kernels):
    monkeypatch.setattr(spectra, "_new_rows", lambda rows, others: rows / np.linalg.norm(rows, axis=1, keepdims=True))
    found = eigenpairs(kernels[0], K)
    assert found.iterations == 0
    assert check(kernels[0], found, K, 1e-8) < 1e-13


def test_many_pairs_are_lapacks(kernels):
    found = eigenpairs(kernels[0], LARGE // 8)
    assert (found.iterations, found.start) == (0, None)
    assert check(kernels[0], found, LARGE // 8, 1e-8) < 1e-13


@pytest.mark.parametrize("start", [np.ones((LARGE, 5)), np.full((LARGE, K + GUARDS), np.nan)], ids=["shape", "nan"])
def test_a_start_that_does_not_fit(kernels, start):
    with pytest.raises(InputError, match=rf"start has shape .*: must be \({LARGE}, 28\) and finite"):
        eigenpairs(kernels[0], K, start=start)


@pytest.mark.parametrize("tolerance", [0, 1, -1, np.nan], ids=str)
def test_a_tolerance_that_is_none(kernels, tolerance):
    with pytest.raises(InputError, match=r"tolerance = .*: must be above 0 and below 1"):
        eigenpairs(kernels[0], K, tolerance=tolerance)
    with pytest.raises(InputError, match=r"tolerance = .*: must be above 0 and below 1"):
        lanczos(Dense(np.eye(3)), tolerance=tolerance)


# --- operators -------------------------------------------------------------------------------------------------------


class Dense:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix, dtype=torch.float64):
        self.like = torch.tensor(matrix, dtype=dtype)
        self.shape, self.products = matrix.shape, 0

    def apply(self, vector):
        assert vector.shape == self.shape[1:]
        self.products += 1
        return self.like @ vector


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"flat", "tiny", "huge", "subnormal"}))
@pytest.mark.parametrize(("p", "k"), [(1, 1), (7, 3), (90, 1), (90, 4)], ids=str)
def test_the_largest_of_an_operator(case, p, k):
    matrix = CASES[case](p)
    scale = max(np.abs(np.linalg.eigvalsh(matrix)).max(), 1e-300)
    operator = Dense(matrix)
    found = lanczos(operator, k, tolerance=1e-9, products=2000)
    np.testing.assert_allclose(found.values / scale, np.linalg.eigvalsh(matrix)[::-1][:k] / scale, atol=1e-9)
    vectors = found.vectors.numpy()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-11)
    residuals = np.linalg.norm(matrix @ vectors - vectors * found.values.numpy(), axis=0)
    np.testing.assert_allclose(found.residuals / scale, residuals / scale, atol=1e-12)
    assert residuals.max() <= 1e-9 * scale
    assert found.products == operator.products


@given(p=st.integers(2, 120), k=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_largest_of_a_random_operator(p, k, seed):
    values = np.sort(np.random.default_rng(seed).standard_normal(p))[::-1]
    k = min(k, p)
    found = lanczos(Dense(with_spectrum(values, seed)), k, tolerance=1e-6)
    np.testing.assert_allclose(found.values, values[:k], atol=1e-6 * np.abs(values).max())


def test_few_vectors_are_kept():
    matrix = with_spectrum(np.linspace(1, 0, 400) ** 0.5)
    found = lanczos(Dense(matrix), 2, tolerance=1e-7)
    assert found.products > spectra.BASIS + 4
    np.testing.assert_allclose(found.values, np.linspace(1, 0, 400)[:2] ** 0.5, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_good_start_saves_products(dtype):
    matrix = with_spectrum(power_law(200))
    cold = lanczos(Dense(matrix, dtype), 2)
    warm = lanczos(Dense(matrix + 1e-3 * np.eye(200), dtype), 2, start=cold.vectors)
    assert warm.products == 2 < cold.products
    np.testing.assert_allclose(warm.values, [1.001, 0.501], rtol=1e-6)
    assert warm.vectors.dtype == dtype
    assert warm.values.dtype == torch.float64
    single = lanczos(Dense(matrix, dtype), start=cold.vectors[:, 0])
    assert single.products == 1


def test_two_vectors_see_a_crossing():
    matrix = np.diag([1.0, 2.0, *[0.5] * 30])
    start = torch.eye(32, dtype=torch.float64)[:, :2]
    assert float(lanczos(Dense(matrix), start=start).values[0]) == pytest.approx(2)


def test_an_exact_start_with_too_few_vectors_is_completed():
    found = lanczos(Dense(np.diag([3.0, 2.0, 2.0, 1.0])), 3, start=torch.eye(4, dtype=torch.float64)[:, 0])
    np.testing.assert_allclose(found.values, [3, 2, 2], rtol=1e-8)


def test_operators_give_equal_bits():
    matrix = with_spectrum(power_law(100))
    first, again = (lanczos(Dense(matrix), 2) for _ in range(2))
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)


def test_when_products_run_out_the_residual_says_so():
    found = lanczos(Dense(with_spectrum(np.linspace(1, 0.9, 100))), tolerance=1e-9, products=5)
    assert found.products == 5
    assert float(found.residuals[0]) > 1e-9


def test_an_operator_of_a_diverged_run():
    with pytest.raises(NonFiniteKernel, match="product 1 with the operator is not finite: the run diverged"):
        lanczos(Dense(np.full((3, 3), np.nan)))


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_pairs_that_no_operator_has(k):
    with pytest.raises(InputError, match=rf"k = {k} eigenpairs of an operator on 3 numbers: must be from 1 to 3"):
        lanczos(Dense(np.eye(3)), k)


@pytest.mark.parametrize("start", [torch.ones(2), torch.full((3,), torch.nan), torch.ones(3, 4)], ids=str)
def test_a_start_that_no_operator_takes(start):
    with pytest.raises(
        InputError, match=r"start has shape .*: must be \(3,\) or \(3, m\) with few columns, and finite"
    ):
        lanczos(Dense(np.eye(3)), start=start)


# --- the top ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 64, 65, 150])
def test_the_top_is_that_of_the_pairs(case, n):
    kernel = CASES[case](n)
    expected = eigenpairs(kernel, n)[0][0]
    assert top_eigenvalue(kernel) == pytest.approx(expected, rel=1e-10, abs=1e-13 * np.abs(kernel).max())


@given(
    n=st.integers(65, 120),
    gap=st.floats(-14, 0).map(lambda power: 10**power),
    rank=st.integers(2, 65),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_the_top_is_found_whatever_the_gap(n, gap, rank, seed):
    values = np.zeros(n)
    values[:rank] = (1 - gap) * np.random.default_rng(seed).uniform(size=rank)
    values[:2] = 1, 1 - gap
    assert top_eigenvalue(with_spectrum(values, seed)) == pytest.approx(1, rel=1e-10)


def test_a_start_vector_orthogonal_to_the_top_is_noticed():
    """Lanczos cannot see the top then: the factorisation must."""
    start = np.random.default_rng(0).standard_normal(100)
    top = np.zeros(100)
    top[:2] = start[1], -start[0]
    rest = np.diag([0, 0, 1, *np.linspace(0, 0.5, 97)])
    kernel = 1.001 * np.outer(top, top) / (top @ top) + rest
    assert spectra._lanczos(kernel) == pytest.approx(1, rel=1e-6)
    assert top_eigenvalue(kernel) == pytest.approx(1.001, rel=1e-12)


def test_a_usual_kernel_needs_no_lapack_eigensolver(monkeypatch):
    kernel = with_spectrum(power_law(300))
    monkeypatch.setattr(scipy.linalg, "eigvalsh", None)
    monkeypatch.setattr(scipy.linalg, "eigh", None)
    assert top_eigenvalue(kernel) == pytest.approx(1, rel=1e-11)


def test_equal_kernels_give_equal_bits():
    kernel = with_spectrum(power_law(200))
    first = top_eigenvalue(kernel)
    top_eigenvalue(with_spectrum(power_law(90)))
    assert top_eigenvalue(kernel.copy()) == first


def test_top_of_all_outputs():
    full = np.random.default_rng(0).standard_normal((4, 4, 3, 3))
    matrix = as_matrix(full)
    assert matrix.shape == (12, 12)
    for i, j, a, b in np.ndindex(full.shape):
        assert matrix[3 * i + a, 3 * j + b] == full[i, j, a, b]
    np.testing.assert_array_equal(as_matrix(torch.tensor(full)).numpy(), matrix)


def test_the_matrix_of_all_outputs_is_symmetric_for_a_kernel():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    matrix = as_matrix(oracles.ntk(model, x))
    np.testing.assert_allclose(matrix, matrix.T)
    singular = np.linalg.svd(oracles.jacobian(model, x).reshape(8, -1), compute_uv=False)
    assert top_eigenvalue(matrix) == pytest.approx(singular[0] ** 2)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("solve", [lambda k: eigenpairs(k, 2), top_eigenvalue], ids=["eigenpairs", "top_eigenvalue"])
@pytest.mark.parametrize("n", [5, 100, LARGE])
def test_no_solver_is_called_on_a_kernel_that_is_not_finite(monkeypatch, value, solve, n):
    def called(*args, **kwargs):
        raise AssertionError("a solver was called")

    for module, name in (
        (scipy.linalg, "eigh"),
        (scipy.linalg, "eigvalsh"),
        (spectra, "dpotrf"),
        (spectra, "_lanczos"),
        (spectra, "_Krylov"),
    ):
        monkeypatch.setattr(module, name, called)
    kernel = np.eye(n)
    kernel[1, 2] = kernel[2, 1] = value
    with pytest.raises(NonFiniteKernel, match=rf"2 of {n * n} entries that are not finite: the run diverged"):
        solve(kernel)
    assert issubclass(NonFiniteKernel, NtkEosError)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("solve", [lambda k: eigenpairs(k, 1), top_eigenvalue], ids=["eigenpairs", "top_eigenvalue"])
def test_a_kernel_that_is_not_square(shape, solve):
    with pytest.raises(InputError, match=r"a kernel of shape .*: must be square and not empty"):
        solve(np.ones(shape))


# --- kernels that are known by their products ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["power law", "double top", "rank one", "zeros", "tiny"])
@pytest.mark.parametrize(("n", "k"), [(5, 2), (700, 20)], ids=str)
def test_leading_pairs_by_products_alone(case, n, k):
    kernel = CASES[case](n)
    found = leading_pairs(lambda rows: rows @ kernel, n, k, np.trace(np.abs(kernel)))
    expected = np.linalg.eigh(kernel)[0][::-1][:k]
    scale = max(np.abs(expected).max(), 1e-300)
    np.testing.assert_allclose(found.values / scale, expected / scale, atol=1e-12)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-11)
    np.testing.assert_allclose(
        np.linalg.norm(kernel / scale @ found.vectors - found.vectors * (found.values / scale), axis=0),
        found.residuals / scale,
        atol=1e-13,
    )
    assert found.residuals.max() <= spectra.PRECISE * scale


def test_products_that_run_out_leave_residuals_above_the_tolerance(monkeypatch):
    monkeypatch.setattr(spectra, "PATIENCE", 1)
    kernel = CASES["flat"](700)
    found = leading_pairs(lambda rows: rows @ kernel, 700, 20, 1.0)
    assert found.iterations == spectra.BLOCKS
    assert found.residuals.max() > spectra.PRECISE
    errors = np.abs(found.values[:, None] - np.linspace(1, 0.99, 700)).min(axis=1)
    assert (errors <= found.residuals + 1e-12).all()


@pytest.mark.parametrize(
    ("n", "k", "tolerance", "message"),
    [
        (700, 71, 1e-8, "k = 71 eigenpairs of a kernel that is not in memory, n = 700: must be from 1 to 70"),
        (20, 21, 1e-8, "must be from 1 to 20"),
        (20, 0, 1e-8, "must be from 1 to 20"),
        (20, 2, 1.0, "tolerance = 1.0: must be above 0 and below 1"),
    ],
)
def test_what_leading_pairs_cannot_do(n, k, tolerance, message):
    with pytest.raises(InputError, match=message):
        leading_pairs(lambda rows: pytest.fail("no product is needed"), n, k, 1.0, tolerance=tolerance)


@pytest.mark.parametrize("n", [5, 700])
def test_no_solver_sees_a_product_that_is_not_finite(n):
    with pytest.raises(NonFiniteKernel, match="a product with the kernel is not finite"):
        leading_pairs(lambda rows: rows * np.nan, n, 2, 1.0)
