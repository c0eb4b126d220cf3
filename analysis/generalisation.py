"""What the kernel says of examples that were not trained on: alignment, error, and kernel regression.

    f_K(x) = K(x, X) (K + ρ n I)⁻¹ Y,    K the kernel of the n training examples X

Regression with the kernel that training ended with is close to the network where the kernel had settled before the
function did. It has no further part: the network's initial function f_0 is not added to f_K, nor taken from Y, so the
two can agree only where f_0 is small.

For several outputs K is the kernel summed over outputs, divided by their number c, and serves each output by itself:
what the kernel of all pairs of outputs becomes in a wide network, whose outputs do not see each other.

Sources: Jacot, Gabriel, Hongler 2018 (kernel regression as the end of training); Atanasov, Bordelon, Pehlevan 2021
(with the final kernel).
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis import linalg
from analysis.alignment import alignment
from analysis.rows import described, require
from pipeline.errors import InputError

Array = NDArray[np.float64]

OUTPUTS = ("test_sample", "output")


def held_out(ds: xr.Dataset) -> xr.Dataset:
    """The dataset with the held-out examples in the place of those of training, so that every measure works on them.

        alignment(held_out(ds))

    Args:
        ds: a sweep, a run, or rows chosen from one, with `ntk_test`, `prediction_test` and `test_target`.

    Returns:
        `ntk` (row, sample, sample2), all its eigenvectors, `eigenvector` (row, sample, eig), `prediction` and `target`
        (row, sample, output) of the m held-out examples; lazy. The coordinates stay: `loss` is that of training.

    Raises:
        InputError: if no examples were held out.
    """
    named = {"ntk_test": "ntk", "prediction_test": "prediction", "test_target": "target"}
    require(ds, "the kernel of held-out examples", *named)
    taken = ds[list(named)].rename({**named, "test_sample": "sample", "test_sample2": "sample2"})
    # A variable, not an array: the coordinates are those of the dataset.
    return taken.assign(eigenvector=linalg.eigenvectors(taken["ntk"]).variable).assign_attrs(kernel="ntk_test")


def held_out_alignment(ds: xr.Dataset) -> xr.Dataset:
    """KTA, centred KTA and C(k) of the kernel and the targets of held-out examples.

    Unchanged by a scale of K_test and by the order of the examples.

    Args:
        ds: as `held_out` takes it.

    Returns:
        `kta_test`, `kta_centred_test` (row) and `cumulative_alignment_test` (row, m), C(k) at `eig` = k - 1, without
        unit, in [0, 1]; as `alignment` defines them.

    Raises:
        InputError: if no examples were held out.
    """
    found = alignment(held_out(ds))
    return xr.Dataset(
        {
            f"{name}_test": described(
                found[name],
                f"{found[name].attrs['long_name']}, held out",
                f"Of the m held-out examples: {found[name].attrs['description']}",
            )
            for name in ("kta", "kta_centred", "cumulative_alignment")
        },
        attrs=ds.attrs,
    )


def held_out_error(ds: xr.Dataset) -> xr.Dataset:
    """Errors of the network on the held-out examples.

    Args:
        ds: `prediction_test` and `test_target`.

    Returns:
        `test_squared_error` (row), ‖f - Y‖² / 2m, whatever loss the network was trained on, and `test_error_rate`
        (row), the share of the examples classified wrong: other signs for one output, where 0 is wrong, other largest
        outputs for several. The latter is NaN where targets are not class labels, -1 and +1 or one-hot.

    Raises:
        InputError: if no examples were held out.
    """
    require(ds, "errors on held-out examples", "prediction_test", "test_target")
    return xr.Dataset(_errors("test", "of the network", ds["prediction_test"], ds["test_target"]), attrs=ds.attrs)


def kernel_regression(ds: xr.Dataset, ridge: float = 0.0) -> xr.Dataset:
    """f_K on the held-out examples, its errors, and how near it is to the network.

    Without a ridge the inverse is a pseudo-inverse: eigenvalues of K up to n ε λ_1 count as 0, ε = 1.2e-7 of the
    float32 in which kernels are stored, as rounding may have made them. A ridge ρ above ε λ_1 / c keeps all of them.

    Args:
        ds: `ntk`, `ntk_cross`, `target`, `prediction_test` and `test_target`.
        ridge: ρ, in the unit of K; the kernel gets ρ n on its diagonal.

    Returns:
        Of each row's kernel `regression_prediction` (row, test_sample, output), f_K; `regression_squared_error` and
        `regression_error_rate` (row), as those of the network in `held_out_error`; and, f being the network's output,
        `regression_correlation` (row), of all m c values of f_K and f, `regression_distance` (row), ‖f_K - f‖ / ‖f‖,
        and `regression_agreement` (row), the share of the examples on whose class they agree: equal signs, or equal
        largest outputs. NaN where a kernel is not finite or a denominator is zero.

    Raises:
        InputError: if no examples were held out, or the ridge is not a finite number from 0 up.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not (math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"ridge = {ridge!r}: must be a finite number from 0 up")
    require(ds, "kernel regression", "ntk", "ntk_cross", "target", "prediction_test", "test_target")
    n, c = ds.sizes["sample"], ds.sizes["output"]
    # K/c + ρ n I: the factor 1/c, which K(x, X) has as well, goes to the ridge.
    f_k = linalg.kernel_regression(ds["ntk"], ds["ntk_cross"], ds["target"], c * n * float(ridge))
    f = ds["prediction_test"].astype("float64")
    return xr.Dataset(
        {
            "regression_prediction": described(
                f_k, "kernel regression", "f_K = K(x, X) (K + ρ n I)⁻¹ Y on the held-out examples, ρ the ridge."
            ),
            **_errors("regression", "of kernel regression", f_k, ds["test_target"]),
            "regression_correlation": described(
                _correlation(f_k, f),
                "correlation of kernel regression and network",
                "Pearson's, of all m c values of f_K and f on the held-out examples.",
            ),
            "regression_distance": described(
                linalg.ratio(_norm(f_k - f), _norm(f)),
                "distance of kernel regression and network",
                "‖f_K - f‖ / ‖f‖ on the held-out examples.",
            ),
            "regression_agreement": described(
                _per_row(_agreement, f_k, f),
                "agreement of kernel regression and network",
                "Share of the held-out examples on whose class f_K and f agree.",
            ),
        },
        attrs=ds.attrs,
    )


