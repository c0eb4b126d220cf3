"""How far the kernels of a run are from one another: distance, CKA, velocity, polar coordinates about the first one.

    S(t, t') = 1 - ⟨K_t, K_t'⟩ / (‖K_t‖ ‖K_t'‖),        v(t) = S(t, t + dt) / dt
    CKA(t, t') = ⟨P K_t P, P K_t' P⟩ / (‖P K_t P‖ ‖P K_t' P‖),        P = I - 11ᵀ/n
    radius(t) = ‖K_t - K_0‖,        angle(t) = arccos(1 - S(t, 0))

S and the angle see the direction of a kernel and not its size; the radius sees both. Velocity is measured over the gap
between recorded rows, so compare runs of one cadence; it grows with the learning rate, hence the second form, per unit
of the flow time η dt.

Sources: Fort et al. 2020 (distance, velocity); Kornblith et al. 2019 (linear CKA); Tsilivis and Kempe 2022 (polar).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis import linalg
from analysis.rows import Runs, described, require, runs_of, taken

Array = NDArray[np.float64]


def kernel_distance(ds: xr.Dataset) -> xr.DataArray:
    """S(t, t') of all pairs of rows of each run.

    Unchanged by a scale of each kernel, a common permutation of the examples, and one orthogonal change of basis of
    all kernels. Memory is a few blocks of kernels; they are read as often as there are blocks.

    Args:
        ds: `ntk`, rows along `snapshot` or `step`.

    Returns:
        S (row, other), without unit, in [0, 1] for positive semidefinite kernels; `other` counts the rows of the
        row's own run in order of step, whose steps are the coordinate `other_step` (-1 where a run has fewer rows than
        another one; S is NaN there, and for a kernel of zeros).

    Raises:
        InputError: if there is no `ntk`, or there are no rows.

    Source: Fort et al. 2020.
    """
    require(ds, "kernel distance", "ntk")
    return described(
        1 - _cosines(ds["ntk"], runs_of(ds), linalg.gram),
        "kernel distance",
        "S(t, t') = 1 - ⟨K_t, K_t'⟩ / (‖K_t‖_F ‖K_t'‖_F), t' the row of the same run at other_step.",
    )


def cka(ds: xr.Dataset) -> xr.DataArray:
    """Linear CKA of all pairs of rows of each run: the cosine of the centred kernels.

    Unchanged by a scale of each kernel, a common permutation of the examples, and a constant added to a kernel.

    Args:
        ds: `ntk`, rows along `snapshot` or `step`.

    Returns:
        CKA (row, other), laid out as `kernel_distance`; NaN where a centred kernel is zero.

    Raises:
        InputError: if there is no `ntk`, or there are no rows.

    Source: Kornblith et al. 2019, equation 4, with the kernels in the place of the Gram matrices.
    """
    require(ds, "CKA", "ntk")
    return described(
        _cosines(ds["ntk"], runs_of(ds), linalg.centred_gram),
        "linear CKA of two kernels",
        "⟨PK_tP, PK_t'P⟩ / (‖PK_tP‖_F ‖PK_t'P‖_F), P = I - 11ᵀ/n, t' the row of the same run at other_step.",
    )


def kernel_velocity(ds: xr.Dataset) -> xr.Dataset:
    """v(t) = S(t, t + dt) / dt, t + dt the step of the following row, and v / η.

    Unchanged by a scale of each kernel, a common permutation of the examples, and one orthogonal change of basis of
    all kernels.

    Args:
        ds: `ntk`, rows along `snapshot` or `step`.

    Returns:
        `kernel_velocity`, per step, and `kernel_velocity_flow`, per unit of flow time η dt, (row); NaN at the last
        row of a run and beside a kernel of zeros.

    Raises:
        InputError: if a variable is missing, or there are no rows.

    Source: Fort et al. 2020.
    """
    require(ds, "kernel velocity", "ntk", "learning_rate")
    runs, kernel = runs_of(ds), ds["ntk"]
    following, exists = runs.followers()
    other, norm = taken(kernel, runs.dim, following), linalg.frobenius_norm(kernel)
    cosine = linalg.ratio(linalg.frobenius_product(kernel, other), norm * taken(norm, runs.dim, following))
    gap = np.where(exists, runs.step[following] - runs.step, np.nan)  # no row follows the last one
    dt = xr.DataArray(gap, dims=runs.dim)
    return xr.Dataset(
        {
            "kernel_velocity": described(
                (1 - cosine) / dt, "kernel velocity", "S(t, t + dt) / dt, dt the steps to the following row of the run."
            ),
            "kernel_velocity_flow": described(
                (1 - cosine) / (ds["learning_rate"] * dt), "kernel velocity in flow time", "S(t, t + dt) / (η dt)."
            ),
        },
        attrs=ds.attrs,
    )


def polar(ds: xr.Dataset) -> xr.Dataset:
    """Polar coordinates of each kernel about the first one of its run.

    All are unchanged by a common permutation of the examples and one orthogonal change of basis of all kernels; the
    angle also by a scale of each kernel, the relative radius by a common one.

    Args:
        ds: `ntk`, rows along `snapshot` or `step`.

    Returns:
        `radius` ‖K_t - K_0‖ in the unit of K, `relative_radius` ‖K_t - K_0‖ / ‖K_0‖ without unit, and `angle` in
        radians, from 0 to π/2 for positive semidefinite kernels, (row); 0 at the first row. The last two are NaN
        where a kernel that they divide by is zero.

    Raises:
        InputError: if there is no `ntk`, or there are no rows.

    Source: Tsilivis and Kempe 2022.
    """
    require(ds, "polar coordinates", "ntk")
    runs, kernel = runs_of(ds), ds["ntk"]
    first = taken(kernel, runs.dim, runs.ends(0))
    radius, relative_radius, angle = (
        _polar_of_blocks(kernel, first)
        if linalg.in_blocks(kernel)
        else xr.apply_ufunc(
            _polar,
            kernel,
            first,
            input_core_dims=[linalg.KERNEL] * 2,
            output_core_dims=[[]] * 3,
            dask="parallelized",
            output_dtypes=[np.float64] * 3,
            dask_gufunc_kwargs={"allow_rechunk": True},
        )
    )
    return xr.Dataset(
        {
            "radius": described(radius, "distance from the first kernel", "‖K_t - K_0‖_F."),
            "relative_radius": described(
                relative_radius, "relative distance from the first kernel", "‖K_t - K_0‖_F / ‖K_0‖_F."
            ),
            "angle": described(
                angle, "angle to the first kernel", "arccos(⟨K_t, K_0⟩ / (‖K_t‖_F ‖K_0‖_F)).", units="radian"
            ),
        },
        attrs=ds.attrs,
    )


def _cosines(kernel: xr.DataArray, runs: Runs, gram: Callable[[xr.DataArray, str], xr.DataArray]) -> xr.DataArray:
    """Cosines of all pairs of kernels of each run, laid out as `kernel_distance`."""
    most = max(map(len, runs.rows))
    bare = xr.DataArray(kernel.variable)  # rows of different runs must not be aligned by their coordinates
    parts = [
        xr.apply_ufunc(
            _normalised,
            gram(bare.isel({runs.dim: rows}), runs.dim),
            kwargs={"size": most},
            input_core_dims=[[runs.dim, "other"]],
            output_core_dims=[[runs.dim, "other"]],
            exclude_dims={"other"},
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"allow_rechunk": True, "output_sizes": {"other": most}},
        )
        for rows in runs.rows
    ]
    order = np.argsort(np.concatenate(runs.rows))
    cosines = xr.concat(parts, runs.dim).isel({runs.dim: order}).assign_coords(kernel.coords)
    steps = np.full((len(runs.step), most), -1)
    for rows in runs.rows:
        steps[rows, : len(rows)] = runs.step[rows]
    description = {"units": "1", "long_name": "step of the other row", "description": "-1 where there is none."}
    return cosines.rename(None).assign_coords(other_step=((runs.dim, "other"), steps, description))


def _normalised(gram: Array, size: int) -> Array:
    """⟨K_t, K_t'⟩ / (‖K_t‖ ‖K_t'‖) (..., s, size) from the products (..., s, s); NaN beyond s."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    # One root of the product: exactly 1 on the diagonal.
    norms = np.sqrt(squares[..., :, None] * squares[..., None, :])
    cosines = np.full((*gram.shape[:-1], size), np.nan)
    np.divide(gram, norms, out=cosines[..., : gram.shape[-1]], where=norms > 0)
    return cosines


