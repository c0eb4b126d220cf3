"""Generated regression tasks: a polynomial on an interval, and random linear maps of inputs of a chosen spectrum."""

from typing import Any

import numpy as np
from numpy.polynomial import chebyshev as polynomials

from pipeline.data.examples import Data, generated


def chebyshev(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """The Chebyshev polynomial of degree k on evenly spaced points.

        x_i = -1 + 2 i / (n - 1), i = 0 ... n-1        y_i = T_k(x_i) = cos(k arccos x_i)

    Args:
        options: `n`; `degree`, k.
        rng: draws the rest; the points themselves are the same for every seed.
        rest: give n points drawn uniformly from [-1, 1] instead.

    Returns:
        x (n, 1) and y (n, 1).

    Source: Cohen et al. (2021), arXiv 2103.00065, whose published code has n = 20 and k = 3, 4, 5.
    """
    x = rng.uniform(-1, 1, (options.n, 1)) if rest else np.linspace(-1, 1, options.n)[:, None]
    return generated(x, polynomials.chebval(x, [0] * options.degree + [1]), rest, labels=False)


def whitened_linear(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """A random linear map of whitened inputs.

        X = √n Q, so that Xᵀ X = n I        Y = X Aᵀ

    with Q (n, d) the orthonormal factor of a matrix of independent N(0, 1), and A (d, d) of independent N(0, 1).

    Args:
        options: `n`, at least d; `d`.
        rng: draws X and then A.
        rest: give n other whitened inputs, drawn after these, and their image by the same A.

    Returns:
        x (n, d) and y (n, d).

    Source: Cohen et al. (2021), arXiv 2103.00065, whose published code has n = d = 50.
    """
    n, d = options.n, options.d
    x = np.sqrt(n) * _orthonormal(n, d, rng)
    mapping = rng.standard_normal((d, d))
    if rest:
        x = np.sqrt(n) * _orthonormal(n, d, rng)
    return generated(x, x @ mapping.T, rest, labels=False)


def one_outlier(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """A linear map of inputs with one large singular value, which the target hardly uses.

        X = U diag(√n [o, linspace(1, 1/2, d-1)]) Rᵀ        y = √n U h,  h = (b, z) / ‖(b, z)‖,  z_j ~ N(0, 1)

    with U (n, d) and R (d, d) the orthonormal factors of matrices of independent N(0, 1), so that ‖y‖² = n. The largest
    eigenvalue of X Xᵀ / n is o², along the first column of U; the others are at most 1.

    Args:
        options: `n`, at least d; `d`; `outlier`, o; `overlap`, b, the target along the outlier before h is
            normalised; `data_seed`, a seed of its own, for NumPy's default generator, or None to draw with `rng`.
        rng: draws the matrix of U, that of R, then z.
        rest: give n inputs with another U, drawn after these, and the same R and h: the same linear map.

    Returns:
        x (n, d) and y (n, 1).
    """
    n, d = options.n, options.d
    if options.data_seed is not None:
        rng = np.random.default_rng(options.data_seed)
    left, right = _orthonormal(n, d, rng), _orthonormal(d, d, rng)
    h = np.concatenate([[options.overlap], rng.standard_normal(d - 1)])
    if rest:
        left = _orthonormal(n, d, rng)
    values = np.sqrt(n) * np.concatenate([[options.outlier], np.linspace(1, 0.5, d - 1)])
    y = np.sqrt(n) * left @ (h / np.linalg.norm(h))
    return generated(left * values @ right.T, y[:, None], rest, labels=False)


def _orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """The Q factor of the reduced QR decomposition of a matrix of independent N(0, 1)."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]