def _errors(prefix: str, whose: str, f: xr.DataArray, y: xr.DataArray) -> dict[str, xr.DataArray]:
    squares = _norm(f.astype("float64") - y) ** 2
    return {
        f"{prefix}_squared_error": described(
            squares / (2 * y.sizes["test_sample"]), f"held-out squared error {whose}", "‖f - Y‖² / 2m, m examples."
        ),
        f"{prefix}_error_rate": described(
            _per_row(_error_rate, f, y), f"held-out error rate {whose}", "Share of the m examples classified wrong."
        ),
    }


def _norm(f: xr.DataArray) -> xr.DataArray:
    # NaN marks a row that is missing; skipping it would turn it into zero
    return (f**2).sum(OUTPUTS, skipna=False) ** 0.5


def _correlation(f: xr.DataArray, g: xr.DataArray) -> xr.DataArray:
    f, g = (one - one.mean(OUTPUTS, skipna=False) for one in (f, g))
    return linalg.ratio((f * g).sum(OUTPUTS, skipna=False), _norm(f) * _norm(g))


def _per_row(function: Callable[..., Array], f: xr.DataArray, g: xr.DataArray) -> xr.DataArray:
    """A function of two numpy stacks (..., m, c), of labelled and perhaps lazy ones."""
    return xr.apply_ufunc(
        function,
        f,
        g,
        input_core_dims=[list(OUTPUTS)] * 2,
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"allow_rechunk": True},
    )


def _agreement(f: NDArray[Any], g: NDArray[Any]) -> Array:
    """Share of examples of one class by f and by g (..., m, c); NaN where something is not finite."""
    same = f[..., 0] * g[..., 0] > 0 if f.shape[-1] == 1 else f.argmax(axis=-1) == g.argmax(axis=-1)
    finite = np.isfinite(f).all(axis=(-2, -1)) & np.isfinite(g).all(axis=(-2, -1))
    return np.where(finite, same.mean(axis=-1), np.nan)


def _error_rate(f: NDArray[Any], y: NDArray[Any]) -> Array:
    if y.shape[-1] == 1:
        labels = np.abs(y) == 1
    else:
        labels = ((y == 0) | (y == 1)) & (y.sum(axis=-1, keepdims=True) == 1)
    return np.where(labels.all(axis=(-2, -1)), 1 - _agreement(f, y), np.nan)
