"""How a kernel's spectrum is spread: normalised eigenvalues and the effective rank.

    λ̂_i = λ_i / ‖K‖,        effective rank = exp(-Σ_i p_i log p_i),  p_i = λ_i / Σ_j λ_j

With c_i the mode alignment of one output, KTA = Σ_i λ̂_i c_i over all n modes. Sources: Jiang, Cohen, Li 2025,
caption of figure 1 (the normalisation); Roy and Vetterli 2007 and Baratin et al. 2021 (the effective rank).
"""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis import linalg
from analysis.rows import described


def normalised_eigenvalue(eigenvalue: xr.DataArray, norm: xr.DataArray) -> xr.DataArray:
    """λ̂_i = λ_i / ‖K‖.

    Args:
        eigenvalue: λ_i (..., k).
        norm: ‖K‖ (...).

    Returns:
        λ̂ (..., k); NaN for a kernel of zeros.
    """
    return described(
        eigenvalue / norm.where(norm > 0),
        "normalised NTK eigenvalue",
        "λ_i / ‖K‖_F; ‖K‖_F is the 2-norm of all n eigenvalues.",
    )


def effective_rank(kernel: xr.DataArray) -> xr.DataArray:
    """Exp of the entropy of the spectrum, from 1 (one mode) to n (all modes equal).

    Args:
        kernel: K (..., n, n), symmetric; all its eigenvalues are computed, in float64.

    Returns:
        Effective rank (...); NaN for a kernel of zeros or one that is not finite.
    """
    rank = xr.apply_ufunc(
        _exp_entropy,
        linalg.eigenvalues(kernel),
        input_core_dims=[["mode"]],
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return described(
        rank,
        "effective rank of the NTK",
        "exp(-Σ p_i log p_i), p_i = λ_i / Σ_j λ_j over all n eigenvalues of the stored kernel, negative ones set to 0.",
    )


def _exp_entropy(eigenvalues: NDArray[Any]) -> NDArray[np.float64]:
    # A positive semidefinite kernel has eigenvalues below zero from rounding alone.
    weight = np.maximum(eigenvalues, 0)
    total = weight.sum(axis=-1, keepdims=True)
    p = np.divide(weight, total, out=np.full_like(weight, np.nan), where=total > 0)
    return np.exp(-(p * np.log(np.where(p == 0, 1, p))).sum(axis=-1))
