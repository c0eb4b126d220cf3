"""Leading eigenpairs K v_i = λ_i v_i of a symmetric kernel, λ_1 ≥ λ_2 ≥ …, in float64 on the CPU."""

import math
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf

from pipeline.errors import InputError, NtkEosError

# Up to this share of all pairs, LAPACK's driver for a few (evr) is faster than the one for all (evd).
FEW = 0.1

# `top_eigenvalue` is certified to this relative error, unless LAPACK gave it.
TOLERANCE = 1e-11
SMALL, LANCZOS_STEPS, LANCZOS_TEST = 64, 64, 8


class NonFiniteKernel(NtkEosError):
    """A kernel holds NaN or infinity, as that of a diverged run; no eigensolver is called on it."""


def as_matrix(full: Any) -> Any:
    """The kernel of all outputs (n, n, c, c) as one symmetric matrix (nc, nc), rows ordered by example, then output.

    Args:
        full: numpy array or torch tensor.
    """
    n, _, c, _ = full.shape
    return full.swapaxes(1, 2).reshape(n * c, n * c)


def eigenpairs(kernel: NDArray[Any], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The k leading eigenpairs.

    Args:
        kernel: K (n, n), symmetric.
        k: number of pairs, from 1 to n.

    Returns:
        Eigenvalues (k,), descending, and eigenvectors (n, k), unit columns whose component of largest modulus (the
        first of equals) is positive.

    Raises:
        InputError: if K is not square or k does not fit.
        NonFiniteKernel: if K is not finite.
    """
    matrix = _checked(kernel)
    n = len(matrix)
    if not 1 <= k <= n:
        raise InputError(f"k = {k} eigenpairs of a kernel on {n} examples: must be from 1 to {n}")
    if k <= FEW * n:
        options = {"driver": "evr", "subset_by_index": (n - k, n - 1)}
    else:
        options = {"driver": "evd"}
    values, vectors = scipy.linalg.eigh(matrix, check_finite=False, **options)
    values, vectors = values[: -k - 1 : -1], vectors[:, : -k - 1 : -1]
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(k)] < 0, -1.0, 1.0)
    return np.ascontiguousarray(values), np.ascontiguousarray(vectors * signs)


def top_eigenvalue(kernel: NDArray[Any]) -> float:
    """The largest eigenvalue λ_1, depending on nothing but K.

    A few Lanczos steps from a fixed vector give a Ritz value θ ≤ λ_1, and a Cholesky factorisation of
    (1 + ε) θ I - K exists if and only if λ_1 < (1 + ε) θ. Together they prove θ to the relative error ε; where
    they do not, as for a matrix of zeros or a tiny gap, LAPACK decides.

    Args:
        kernel: K (n, n), symmetric.

    Raises:
        InputError: if K is not square.
        NonFiniteKernel: if K is not finite.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), sections 10.1 and 4.2.
    """
    matrix = _checked(kernel)
    n = len(matrix)
    if n > SMALL:
        # Numbers near the limits of float64 overflow here; they fail the test and go to LAPACK, which scales.
        with np.errstate(over="ignore", invalid="ignore"):
            ritz = _lanczos(matrix)
            if ritz > 0 and _all_below(matrix, (1 + TOLERANCE) * ritz):
                return ritz
    return float(scipy.linalg.eigvalsh(matrix, driver="evr", subset_by_index=(n - 1, n - 1), check_finite=False)[0])


def _lanczos(matrix: NDArray[np.float64]) -> float:
    """The largest Ritz value when its residual is small, or after `LANCZOS_STEPS`.

    No reorthogonalisation: lost orthogonality repeats converged values and spoils none.
    """
    vector = np.random.default_rng(0).standard_normal(len(matrix))
    vector /= np.linalg.norm(vector)
    previous = np.zeros_like(vector)
    beta = 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = matrix @ vector
        diagonal.append(float(vector @ image))
        image -= diagonal[-1] * vector + beta * previous
        beta = math.sqrt(image @ image)
        if not math.isfinite(beta):
            return math.nan
        exhausted = beta == 0 or len(diagonal) == LANCZOS_STEPS
        if exhausted or len(diagonal) % LANCZOS_TEST == 0:
            ritz, ritz_vector = scipy.linalg.eigh_tridiagonal(diagonal, beside)
            # The error of a Ritz value is of second order in the residual β |s|.
            if exhausted or beta * abs(ritz_vector[-1, -1]) <= 1e-7 * ritz[-1]:
                return float(ritz[-1])
        beside.append(beta)
        previous, vector = vector, image / beta


def _all_below(matrix: NDArray[np.float64], bound: float) -> bool:
    """Whether all eigenvalues lie below `bound`: whether bound I - K is positive definite."""
    shifted = -matrix
    shifted.flat[:: len(matrix) + 1] += bound
    # The transpose of a symmetric C-ordered matrix is itself in the order that LAPACK works on without a copy.
    _, info = dpotrf(shifted.T, lower=1, clean=0, overwrite_a=1)
    return bool(info == 0)


def _checked(kernel: NDArray[Any]) -> NDArray[np.float64]:
    """The kernel in float64, square and finite."""
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise InputError(f"a kernel of shape {matrix.shape}: must be square and not empty")
    bad = matrix.size - np.count_nonzero(np.isfinite(matrix))
    if bad:
        raise NonFiniteKernel(f"the kernel has {bad} of {matrix.size} entries that are not finite: the run diverged")
    return matrix
