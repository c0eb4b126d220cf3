"""Specialisation of the kernel to classes: does K_cc align with the target of its own output more than with others'?

    A_cc' = y_c'ᵀ K_cc y_c' / (‖K_cc‖ ‖y_c'‖²),        specialisation_c = A_cc / mean_{c'≠c} A_cc'

A kernel is specialised where the ratio is above 1. Source: Shan and Bordelon 2021 (the phenomenon; the ratio is ours).
"""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis import linalg
from analysis.rows import described, require

Array = NDArray[np.float64]


def specialisation(ds: xr.Dataset) -> xr.Dataset:
    """Alignment of each output's kernel with each output's target, and how much its own stands out.

    Unchanged by a scale of each K_cc and of each y_c, and by a common permutation of the examples.

    Args:
        ds: `ntk_full` and `target`.

    Returns:
        `class_alignment` (row, c, c), the target's output along `output2`, and `specialisation` (row, c); without
        unit. NaN for a kernel or a target of zeros, and the specialisation of a single output.

    Raises:
        InputError: if a variable is missing.
    """
    require(ds, "specialisation", "ntk_full", "target")
    aligned, ratio = xr.apply_ufunc(
        _specialisation,
        ds["ntk_full"],
        ds["target"],
        input_core_dims=[linalg.FULL, linalg.TARGET],
        output_core_dims=[["output", "output2"], ["output"]],
        dask="parallelized",
        output_dtypes=[np.float64] * 2,
        dask_gufunc_kwargs={"allow_rechunk": True},
    )
    return xr.Dataset(
        {
            "class_alignment": described(
                aligned,
                "alignment of an output's kernel with an output's target",
                "A_cc' = y_c'ᵀ K_cc y_c' / (‖K_cc‖_F ‖y_c'‖²), c along output, c' along output2.",
            ),
            "specialisation": described(
                ratio,
                "specialisation of an output's kernel",
                "A_cc / mean_{c'≠c} A_cc'; above 1 where the kernel of an output is specialised to it.",
            ),
        },
        attrs=ds.attrs,
    )


def _specialisation(kernel: NDArray[Any], y: NDArray[Any]) -> tuple[Array, Array]:
    """A (..., c, c) and its ratios (..., c) from the kernel (..., n, c, n, c) and the targets (..., n, c)."""
    own = np.einsum("...iaja->...aij", kernel).astype(np.float64)
    y = y.astype(np.float64)[..., None, :, :]
    power = np.einsum("...ic,...ic->...c", own @ y, y)
    norms = np.linalg.norm(own, axis=(-2, -1))[..., None] * (y**2).sum(axis=-2)
    aligned = _quotient(power, norms)
    diagonal = np.diagonal(aligned, axis1=-2, axis2=-1)
    others = aligned.sum(axis=-1) - diagonal
    return aligned, _quotient(diagonal * (y.shape[-1] - 1), others)


def _quotient(numerator: Array, denominator: Array) -> Array:
    """NaN where the denominator is not positive."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
