"""Leading eigenpairs K v_i = λ_i v_i, λ_1 ≥ λ_2 ≥ …, of kernels in float64 on the CPU and of operators on any device.

Small kernels, and all pairs, are LAPACK's. The few leading pairs of a large kernel change little from one snapshot of
a training run to the next, so they are sought where the last ones were: in the Krylov space of a block V,

    span [V, K V, K² V, …],    V the last eigenvectors, more than are wanted, and some random vectors,

by Rayleigh-Ritz, until ‖K v_i - θ_i v_i‖ is small for every wanted pair. Then |λ - θ_i| is at most that for some
eigenvalue λ; which one it is, no residual says. Only the surplus of the block makes it unlikely that a leading pair is
missed: an eigenvector that climbs is among the guards already, and one from outside has a part in the random vectors.

Source: Golub and Van Loan, Matrix Computations (4th ed.), sections 8.1, 10.1 and 10.3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf
from torch import Tensor

from pipeline.errors import InputError, NtkEosError

Array = NDArray[np.float64]

# Up to this share of all pairs, LAPACK's driver for a few (evr) is faster than the one for all (evd), and so is the
# block Krylov space.
FEW = 0.1

# Up to this n, LAPACK is as fast as the block Krylov space at the default tolerance: 17 ms against 18 at n = 600 with a
# warm start and k = 20, 32 against 23 at n = 800.
DENSE = 600

# Columns of the block beyond k. Neighbours of the k-th pair trade places while a network trains: with guards they are
# known before they matter, and the k-th pair converges at the rate of λ_{k+9} / λ_k. RANDOM of them are drawn anew.
GUARDS, RANDOM = 8, 2

# Blocks before a restart, and restarts before LAPACK takes over: bounds of memory and of wasted time.
BLOCKS, CYCLES = 8, 3

# Relative residual after a cycle above which the gaps are too small for the next ones: where the k-th pair lies in a
# bulk of eigenvalues, as on inputs of white noise, LAPACK is faster.
HOPELESS = 1e-4

# The same where there is no LAPACK to take over: 96 products at most.
PATIENCE = 12

# Random vectors of an estimated Frobenius norm: its standard error is then known to a fifth of itself.
SAMPLES = 16

# Blocks before the first test: fewer are enough only for tolerances so loose that pairs are missed.
FIRST_TEST = 3

# Rows of K that are rounded to float32 at once.
ROWS = 64

# Ritz vectors whose products are further from 0 and 1 than this are not orthonormal, and LAPACK takes over.
ORTHOGONAL = 1e-12

# Relative residual of `eigenpairs`. The error of an eigenvalue is of second order in it: at 1e-8 the values of real
# kernels agree with LAPACK's to 1e-12 and the vectors to an angle of 1e-6, so that a stored pair is still what float64
# gives for the unrounded kernel. It takes 7 products; 1e-4 takes 3, and the twentieth value is off by 1e-4 of itself.
PRECISE = 1e-8

# From this relative residual on, products are taken with a float32 copy of K. Their error, 1e-7 of λ_1 on real kernels
# and 2e-6 where all entries are equal, is then lost in what the residual leaves open, and at n = 2000 one costs 3.5 ms
# instead of 6.5. Below, it would decide the result.
ROUNDED = 1e-4

# `top_eigenvalue` is certified to this relative error, unless LAPACK gave it.
TOLERANCE = 1e-11
SMALL, LANCZOS_STEPS, LANCZOS_TEST = 64, 64, 8

# Vectors that `lanczos` keeps before it falls back on the best of them.
BASIS = 40


class NonFiniteKernel(NtkEosError):
    """A kernel holds NaN or infinity, as that of a diverged run; no eigensolver is called on it."""


class Eigenpairs(NamedTuple):
    """Leading eigenpairs of a kernel.

    Attributes:
        values: λ (k,), descending.
        vectors: (n, k), unit columns whose component of largest modulus (the first of equals) is positive.
        residuals: ‖K v_i - λ_i v_i‖ (k,), in the units of K.
        iterations: products of K with a block of k + 8 vectors; 0 if LAPACK found the pairs.
        start: (n, k + 8) for the next kernel of the same run, or None if LAPACK is best there too.
    """

    values: Array
    vectors: Array
    residuals: Array
    iterations: int
    start: Array | None


class OperatorPairs(NamedTuple):
    """Leading eigenpairs of an operator.

    Attributes:
        values: λ (k,), descending, float64 on the CPU.
        vectors: (p, k), orthonormal, in the dtype and on the device of the operator.
        residuals: ‖A v_i - λ_i v_i‖ (k,), float64 on the CPU; above the tolerance only if the products ran out.
        products: how often the operator was applied.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


