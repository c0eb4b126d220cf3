"""Phases of training at the Edge of Stability, and the alignment gained in them.

Gradient descent with step size η is stable where the sharpness S = λ₁(K)/n lies below the line 2/η. The outputs, and
with them K, oscillate with period two at the edge, so trends are read from two-step means of recorded values:

    q̄_t = (q_t + q_{t+1}) / 2,        change at t:  q̄_t - q̄_{t-1} = (q_{t+1} - q_{t-1}) / 2

A row's phase follows from whether its run has crossed the line yet and from the sign of the change of S̄ there. A
flat mean counts as falling. Rows are neighbours where they follow one another in the store; at a cadence sparser than
every step the means span that gap, which their attribute `largest_step_gap` tells.

λ₁(K)/n and 2/η belong to gradient descent on half the mean squared error. With cross-entropy the sharpness is that of
the Hessian alone, and other update rules have other lines, in the attributes of their runs.

Sources: Cohen et al. 2021 (arXiv 2103.00065) for progressive sharpening and the edge; Jiang, Cohen, Li 2025
(arXiv 2507.12837), figure 1c, for the alignment gained while the sharpness falls.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.alignment import kernel_target_alignment
from analysis.rows import Runs, described, one_row_per_run, require, runs_of

Array = NDArray[np.float64]

PHASES = ("progressive_sharpening", "stable", "eos_rising", "eos_falling", "diverged")
PROGRESSIVE_SHARPENING, STABLE, EOS_RISING, EOS_FALLING, DIVERGED = range(len(PHASES))


def phases(ds: xr.Dataset) -> xr.Dataset:
    """Per row: sharpness, its line, KTA, their two-step means and changes, and the phase.

    | phase | rows |
    |---|---|
    | progressive_sharpening | before the first row above the line, S̄ rising |
    | stable | before the first row above the line, S̄ falling or flat |
    | eos_rising, eos_falling | from the first row above the line on, by the change of S̄ |
    | diverged | of a run with that status, from the last upward crossing of the line on |

    The first and the last row of a run have no change of their own and take the trend of the row beside them; a run
    of fewer than three rows has no trend and counts as flat.

    Args:
        ds: the group `scalars` of a sweep or a run (`ntk_sharpness`, `target_energy`, `frobenius_norm`, `target`).

    Returns:
        `sharpness`, `line`, `kta`, `sharpness_mean`, `kta_mean`, `sharpness_change`, `kta_change` and `phase`, each
        (s,). Means are NaN at the last row of a run, changes at the first and the last.

    Raises:
        InputError: if a variable is missing, or there are no rows.
    """
    require(ds, "phases", "ntk_sharpness", "learning_rate")
    runs = runs_of(ds)
    kta = kernel_target_alignment(ds)
    sharpness, line = xr.broadcast(ds["ntk_sharpness"], 2 / ds["learning_rate"])
    sharpness_mean, kta_mean, sharpness_change, kta_change, phase = xr.apply_ufunc(
        _by_run,
        sharpness,
        line,
        kta,
        kwargs={"rows_of_runs": runs.rows, "diverged": _diverged(ds, runs)},
        input_core_dims=[[runs.dim]] * 3,
        output_core_dims=[[runs.dim]] * 5,
        dask="parallelized",
        output_dtypes=[np.float64] * 4 + [np.int8],
        dask_gufunc_kwargs={"allow_rechunk": True},
    )
    gap = max(int(np.diff(runs.step[rows]).max(initial=0)) for rows in runs.rows)
    mean_of = "Two-step mean (q_t + q_{t+1}) / 2 of recorded values of the"
    change_of = "Change q̄_t - q̄_{t-1} of the two-step mean of the"
    result = xr.Dataset(
        {
            "sharpness": described(sharpness, "NTK sharpness", "λ₁/n, top eigenvalue of the full nc x nc kernel."),
            "line": described(line, "stability line", "2/η, the line of gradient descent with step size η."),
            "kta": kta,
            "sharpness_mean": described(sharpness_mean, "NTK sharpness, two-step mean", f"{mean_of} NTK sharpness."),
            "kta_mean": described(kta_mean, "KTA, two-step mean", f"{mean_of} kernel target alignment."),
            "sharpness_change": described(sharpness_change, "change of the NTK sharpness", f"{change_of} sharpness."),
            "kta_change": described(kta_change, "change of the KTA", f"{change_of} kernel target alignment."),
            "phase": described(
                phase,
                "phase of training",
                "By the first crossing of the line 2/η and the sign of the change of the two-step mean sharpness; "
                "diverged: from the last upward crossing of the line on, in a run that diverged.",
            ),
        },
        attrs=ds.attrs,
    )
    for name in ("sharpness_mean", "kta_mean", "sharpness_change", "kta_change"):
        result[name].attrs["largest_step_gap"] = gap
    result["phase"].attrs |= {"flag_values": list(range(len(PHASES))), "flag_meanings": " ".join(PHASES)}
    return result


def phase_summary(ds: xr.Dataset) -> xr.Dataset:
    """Per run: whether and when it crossed the line, and the KTA gained while the sharpness rose and while it fell.

    Only rows in the phases eos_rising and eos_falling that have a change of their own count, so rows before the
    crossing and rows of the final divergence do not. A row stands for (step_{t+1} - step_{t-1}) / 2 steps, one where
    every step is recorded.

    Args:
        ds: as for `phases`, or its result.

    Returns:
        Along `run`, with the run's axes and `status` as coordinates: `crossed`, `crossing_step` (-1 if it never did),
        `kta_change_rising`, `kta_change_falling`, `steps_rising`, `steps_falling`, `kta_gain_rising`,
        `kta_gain_falling` (change per step; NaN without such steps), `max_sharpness`, `final_sharpness_mean` (of the
        last two rows; NaN for a single row) and `n_valid`, the rows that count.

    Raises:
        InputError: if a variable is missing, or there are no rows.
    """
    rows = ds if "phase" in ds else phases(ds)
    runs = runs_of(rows)
    columns = xr.apply_ufunc(
        _summary,
        *(rows[name] for name in ("sharpness", "line", "sharpness_mean", "kta_change", "phase")),
        kwargs={"rows_of_runs": runs.rows, "step": runs.step},
        input_core_dims=[[runs.dim]] * 5,
        output_core_dims=[["run"]] * len(_SUMMARY),
        exclude_dims={runs.dim},
        dask="parallelized",
        output_dtypes=[dtype for dtype, _, _ in _SUMMARY.values()],
        dask_gufunc_kwargs={"allow_rechunk": True, "output_sizes": {"run": len(runs.rows)}},
    )
    variables = {
        name: described(column.drop_vars(column.coords), long_name, description)
        for column, (name, (_, long_name, description)) in zip(columns, _SUMMARY.items(), strict=True)
    }
    of_run = one_row_per_run(rows, runs, [positions[0] for positions in runs.rows])
    coords = of_run.drop_vars([*of_run.data_vars, *({"step", "loss"} & set(of_run.coords))]).coords
    return xr.Dataset(variables, coords, rows.attrs)


_SUMMARY: dict[str, tuple[type, str, str]] = {
    "crossed": (np.bool_, "crossed the line", "Whether the NTK sharpness was ever above 2/η."),
    "crossing_step": (np.int64, "step of the first crossing", "First recorded step with sharpness > 2/η; -1 if none."),
    "kta_change_rising": (np.float64, "KTA change while sharpness rises", "Σ of KTA changes over rows eos_rising."),
    "kta_change_falling": (np.float64, "KTA change while sharpness falls", "Σ of KTA changes over rows eos_falling."),
    "steps_rising": (np.float64, "steps of rising sharpness", "Σ (step_{t+1} - step_{t-1}) / 2 over rows eos_rising."),
    "steps_falling": (
        np.float64, "steps of falling sharpness", "Σ (step_{t+1} - step_{t-1}) / 2 over rows eos_falling.",
    ),
    "kta_gain_rising": (np.float64, "KTA gain per rising step", "kta_change_rising / steps_rising; NaN if none."),
    "kta_gain_falling": (np.float64, "KTA gain per falling step", "kta_change_falling / steps_falling; NaN if none."),
    "max_sharpness": (np.float64, "largest NTK sharpness", "Largest recorded λ₁/n of the run."),
    "final_sharpness_mean": (
        np.float64, "final NTK sharpness", "Mean NTK sharpness of the run's last two rows; NaN for a single row.",
    ),
    "n_valid": (np.int64, "rows that count", "Rows in eos_rising or eos_falling whose KTA change is known."),
}  # fmt: skip


def _diverged(ds: xr.Dataset, runs: Runs) -> list[bool]:
    if "status" not in ds.coords:
        return [False] * len(runs.rows)
    status = np.broadcast_to(np.asarray(ds["status"]), runs.step.shape)
    return [status[rows[0]] == "diverged" for rows in runs.rows]


def _by_run(
    sharpness: Array, line: Array, kta: Array, *, rows_of_runs: Sequence[NDArray[np.intp]], diverged: Sequence[bool]
) -> tuple[Array, Array, Array, Array, NDArray[np.int8]]:
    """Means, changes and phases (s,) of all runs, each run by itself."""
    means = np.full((2, len(sharpness)), np.nan)
    changes = np.full((2, len(sharpness)), np.nan)
    phase = np.empty(len(sharpness), dtype=np.int8)
    for rows, is_diverged in zip(rows_of_runs, diverged, strict=True):
        for series, values in enumerate((sharpness[rows], kta[rows])):
            mean = (values[:-1] + values[1:]) / 2
            means[series, rows[:-1]] = mean
            changes[series, rows[1:-1]] = np.diff(mean)
        phase[rows] = _phase(sharpness[rows] > line[rows], changes[0, rows] > 0, is_diverged)
    return means[0], means[1], changes[0], changes[1], phase


def _phase(above: NDArray[np.bool_], rising: NDArray[np.bool_], diverged: bool) -> NDArray[Any]:
    """Phases of one run's rows (s,) from which of them lie above the line and where the mean sharpness rises."""
    if len(rising) > 2:
        rising = np.concatenate([rising[1:2], rising[1:-1], rising[-2:-1]])
    crossed = np.logical_or.accumulate(above)
    before = np.where(rising, PROGRESSIVE_SHARPENING, STABLE)
    after = np.where(rising, EOS_RISING, EOS_FALLING)
    phase = np.where(crossed, after, before)
    if diverged and above.any():
        upward = above & ~np.concatenate([[False], above[:-1]])
        phase[np.flatnonzero(upward)[-1] :] = DIVERGED
    return phase


