"""The energy of a target in the kernel, yᵀKy / ‖y‖²: how strongly gradient descent moves the outputs along y.

With K = J Jᵀ it is ‖Jᵀy‖² / ‖y‖², the Rayleigh quotient of K at y, between the smallest and the largest eigenvalue.
Source: Ortiz-Jimenez, Moosavi-Dezfooli, Frossard 2021.
"""

import xarray as xr

from analysis import linalg
from analysis.rows import described, require


def energy(ds: xr.Dataset, y: xr.DataArray | None = None) -> xr.DataArray:
    """Σ_c y_cᵀ K y_c / ‖Y‖².

    Grows as K does; unchanged by a scale of the target, a common permutation of the examples, and one orthogonal
    change of basis of K and y.

    Args:
        ds: `target` with `target_energy` or `ntk`.
        y: a function on the probe (..., n, c) in the place of the target; needs `ntk`.

    Returns:
        Energy (row), in the unit of K's eigenvalues; NaN for a target of zeros.

    Raises:
        InputError: if a variable is missing.
    """
    if y is None:
        require(ds, "energy", "target")
        y = ds["target"]
        if "ntk" not in ds:
            require(ds, "energy", "target_energy")
        found = ds["target_energy"] if "target_energy" in ds else linalg.quadratic_form(ds["ntk"], y)
    else:
        require(ds, "energy of another function", "ntk")
        found = linalg.quadratic_form(ds["ntk"], y)
    return described(
        linalg.ratio(found, linalg.squared_norm(y)),
        "energy of the target in the NTK",
        "Σ_c y_cᵀ K y_c / ‖Y‖_F², between the smallest and the largest eigenvalue of K.",
    )