class TensorOperator(Protocol):
    """What `lanczos` needs of a symmetric operator, as those of `pipeline.operators` have it.

    Attributes:
        shape: (p, p).
        like: any tensor of the dtype and device on which the operator works.
    """

    shape: tuple[int, int]
    like: Tensor

    def apply(self, vector: Tensor) -> Tensor:
        """A v, for v (p,)."""
        ...


def as_matrix(full: Any) -> Any:
    """The kernel of all outputs (n, n, c, c) as one symmetric matrix (nc, nc), rows ordered by example, then output.

    Args:
        full: numpy array or torch tensor.
    """
    n, _, c, _ = full.shape
    return full.swapaxes(1, 2).reshape(n * c, n * c)


def eigenpairs(
    kernel: NDArray[Any], k: int, *, start: NDArray[Any] | None = None, tolerance: float = PRECISE
) -> Eigenpairs:
    """The k leading eigenpairs, a function of the arguments alone: equal arguments give equal bits.

    Args:
        kernel: K (n, n), symmetric, float32 or float64.
        k: number of pairs, from 1 to n.
        start: `start` of an earlier result on a kernel like this one, for speed; None starts from random vectors.
        tolerance: bound on ‖K v_i - λ_i v_i‖ / λ_1 for all k pairs. From 1e-4 on, products are taken in float32.

    Returns:
        LAPACK's pairs if n is small, k is large, K is zero or near the limits of float64, or the Krylov space does
        not converge.

    Raises:
        InputError: if K is not square, or k, start or the tolerance does not fit.
        NonFiniteKernel: if K is not finite.
    """
    matrix, norm = _checked(kernel)
    n = len(matrix)
    if not 1 <= k <= n:
        raise InputError(f"k = {k} eigenpairs of a kernel on {n} examples: must be from 1 to {n}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance = {tolerance}: must be above 0 and below 1")
    if n <= DENSE or k > FEW * n:
        return _by_lapack(matrix, k)
    block, found = _start(start, n, k + GUARDS), None
    if 1e-140 < norm < 1e140:
        scale = math.ldexp(1.0, _exponent(norm))
        product = _product(matrix, 1 / scale, np.dtype(np.float32 if tolerance >= ROUNDED else np.float64))
        found = _by_krylov(product, scale, block, k, tolerance)
    return _by_lapack(matrix, k, GUARDS) if found is None else found


def krylov_bytes(n: int, k: int) -> int:
    """What `leading_pairs` holds at most, beside what a product takes."""
    return 8 * n * (k + GUARDS) * (2 * BLOCKS + 8)


def _by_lapack(matrix: Array, k: int, guards: int = 0) -> Eigenpairs:
    """The pairs from LAPACK, and `guards` more for the next start."""
    n, m = len(matrix), k + guards
    options = {"driver": "evr", "subset_by_index": (n - m, n - 1)} if k <= FEW * n else {"driver": "evd"}
    values, vectors = scipy.linalg.eigh(matrix, check_finite=False, **options)
    values, vectors = values[: -m - 1 : -1], vectors[:, : -m - 1 : -1]
    start = np.ascontiguousarray(vectors) if guards else None
    values, vectors = np.ascontiguousarray(values[:k]), _signed(vectors[:, :k])
    # By powers of two, lest the square of a residual overflow or vanish.
    scale = math.ldexp(1.0, _exponent(float(np.abs(values).max())))
    residuals = matrix @ (vectors / scale) - vectors * (values / scale)
    return Eigenpairs(values, vectors, np.linalg.norm(residuals, axis=0) * scale, 0, start)


