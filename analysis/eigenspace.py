"""The leading eigenspace of the kernel: what it holds of the network's function, and how it turns.

    held(f, k) = ‖V_kᵀ f‖² / ‖f‖²,        overlap(t, t'; k) = ‖V_k(t)ᵀ V_k(t')‖² / k

V_k has the first k eigenvectors as columns. Both are cumulative in k and stand at `eig` = k - 1. They depend on the
spaces alone: neither the sign of an eigenvector counts nor a rotation among the first k. Where λ_k = λ_{k+1} the
space itself is arbitrary.

Sources: Kopitkov and Indelman 2020 (the function in the top eigenspace); Fort et al. 2020 (how the kernel turns).
"""

import xarray as xr

from analysis import linalg
from analysis.rows import described, require, runs_of, taken


def eigenspace(ds: xr.Dataset) -> xr.Dataset:
    """Shares of the network's output and of its residual in the first k eigenvectors.

    Unchanged by a scale of K, a common permutation of the examples, one orthogonal change of basis of K, f and y,
    and a rotation among the first k eigenvectors.

    Args:
        ds: `eigenvector`, `prediction` and `target`.

    Returns:
        `prediction_in_eigenspace` and `residual_in_eigenspace` (row, k), without unit, at `eig` = k - 1; 1 at k = n.
        NaN where the prediction, or the residual, is zero.

    Raises:
        InputError: if a variable is missing.

    Source: Kopitkov and Indelman 2020.
    """
    require(ds, "the function in the eigenspace", "eigenvector", "prediction", "target")
    prediction = ds["prediction"].astype("float64")
    return xr.Dataset(
        {
            "prediction_in_eigenspace": described(
                _held(ds, prediction),
                "share of the prediction in the eigenspace",
                "‖V_kᵀ f‖_F² / ‖f‖_F², at eig = k - 1.",
            ),
            "residual_in_eigenspace": described(
                _held(ds, prediction - ds["target"]),
                "share of the residual in the eigenspace",
                "‖V_kᵀ (f - y)‖_F² / ‖f - y‖_F², at eig = k - 1.",
            ),
        },
        attrs=ds.attrs,
    )


def eigenspace_overlap(ds: xr.Dataset) -> xr.Dataset:
    """How much of the first k eigenvectors lies in those of the following, the first and the last row of the run.

    Unchanged by a scale of K, a common permutation of the examples, one orthogonal change of basis of all kernels,
    and a rotation among the first k eigenvectors.

    Args:
        ds: `eigenvector`, rows along `snapshot` or `step`.

    Returns:
        `overlap_following` (NaN at the last row of a run), `overlap_first` and `overlap_last` (row, k), without unit,
        at `eig` = k - 1; from 0 (orthogonal spaces) to 1 (equal ones, as at k = n).

    Raises:
        InputError: if there is no `eigenvector`, or there are no rows.
    """
    require(ds, "overlap of eigenspaces", "eigenvector")
    runs, vectors = runs_of(ds), ds["eigenvector"]
    following, exists = runs.followers()
    others = {"following": following, "first": runs.ends(0), "last": runs.ends(-1)}
    overlaps = {
        name: linalg.subspace_overlaps(vectors, taken(vectors, runs.dim, positions))
        for name, positions in others.items()
    }
    overlaps["following"] = overlaps["following"].where(xr.DataArray(exists, dims=runs.dim))
    return xr.Dataset(
        {
            f"overlap_{name}": described(
                overlap,
                f"overlap with the {name} eigenspace",
                f"‖V_k(t)ᵀ V_k(t')‖_F² / k, t' the {name} row of the run, at eig = k - 1.",
            )
            for name, overlap in overlaps.items()
        },
        attrs=ds.attrs,
    )


def _held(ds: xr.Dataset, function: xr.DataArray) -> xr.DataArray:
    shares = linalg.ratio(linalg.squared_projections(ds["eigenvector"], function), linalg.squared_norm(function))
    # NaN marks a row that is missing; skipping it would turn it into zero
    return shares.cumsum("eig", skipna=False)
