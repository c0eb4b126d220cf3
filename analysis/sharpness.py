"""The sharpness of the loss and that of the kernel: what lies between the Hessian's top eigenvalue and the NTK's.

    H = JᵀJ/n + Σ_i r_i ∂²f_i/∂θ² / n,        gap = λ_1(H) - λ_1(K)/n

for the loss L = (1/2n) ‖f - y‖², r = f - y. The first part, the Gauss-Newton matrix, has the eigenvalues of K/n, so the
gap closes as r → 0. For the two-layer linear network f = X Wᵀ A the second part couples W and A by the entries of
Xᵀr / n alone, hence (Weyl)

    |λ_1(H) - λ_1(K)/n| ≤ ‖Xᵀr‖₂ / n

Sources: Cohen et al. 2021 (sharpness); Weyl's inequality (the bound).
"""

import xarray as xr

from analysis import linalg
from analysis.rows import described, require


def sharpness_gap(ds: xr.Dataset) -> xr.Dataset:
    """λ_1(H) and λ_1(H) - λ_1(K)/n.

    Unchanged by an orthogonal change of basis of the parameters and by the order of the examples.

    Args:
        ds: `hessian_eigenvalue` and `ntk_sharpness`: `join` of the groups hessian and scalars.

    Returns:
        `hessian_sharpness` and `sharpness_gap` (row), in the unit of the loss's curvature, as 2/η.

    Raises:
        InputError: if a variable is missing.
    """
    require(ds, "the sharpness gap", "hessian_eigenvalue", "ntk_sharpness")
    sharpness = ds["hessian_eigenvalue"].isel(hessian_eig=0)
    return xr.Dataset(
        {
            "hessian_sharpness": described(sharpness, "sharpness", "λ_1(H), the top eigenvalue of the Hessian."),
            "sharpness_gap": described(
                sharpness - ds["ntk_sharpness"],
                "sharpness beyond that of the NTK",
                "λ_1(H) - λ_1(K)/n, K of all pairs of outputs; closes as the residual does.",
            ),
        },
        attrs=ds.attrs,
    )


def gap_bound(x: xr.DataArray, target: xr.DataArray, prediction: xr.DataArray) -> xr.DataArray:
    """‖Xᵀr‖₂ / n, which bounds |sharpness gap| of a two-layer linear network trained on the half mean squared error.

    The norm is the largest singular value; of one output, the length of the vector. Unchanged by an orthogonal change
    of basis of the inputs, and by the order of the examples.

    Args:
        x: input of the training examples (n, ...), as in the group probe; all further dimensions are features.
        target: y (..., n, c).
        prediction: f (..., n, c).

    Returns:
        Bound (...), in the unit of the loss's curvature; NaN where something is not finite.
    """
    features = [dim for dim in x.dims if dim != "sample"]
    residual = prediction.astype("float64") - target
    coupling = xr.dot(x.astype("float64"), residual, dim="sample") / x.sizes["sample"]
    squares = xr.dot(coupling, coupling.rename(output="output2"), dim=features)
    top = linalg.eigenvalues(squares.rename(output="sample", output2="sample2")).isel(mode=0)
    return described(
        top.clip(min=0) ** 0.5,
        "bound of the sharpness gap",
        "‖Xᵀ(f - y)‖₂ / n; bounds |λ_1(H) - λ_1(K)/n| of a two-layer linear network.",
    )