def leading_pairs(
    product: Callable[[Array], Array], n: int, k: int, norm: float, *, tolerance: float = PRECISE
) -> Eigenpairs:
    """The k leading eigenpairs of a kernel that is known by its products alone, as one larger than memory.

    The method is that of `eigenpairs`, from random vectors, with more patience, as there is no LAPACK to fall back on.
    In memory: about 2 x 8 blocks of k + 8 vectors of n numbers.

    Args:
        product: V (b, n) -> V K, in float64.
        n: examples.
        k: number of pairs, at most n / 10 from n = 601 on.
        norm: ‖K‖ or any number of its size, such as tr K.
        tolerance: bound on ‖K v_i - λ_i v_i‖ / λ_1 for all k pairs.

    Returns:
        The pairs; residuals are above the tolerance only if the products ran out, some 100 blocks of them.

    Raises:
        InputError: if k or the tolerance does not fit.
        NonFiniteKernel: if a product is not finite.
    """
    if not 1 <= k <= n or (n > DENSE and k > FEW * n):
        most = n if n <= DENSE else int(FEW * n)
        raise InputError(f"k = {k} eigenpairs of a kernel that is not in memory, n = {n}: must be from 1 to {most}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance = {tolerance}: must be above 0 and below 1")

    def finite(rows: Array) -> Array:
        images = product(rows)
        if not np.isfinite(images).all():
            raise NonFiniteKernel("a product with the kernel is not finite: the run diverged")
        return images

    if n <= DENSE:
        return _by_lapack(finite(np.eye(n)), k)
    scale = math.ldexp(1.0, _exponent(norm))
    block = _start(None, n, k + GUARDS)
    found = _by_krylov(lambda rows: finite(rows * (1 / scale)), scale, block, k, tolerance, patient=True)
    if found is None:
        raise NtkEosError(f"the {k} leading eigenvectors of the kernel lost their orthogonality: ask for fewer pairs")
    return found