def _summary(
    sharpness: Array,
    line: Array,
    sharpness_mean: Array,
    kta_change: Array,
    phase: NDArray[np.int8],
    *,
    rows_of_runs: Sequence[NDArray[np.intp]],
    step: NDArray[np.int64],
) -> tuple[NDArray[Any], ...]:
    """The columns of `_SUMMARY`, each with one entry per run."""
    table: dict[str, NDArray[Any]] = {
        name: np.empty(len(rows_of_runs), dtype) for name, (dtype, _, _) in _SUMMARY.items()
    }
    for run, rows in enumerate(rows_of_runs):
        above = sharpness[rows] > line[rows]
        table["crossed"][run] = above.any()
        table["crossing_step"][run] = step[rows[above.argmax()]] if above.any() else -1
        width = np.zeros(len(rows))
        width[1:-1] = (step[rows[2:]] - step[rows[:-2]]) / 2
        counts = np.isfinite(kta_change[rows])
        for name, flag in (("rising", EOS_RISING), ("falling", EOS_FALLING)):
            chosen = counts & (phase[rows] == flag)
            change, steps = kta_change[rows][chosen].sum(), width[chosen].sum()
            table[f"kta_change_{name}"][run] = change
            table[f"steps_{name}"][run] = steps
            table[f"kta_gain_{name}"][run] = change / steps if steps else np.nan
        table["max_sharpness"][run] = sharpness[rows].max()
        table["final_sharpness_mean"][run] = sharpness_mean[rows[-2]] if len(rows) > 1 else np.nan
        table["n_valid"][run] = (counts & np.isin(phase[rows], (EOS_RISING, EOS_FALLING))).sum()
    return tuple(table.values())
