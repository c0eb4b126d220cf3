"""The semidefinite complementarity problem that keeps the critical eigenvalues of a flow below their bound.

    0 ⪯ X  ⊥  A + B[X] ⪰ 0,        A symmetric (k, k),  B symmetric and positive semidefinite on symmetric matrices,

which is the optimality condition of the convex problem

    min over X ⪰ 0 of  ½ ⟨X, B[X]⟩ + ⟨A, X⟩.

For k = 1 it has the solution X = max(0, -A / B). For more it goes to an interior-point solver in the coordinates

    svec X = (X_11, √2 X_12, X_22, √2 X_13, …),        ⟨X, Y⟩ = svec X · svec Y,

in which an entry off the diagonal counts for both of its places.

Source: Cohen et al. (2024), arXiv 2410.24206; Goulart and Chen (2024), arXiv 2405.12762, for the solver.
"""

import math

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipeline.spectra import NonFiniteKernel

Array = NDArray[np.float64]

# Gap and infeasibility at which the solver stops, for A and B of size 1. It reaches 1e-9 on every problem tried and
# 1e-11 on some, and the flow's own error is far above either.
PRECISION = 1e-9


def complementary(a: Array, b: Array) -> Array:
    """The X of smallest ½ ⟨X, B[X]⟩ + ⟨A, X⟩.

    Args:
        a: A (k, k), symmetric.
        b: B (k, k, k, k), B[X]_ij = Σ_lm B_ijlm X_lm.

    Returns:
        X (k, k), symmetric, positive semidefinite to the solver's precision; exactly 0 if A ⪰ 0.

    Raises:
        NonFiniteKernel: if A or B is not finite, or if there is no such X, because B does not act where A is negative.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NonFiniteKernel("the curvature of the critical eigenvalues is not finite: the run diverged")
    if np.linalg.eigvalsh(a).min(initial=0.0) >= 0:
        return np.zeros_like(a)
    column, row = np.tril_indices(len(a))  # the upper triangle, column by column
    weight = np.where(row == column, 1.0, math.sqrt(2))
    q, p = weight * a[row, column], np.outer(weight, weight) * b[row, column][:, row, column]
    # X is of the size of A / B; the solver's tolerances are meant for numbers near 1.
    size_q, size_p = (math.sqrt(np.mean(array**2)) for array in (q, p))
    x = _minimum(p / size_p, q / size_q, len(a)) if size_p > 0 else None
    if x is None:
        raise NonFiniteKernel("no finite Σ keeps the critical eigenvalues of the Hessian at 2/η: the run diverged")
    found = np.empty_like(a)
    found[row, column] = found[column, row] = x * (size_q / size_p) / weight
    return found


def _minimum(p: Array, q: Array, k: int) -> Array | None:
    """Svec of the X ⪰ 0 (k, k) of smallest ½ xᵀPx + qᵀx, if there is one."""
    if k == 1:
        return -q / p[0]  # positive, since A is negative here
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = PRECISION
    settings.direct_solve_method, settings.max_threads = "qdldl", 1  # the same bits at every call
    upper, minus_one = sparse.triu(sparse.csc_matrix(p), format="csc"), -sparse.identity(len(q), format="csc")
    cone = clarabel.PSDTriangleConeT(k)
    solution = clarabel.DefaultSolver(upper, q, minus_one, np.zeros_like(q), [cone], settings).solve()
    return np.array(solution.x) if solution.status == clarabel.SolverStatus.Solved else None