def _polar(kernel: NDArray[Any], first: NDArray[Any]) -> tuple[Array, Array, Array]:
    """‖K - K_0‖, the same over ‖K_0‖, and the angle between K and K_0, of stacks (..., n, n).

    The angle by Kahan's formula, 2 atan2(‖u - v‖, ‖u + v‖) of the unit vectors: the arc cosine of a number near 1
    would lose half of the digits.
    """
    radius, relative, angle = (np.full(kernel.shape[:-2], np.nan) for _ in range(3))
    for row in np.ndindex(*kernel.shape[:-2]):
        one, other = kernel[row].astype(np.float64), first[row].astype(np.float64)
        norm, other_norm = np.linalg.norm(one), np.linalg.norm(other)
        radius[row] = np.linalg.norm(one - other)
        if other_norm > 0:
            relative[row] = radius[row] / other_norm
        if norm > 0 and other_norm > 0:
            u, v = one / norm, other / other_norm
            angle[row] = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return radius, relative, angle


def _polar_of_blocks(kernel: xr.DataArray, first: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """As `_polar`, of kernels in several blocks each, in one pass.

    With D = K - K_0, a = ‖K‖ and b = ‖K_0‖, the unit vectors have ‖u - v‖² = (‖D‖² - (a - b)²) / ab and
    a - b = ⟨D, K + K_0⟩ / (a + b). An angle below about 1e-8 ‖D‖ / ‖K_0‖ is lost in rounding.
    """
    one, other = kernel.astype(np.float64), first.astype(np.float64)
    norm, other_norm = linalg.frobenius_norm(kernel), linalg.frobenius_norm(first)
    radius = linalg.frobenius_norm(one - other)
    longer = linalg.ratio(linalg.frobenius_product(one - other, one + other), norm + other_norm)
    apart = linalg.ratio(radius**2 - longer**2, norm * other_norm).clip(0, 4)
    angle = xr.apply_ufunc(np.arctan2, apart**0.5, (4 - apart) ** 0.5, dask="allowed")
    return radius, linalg.ratio(radius, other_norm), 2 * angle