def frobenius_norm(
    product: Callable[[Array], Array], pairs: Eigenpairs, *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """An estimate of ‖K‖ and its standard error, from leading eigenpairs and products with random vectors.

    ‖K‖² = Σ_i ‖K v_i‖² + ‖K P‖² with P = I - V Vᵀ, and ‖K P‖² is the mean of ‖K P z‖² over standard normal z. The
    first part is known; the second is small where the spectrum decays, and with it the error. The estimate of ‖K‖² has
    no bias.

    Args:
        product: V (b, n) -> V K, in float64.
        pairs: leading eigenpairs of K.
        samples: random vectors, at least 2.
        seed: of these.

    Source: Meyer, Musco, Musco, Woodruff (2021), arXiv 2010.09649, for the split (there for the trace).
    """
    known = float(np.sum(pairs.values**2 + pairs.residuals**2))
    rows = np.random.default_rng(seed).standard_normal((samples, len(pairs.vectors)))
    rows -= (rows @ pairs.vectors) @ pairs.vectors.T
    found = np.sum(product(rows) ** 2, axis=1)
    norm = math.sqrt(known + found.mean())
    return norm, float(found.std(ddof=1)) / math.sqrt(samples) / (2 * norm) if norm > 0 else 0.0


def _by_krylov(
    product: Callable[[Array], Array], scale: float, block: Array, k: int, tolerance: float, *, patient: bool = False
) -> Eigenpairs | None:
    """The pairs from Krylov spaces of at most `BLOCKS` blocks.

    Args:
        product: Q -> Q K / scale.
        scale: a power of two of the size of K.
        block: orthonormal rows to begin with.
        k: number of pairs.
        tolerance: as of `eigenpairs`.
        patient: take what `PATIENCE` spaces give; otherwise the result is None if `CYCLES` of them do not suffice.
    """
    blocks = min(BLOCKS, block.shape[1] // (2 * len(block)))
    cycles = PATIENCE if patient else CYCLES
    for cycle in range(cycles):
        space = _Krylov(product, block, blocks)
        for used in range(1, blocks + 1):
            space.grow()
            if used < FIRST_TEST:
                continue
            values, residuals = space.ritz(len(block))
            allowed = tolerance * space.radius
            # A guard that may belong among the k, as far as its own residual tells, is given time to get there.
            rising = (values + residuals)[k:].max() > values[k - 1] + allowed
            exhausted = patient and (cycle, used) == (cycles - 1, blocks)
            if (residuals[:k].max() <= allowed and not rising) or exhausted:
                iterations = cycle * blocks + used
                return _certified(values[:k] * scale, residuals[:k] * scale, space.vectors(len(block)), iterations)
        if residuals[:k].max() > HOPELESS * space.radius and not patient:
            return None
        block = _orthonormal(space.vectors(len(block)))
    return None


def _certified(values: Array, residuals: Array, vectors: Array, iterations: int) -> Eigenpairs | None:
    """The result, or None if the vectors, k + 8 rows, are not orthonormal."""
    if np.abs(vectors @ vectors.T - np.eye(len(vectors))).max() > ORTHOGONAL:
        return None
    return Eigenpairs(values, _signed(vectors[: len(values)].T), residuals, iterations, np.ascontiguousarray(vectors.T))


class _Krylov:
    """A block Krylov space as orthonormal rows Q, with their images Q K and T = Q K Qᵀ.

    Vectors are rows here: BLAS multiplies a few rows with K in 3/4 of the time of as many columns.

    Args:
        product: Q_j -> Q_j K.
        block: its first block (m, n), orthonormal rows.
        blocks: how many blocks there is room for.
    """

    def __init__(self, product: Callable[[Array], Array], block: Array, blocks: int) -> None:
        m, n = block.shape
        self._product, self._next, self._size = product, block, 0
        self._rows, self._images = np.empty((m * blocks, n)), np.empty((m * blocks, n))
        self._projected = np.empty((m * blocks, m * blocks))
        self._rotation = np.empty((0, 0))
        self.radius = 0.0  # the largest modulus of a Ritz value: from below, the norm of K

    def grow(self) -> None:
        """Append a block, the image of the last one without its part in the space."""
        if self._size:
            self._next = _new_rows(self._next, self._rows[: self._size])
        new = slice(self._size, self._size + len(self._next))
        self._size = new.stop
        self._rows[new] = self._next
        self._images[new] = self._product(self._next)
        self._next = self._images[new]
        column = self._rows[: self._size] @ self._next.T
        self._projected[: self._size, new] = column
        self._projected[new, : self._size] = column.T

    def ritz(self, k: int) -> tuple[Array, Array]:
        """The k largest Ritz values θ, descending, and ‖K v - θ v‖ of their vectors, from products already made."""
        size = self._size
        values, rotation = np.linalg.eigh(self._projected[:size, :size])
        self._rotation = rotation[:, ::-1]
        self.radius = float(np.abs(values[[0, -1]]).max())
        top = np.ascontiguousarray(values[: -k - 1 : -1])
        residuals = self._rotation[:, :k].T @ self._images[:size] - top[:, None] * self.vectors(k)
        return top, np.linalg.norm(residuals, axis=1)

    def vectors(self, count: int) -> Array:
        """The vectors of the `count` largest Ritz values, as rows."""
        return self._rotation[:, :count].T @ self._rows[: self._size]


def _product(matrix: Array, scale: float, dtype: np.dtype[Any]) -> Callable[[Array], Array]:
    """Q -> scale Q K, computed in `dtype`; with the scale, K is of order one, so that float32 has room for it."""
    if dtype == matrix.dtype:
        return lambda rows: (rows * scale) @ matrix
    rounded = np.empty(matrix.shape, dtype)
    for first in range(0, len(matrix), ROWS):  # in pieces that stay in cache: a third of the time
        rounded[first : first + ROWS] = matrix[first : first + ROWS] * scale
    return lambda rows: rows.astype(dtype) @ rounded


def _orthonormal(rows: Array) -> Array:
    """Orthonormal rows with the span of nearly orthonormal ones, or any if their rank is too low."""
    try:
        return np.linalg.inv(np.linalg.cholesky(rows @ rows.T)) @ rows
    except np.linalg.LinAlgError:
        return np.ascontiguousarray(np.linalg.qr(rows.T)[0].T)


def _new_rows(rows: Array, others: Array) -> Array:
    """Orthonormal rows that span what of the given ones lies outside the orthonormal `others`.

    A second pass removes what rounding left of `others` where little lay outside.
    """
    once = np.linalg.qr((rows - (rows @ others.T) @ others).T)[0].T
    return _orthonormal(once - (once @ others.T) @ others)


def _start(start: NDArray[Any] | None, n: int, m: int) -> Array:
    """The first block as orthonormal rows (m, n): the start with its last columns drawn anew, or all random."""
    drawn = np.random.default_rng(0).standard_normal((m if start is None else RANDOM, n))
    if start is None:
        return _orthonormal(drawn)
    if start.shape != (n, m) or not np.isfinite(start).all():
        raise InputError(
            f"start has shape {start.shape}: must be {(n, m)} and finite, as `start` of the last result for the same "
            "n and k; None starts anew"
        )
    return _orthonormal(np.concatenate([start.T[:-RANDOM].astype(np.float64), drawn]))


def _signed(vectors: Array) -> Array:
    """The columns with their component of largest modulus positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.ascontiguousarray(vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0))


def _exponent(number: float) -> int:
    """The binary exponent, kept where neither 2^e nor its inverse overflows."""
    return max(-1000, min(1000, math.frexp(number)[1]))


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
    matrix, _ = _checked(kernel)
    n = len(matrix)
    if n > SMALL:
        # Numbers near the limits of float64 overflow here; they fail the test and go to LAPACK, which scales.
        with np.errstate(over="ignore", invalid="ignore"):
            ritz = _lanczos(matrix)
            if ritz > 0 and _all_below(matrix, (1 + TOLERANCE) * ritz):
                return ritz
    return float(scipy.linalg.eigvalsh(matrix, driver="evr", subset_by_index=(n - 1, n - 1), check_finite=False)[0])


def _lanczos(matrix: Array) -> float:
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


def _all_below(matrix: Array, bound: float) -> bool:
    """Whether all eigenvalues lie below `bound`: whether bound I - K is positive definite."""
    shifted = -matrix
    shifted.flat[:: len(matrix) + 1] += bound
    # The transpose of a symmetric C-ordered matrix is itself in the order that LAPACK works on without a copy.
    _, info = dpotrf(shifted.T, lower=1, clean=0, overwrite_a=1)
    return bool(info == 0)


def lanczos(
    operator: TensorOperator, k: int = 1, *, start: Tensor | None = None, tolerance: float = 1e-4, products: int = 300
) -> OperatorPairs:
    """The k algebraically largest eigenpairs of a symmetric operator, as the sharpness, which is λ_1 of a Hessian.

    The space grows by the residual of the worst of the k Ritz pairs, orthogonalised against all of it; from one
    start vector that is Lanczos' method with full reorthogonalisation, from several it keeps what each one knows.
    Vectors stay on the operator's device; of each product, only T and the residuals reach the CPU.

    Two eigenvalues that cross between calls without mixing are seen only if the vectors of both are in `start`: ask
    for k = 2 to be safe.

    Args:
        operator: A (p, p), applied to tensors: a torch function, not a scipy LinearOperator, because p numbers would
            otherwise leave the device and lose their dtype at every product.
        k: number of pairs.
        start: (p,) or (p, m), such as `vectors` of the last result, or Jᵀu_1 for a Hessian; vectors
            that are missing to k are fixed random ones.
        tolerance: bound on ‖A v_i - λ_i v_i‖ / max |θ|, θ the Ritz values.
        products: most applications of A.

    Raises:
        InputError: if k, start or the tolerance does not fit.
        NonFiniteKernel: if a product is not finite.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), sections 10.1 and 10.6.
    """
    space = _OperatorSpace(operator)
    for row in _start_rows(operator, k, start, tolerance):
        space.add(row)
    while True:
        values, vectors, residuals = space.ritz(k)
        norms = torch.linalg.vector_norm(residuals, dim=1).double().cpu()
        if (
            bool((norms <= tolerance * space.radius).all())
            or len(space.rows) == operator.shape[0]
            or space.products >= products
        ):
            return OperatorPairs(values, vectors.T, norms, space.products)
        if len(space.rows) >= BASIS + 2 * k:
            space.shrink(BASIS // 2 + k)
        space.add(_direction(residuals[norms.argmax()], space.rows))


class _OperatorSpace:
    """Orthonormal rows Q on the operator's device, their images, and T = Q A Qᵀ in float64 on the CPU."""

    def __init__(self, operator: TensorOperator) -> None:
        self._operator = operator
        self.rows = self._images = operator.like.new_empty(0, operator.shape[0])
        self._projected = torch.empty(0, 0, dtype=torch.float64)
        self.radius = math.nan  # the largest modulus of a Ritz value
        self.products = 0

    def add(self, row: Tensor) -> None:
        """Append a unit vector orthogonal to the others."""
        image = self._operator.apply(row)
        self.products += 1
        self.rows, self._images = torch.cat([self.rows, row[None]]), torch.cat([self._images, image[None]])
        column = (self.rows @ image).double().cpu()
        if not bool(torch.isfinite(column).all()):
            raise NonFiniteKernel(f"product {self.products} with the operator is not finite: the run diverged")
        size = len(column)
        grown = torch.empty(size, size, dtype=torch.float64)
        grown[:-1, :-1], grown[-1], grown[:, -1] = self._projected, column, column
        self._projected = grown

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest Ritz values, descending, their vectors and residuals as rows."""
        values, rotation = torch.linalg.eigh(self._projected)
        self._values, self._rotation = values.flip(0), rotation.flip(1)
        self.radius = float(values.abs().max())
        top = self._values[:k]
        turned = self._rotation[:, :k].T.to(self.rows)
        vectors = turned @ self.rows
        return top, vectors, turned @ self._images - top[:, None].to(self.rows) * vectors

    def shrink(self, size: int) -> None:
        """Keep the vectors of the largest Ritz values alone; it takes no product."""
        turned = self._rotation[:, :size].T.to(self.rows)
        self.rows, self._images = turned @ self.rows, turned @ self._images
        self._projected = torch.diag(self._values[:size])


def _direction(wanted: Tensor, rows: Tensor) -> Tensor:
    """The unit vector along what of `wanted` is orthogonal to the rows."""
    for _ in range(2):  # the second pass removes what rounding left of the rows, if little else was left
        wanted = wanted - (rows @ wanted) @ rows
        wanted = wanted / torch.linalg.vector_norm(wanted)
    return wanted


def _random(count: int, p: int, like: Tensor) -> Tensor:
    """Random rows that are the same at every call and on every device."""
    return torch.randn(count, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


def _start_rows(operator: TensorOperator, k: int, start: Tensor | None, tolerance: float) -> Tensor:
    """The checked start as orthonormal rows."""
    p, like = operator.shape[0], operator.like
    if not 1 <= k <= p:
        raise InputError(f"k = {k} eigenpairs of an operator on {p} numbers: must be from 1 to {p}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance = {tolerance}: must be above 0 and below 1")
    rows = like.new_empty(0, p)
    if start is not None:
        rows = start.detach().to(like).reshape(len(start), -1).T
        if rows.shape[1] != p or len(rows) > min(p, BASIS) or not bool(torch.isfinite(rows).all()):
            raise InputError(
                f"start has shape {tuple(start.shape)}: must be ({p},) or ({p}, m) with few columns, and finite"
            )
    # As many vectors as pairs: from fewer, an eigenvalue of multiplicity k would be found fewer times.
    rows = torch.cat([rows, _random(max(0, k - len(rows)), p, like)])
    return torch.linalg.qr(rows.T)[0].T


def _checked(kernel: NDArray[Any]) -> tuple[Array, float]:
    """The kernel in float64, square and finite, and its Frobenius norm, which is infinite if the squares overflow."""
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise InputError(f"a kernel of shape {matrix.shape}: must be square and not empty")
    flat = matrix.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(flat @ flat)
    # A finite sum of squares has finite terms alone; only where it is not are the entries looked at.
    bad = 0 if math.isfinite(norm) else matrix.size - np.count_nonzero(np.isfinite(matrix))
    if bad:
        raise NonFiniteKernel(f"the kernel has {bad} of {matrix.size} entries that are not finite: the run diverged")
    return matrix, norm
