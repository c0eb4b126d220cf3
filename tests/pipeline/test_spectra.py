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
from pipeline.spectra import NonFiniteKernel, as_matrix, eigenpairs, top_eigenvalue


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
@pytest.mark.parametrize("n", [5, 100])
def test_no_solver_is_called_on_a_kernel_that_is_not_finite(monkeypatch, value, solve, n):
    def called(*args, **kwargs):
        raise AssertionError("a solver was called")

    for module, name in (
        (scipy.linalg, "eigh"),
        (scipy.linalg, "eigvalsh"),
        (spectra, "dpotrf"),
        (spectra, "_lanczos"),
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
