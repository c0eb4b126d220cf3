"""How a kernel's spectrum is spread: normalised eigenvalues, what the leading ones hold, and the effective rank.

    λ̂_i = λ_i / ‖K‖,        effective rank = exp(-Σ_i p_i log p_i),  p_i = λ_i / Σ_j λ_j
    T_k = Σ_{i≤k} λ_i / tr K,        top mass of k modes = Σ_{i≤k} λ_i² / ‖K‖²

With c_i the mode alignment of one output, KTA = Σ_i λ̂_i c_i over all n modes. Sources: Jiang, Cohen, Li 2025,
caption of figure 1 (the normalisation); Roy and Vetterli 2007 and Baratin et al. 2021 (the effective rank); Baratin et
al. 2021 (trace ratios); Tsilivis and Kempe 2022 (top mass, of 20 modes).
"""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis import linalg
from analysis.rows import described, require


def normalised_eigenvalue(eigenvalue: xr.DataArray, norm: xr.DataArray) -> xr.DataArray:
    """λ̂_i = λ_i / ‖K‖.

    Args:
        eigenvalue: λ_i (..., k).
        norm: ‖K‖ (...).

    Returns:
        λ̂ (..., k); NaN for a kernel of zeros.
    """
    return described(
        linalg.ratio(eigenvalue, norm),
        "normalised NTK eigenvalue",
        "λ_i / ‖K‖_F; ‖K‖_F is the 2-norm of all n eigenvalues.",
    )


def trace_ratio(ds: xr.Dataset) -> xr.DataArray:
    """T_k = Σ_{i≤k} λ_i / tr K, the share of the trace in the k leading modes.

    Unchanged by a scale of K, a common permutation of the examples, and any orthogonal change of basis of K.

    Args:
        ds: `eigenvalue` and `trace`: the group snapshots, or `join` of spectra and scalars.

    Returns:
        T (row, k), T_k at `eig` = k - 1, without unit; T_n = 1. NaN for a kernel of zeros.

    Raises:
        InputError: if a variable is missing.

    Source: Baratin et al. 2021.
    """
    require(ds, "trace ratios", "eigenvalue", "trace")
    return described(
        # NaN marks a row that is missing; skipping it would turn it into zero
        linalg.ratio(ds["eigenvalue"].cumsum("eig", skipna=False), ds["trace"]),
        "trace ratio of the NTK",
        "T_k = Σ_{i≤k} λ_i / tr K, at eig = k - 1.",
    )


def top_mass(ds: xr.Dataset) -> xr.DataArray:
    """Σ_{i≤k} λ_i² / ‖K‖², the share of the squared norm in the k leading modes.

    Unchanged by a scale of K, a common permutation of the examples, and any orthogonal change of basis of K.

    Args:
        ds: `eigenvalue` and `frobenius_norm`: the group snapshots, or `join` of spectra and scalars.

    Returns:
        Mass (row, k), that of k modes at `eig` = k - 1, without unit; 1 at k = n. NaN for a kernel of zeros.

    Raises:
        InputError: if a variable is missing.

    Source: Tsilivis and Kempe 2022, with k = 20.
    """
    require(ds, "top mass", "eigenvalue", "frobenius_norm")
    return described(
        (normalised_eigenvalue(ds["eigenvalue"], ds["frobenius_norm"]) ** 2).cumsum("eig", skipna=False),
        "top mass of the NTK",
        "Σ_{i≤k} λ_i² / ‖K‖_F², at eig = k - 1.",
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
