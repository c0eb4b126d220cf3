"""The two-layer linear network f = X Wᵀ a, whose gradient descent is known exactly.

With G = X Xᵀ, s = ‖a‖², M = X Wᵀ W Xᵀ, r = f - y, L = ‖r‖²/2n and step size η, one step gives, whatever η is,

    K  = s G + M
    r⁺ = [I - (η/n) K + (η²/n²)(fᵀr) G] r                                                              (1)
    s⁺ = s - (2η/n) fᵀr + (η²/n²) rᵀM r                                                                (2)
    K⁺ = K - (η/n)[f (Gr)ᵀ + (Gr) fᵀ + 2 (fᵀr) G] + (η²/n²)[s (Gr)(Gr)ᵀ + (rᵀMr) G]                    (3)
    Q⁺ = Q + (η²/n²)[(W Xᵀr)(W Xᵀr)ᵀ - ‖Xᵀr‖² a aᵀ],    Q = a aᵀ - W Wᵀ                                (4)

W = a pᵀ stays of that form, and there K = s G + f fᵀ/s. At the fit f = y then, with Y = ‖y‖², g = yᵀGy / Y, F = ‖G‖ and
z = s²/Y,

    KTA(s) = (1 + g z) / sqrt(1 + 2 g z + F² z²)                                                       (5)

falls with s unless G ∝ yyᵀ, and C(k; s) does not rise with s for any k: Σ_{i≤k} μ_i(τ) of G + τ yyᵀ is convex in
τ = 1/s², and its derivative is Y C(k). Small weights and small steps end at s = ‖β_*‖, β_* the interpolator of least
norm; larger steps, whose line lies below the sharpness there, at the largest root of S(s) = λ_1(s G + yyᵀ/s)/n = 2/η.

Where y is not in the range of X it stands for its projection, whose share of ‖y‖² is a factor of KTA.

Sources: derived here; the kernel is equation 5 of Atanasov, Bordelon, Pehlevan 2021; n = 1 gives the catapult of
Lewkowycz et al. 2020; Li, Wang, Li 2022 describe the cycle at the edge by s.
"""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.rows import described, require, runs_of, taken
from pipeline.errors import InputError

Array = NDArray[np.float64]

GRID = 60  # values of s at which C(k; s) is looked at
HALVINGS = 200

_COLUMNS = {
    "squared_length": ("squared length of the output weights", "s = ‖a‖²."),
    "squared_length_predicted": (
        "predicted squared length of the output weights",
        "‖β_*‖, or where 2/η lies below S(‖β_*‖) the largest root of S(s) = 2/η; NaN where there is none.",
    ),
    "kta_closed_form": ("KTA of the closed form", "Equation (5) at the measured s."),
    "rank_one_error": ("distance from the rank-one form", "‖W - a pᵀ‖ / ‖W‖, p = Wᵀa / s."),
    "recursion_error": (
        "error of the exact recursions",
        "The largest difference of both sides of (1) to (4) over the size of r and y, s, K and s before the step or "
        "after it; at rows whose next step was recorded.",
    ),
    "gap_bound": ("bound of the sharpness gap", "‖Xᵀr‖ / n, which bounds |λ_1(H) - λ_1(K)/n|."),
    "shift_violation": (
        "violation of the alignment theorem",
        f"The largest rise of C(k; s) between {GRID} growing values of s, over all k; at most 0 up to rounding.",
    ),
}  # fmt: skip


def two_layer_linear(ds: xr.Dataset, x: xr.DataArray) -> xr.Dataset:
    """What the theory of the two-layer linear network says of each row, beside what was measured.

    Args:
        ds: snapshots of one run of the model `two_layer_linear` with one output: `parameter`, `target` and
            `learning_rate`, rows along `snapshot` or `step`. Errors of (1) to (4) are those of rounding if it was
            trained in float64.
        x: its training examples (n, ...), the variable `input` of its group probe.

    Returns:
        A variable (row) for each entry of `_COLUMNS`, lazy. None has a unit but `gap_bound`, which has that of the
        loss's curvature, and the squared lengths, which have that of a squared weight.

    Raises:
        InputError: if a variable is missing, the rows are of several runs, or the model has several outputs.
    """
    require(ds, "the theory of two-layer linear networks", "parameter", "target", "learning_rate")
    runs = runs_of(ds)
    if len(runs.names) > 1 or ds.sizes["output"] > 1:
        raise InputError("the theory of two-layer linear networks: take one run, of a network with one output")
    inputs = x.values.reshape(x.sizes["sample"], -1).astype(np.float64)
    target = ds["target"].isel({runs.dim: 0, "output": 0}).values.astype(np.float64)
    theory = _Theory(inputs, target)
    following, has_one = runs.followers()
    next_step = has_one & (runs.step[following] == runs.step + 1)
    parameter = ds["parameter"].astype("float64")
    measured = xr.apply_ufunc(
        theory.row,
        parameter,
        taken(parameter, runs.dim, following),
        ds["learning_rate"],
        xr.DataArray(next_step, dims=runs.dim),
        input_core_dims=[["parameter_index"], ["parameter_index"], [], []],
        output_core_dims=[["column"]],
        vectorize=True,
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"column": len(_COLUMNS)}},
    )
    return xr.Dataset(
        {name: described(measured.isel(column=i), *text) for i, (name, text) in enumerate(_COLUMNS.items())},
        attrs=ds.attrs,
    )


class _Theory:
    """The data's part of the theory, and what it says of one row."""

    def __init__(self, x: Array, y: Array) -> None:
        self.x, self.y, self.n = x, y, len(x)
        self.gram = x @ x.T
        left, singular, _ = np.linalg.svd(x, full_matrices=False)
        kept = singular > singular.max() * max(x.shape) * np.finfo(float).eps
        self.within = left[:, kept] @ (left[:, kept].T @ y)
        self.least_norm = float(np.linalg.norm((left[:, kept].T @ y) / singular[kept]))
        self.violation = self._violation()
        self._ends: dict[float, float] = {}  # of each step size, once for all rows

    def closed_form(self, s: float) -> float:
        """Equation (5)."""
        size = self.within @ self.within
        g, norm, z = self.within @ self.gram @ self.within / size, np.linalg.norm(self.gram), s**2 / size
        kta = (1 + g * z) / np.sqrt(1 + 2 * g * z + norm**2 * z**2)
        return float(kta * size / (self.y @ self.y))

    def kernel(self, s: float) -> Array:
        """S G + yyᵀ/s."""
        return s * self.gram + np.outer(self.within, self.within) / s

    def sharpness(self, s: float) -> float:
        """S(s) = λ_1(s G + yyᵀ/s) / n."""
        return float(np.linalg.eigvalsh(self.kernel(s))[-1] / self.n)

    def predicted(self, learning_rate: float) -> float:
        """The end of s at a step size."""
        line, high = 2 / learning_rate, self.least_norm
        if self.sharpness(high) <= line:
            return high
        # S is convex: its minimum lies where the ternary search ends, and it grows from there to ‖β_*‖.
        low, right = 1e-6 * high, high
        for _ in range(HALVINGS):
            third = (right - low) / 3
            if self.sharpness(low + third) < self.sharpness(right - third):
                right -= third
            else:
                low += third
        if self.sharpness(low) > line:
            return np.nan
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.sharpness(middle) < line else (low, middle)
        return high

    def row(self, parameter: Array, following: Array, learning_rate: float, next_step: bool) -> Array:
        """The values of `_COLUMNS`."""
        w, a = self._weights(parameter)
        s = float(a @ a)
        r = self.x @ (w.T @ a) - self.y
        if learning_rate not in self._ends:
            self._ends[learning_rate] = self.predicted(learning_rate)
        return np.array(
            [
                s,
                self._ends[learning_rate],
                self.closed_form(s),
                np.linalg.norm(w - np.outer(a, w.T @ a / s)) / np.linalg.norm(w),
                self._recursions(w, a, following, learning_rate / self.n) if next_step else np.nan,
                np.linalg.norm(self.x.T @ r) / self.n,
                self.violation,
            ]
        )

    def _weights(self, parameter: Array) -> tuple[Array, Array]:
        width = parameter.size // (self.x.shape[1] + 1)
        return parameter[:-width].reshape(width, -1), parameter[-width:]

    def _recursions(self, w: Array, a: Array, following: Array, step: float) -> float:
        """The largest relative error of (1) to (4), with η/n = `step`."""
        x, gram = self.x, self.gram
        w2, a2 = self._weights(following)
        hidden, s = x @ w.T, a @ a
        f = hidden @ a
        r, m = f - self.y, hidden @ hidden.T
        kernel, pushed, drive, cut = s * gram + m, gram @ r, f @ r, r @ m @ r
        back = w @ (x.T @ r)
        predicted: list[Any] = [
            r - step * kernel @ r + step**2 * drive * pushed,
            s - 2 * step * drive + step**2 * cut,
            kernel
            - step * (np.outer(f, pushed) + np.outer(pushed, f) + 2 * drive * gram)
            + step**2 * (s * np.outer(pushed, pushed) + cut * gram),
            np.outer(a, a) - w @ w.T + step**2 * (np.outer(back, back) - (r @ pushed) * np.outer(a, a)),
        ]
        hidden2 = x @ w2.T
        found: list[Any] = [
            hidden2 @ a2 - self.y, a2 @ a2, (a2 @ a2) * gram + hidden2 @ hidden2.T, np.outer(a2, a2) - w2 @ w2.T,
        ]  # fmt: skip
        # What is small after a step may be the difference of what was large before it, r of f and y, Q of two products:
        # rounding is theirs.
        grown, kernels = max(s, a2 @ a2), max(np.linalg.norm(kernel), np.linalg.norm(found[2]))
        sizes: list[Any] = [np.linalg.norm(self.y) + np.linalg.norm(f), grown, kernels, grown]
        return max(
            float(np.linalg.norm(one - other) / size) for one, other, size in zip(found, predicted, sizes, strict=True)
        )

    def _violation(self) -> float:
        """The largest rise of C(k; s) as s grows over a grid around ‖β_*‖."""
        grid = self.least_norm * np.geomspace(0.1, 10, GRID)
        shares = [np.cumsum((np.linalg.eigh(self.kernel(s))[1].T @ self.within)[::-1] ** 2) for s in grid]
        return float(np.diff(np.array(shares) / (self.within @ self.within), axis=0).max())
