"""A sweep that was never trained: the Dataset that `analysis.open_sweep` returns, made of random kernels.

Eigenpairs and scalars come from the float64 kernel and the kernel is rounded afterwards, as when recording. The
learning rates are a grid with two seeds each; the last run diverged after two rows.
"""

from collections.abc import Sequence

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from pipeline.schema import CONVENTIONS, GROUPS, PROBE, ROW, Variable

LEARNING_RATES = (0.1, 0.4)
SEEDS = (0, 1)
STEPS = (0, 1, 10, 100)
DIVERGED = (0.8, 0)
DIVERGED_ROWS = 2
BLOCK_ROWS = 3  # rows that one block of a lazy array holds; blocks end with their run


def mock_kernel(rng: np.random.Generator, n: int, y: np.ndarray, pull: float) -> np.ndarray:
    """A random positive semidefinite kernel (n, n), drawn towards y yᵀ by `pull`."""
    features = rng.standard_normal((n, 2 * n)) / np.sqrt(2 * n)
    return features @ features.T + pull * y @ y.T / n


def kernel_row(kernel: np.ndarray, y: np.ndarray, k: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """What a recorder keeps of one kernel (n, n): scalars and k eigenpairs of it as it is, itself rounded."""
    values, vectors = np.linalg.eigh(kernel)
    return {
        "ntk": kernel.astype(dtype),
        "eigenvalue": values[::-1][:k],
        "eigenvector": vectors[:, ::-1][:, :k].astype(dtype),
        "eigenvalue_residual": np.zeros(k),
        "solver_iterations": np.int64(0),
        "ntk_sharpness": values[-1] / len(kernel),
        "frobenius_norm": np.linalg.norm(kernel),
        "trace": np.trace(kernel),
        "target_energy": np.einsum("ic,ij,jc->", y, kernel, y),
    }


def mock_sweep(
    group: str = "snapshots",
    *,
    n: int = 6,
    c: int = 1,
    k: int = 4,
    seed: int = 0,
    dtype: type = np.float32,
    steps: Sequence[int] = STEPS,
) -> xr.Dataset:
    """The lazy Dataset of a sweep of five runs, the last of them diverged.

    Args:
        group: snapshots, spectra, scalars or train.
        n, c, k: examples, outputs, eigenpairs.
        seed: of the random numbers.
        dtype: of kernels and eigenvectors; float64 makes them exact.
        steps: steps of each row of a run that did not diverge.
    """
    rng = np.random.default_rng(seed)
    runs = [*((rate, s, "complete", len(steps)) for rate in LEARNING_RATES for s in SEEDS)]
    runs.append((*DIVERGED, "diverged", DIVERGED_ROWS))
    rows: list[dict[str, np.ndarray]] = []
    index, names, states, losses, targets = [], [], [], [], []
    for rate, s, status, length in runs:
        y = rng.choice([-1.0, 1.0], (n, c))
        y[0] = -y[1]  # both labels occur
        for position, step in enumerate(steps[:length]):
            kernel = mock_kernel(rng, n, y, pull=rate * position)
            rows.append(
                kernel_row(kernel, y, k, dtype)
                | {
                    "prediction": (y * (1 - 0.5**position)).astype(dtype),
                    "parameter": rng.standard_normal(5).astype(dtype),
                    "accuracy": np.float64(position > 0),
                    "grad_norm": np.float64(0.5**position),
                    "wall_time": np.float64(step),
                    **{name: np.float64(0) for name in GROUPS["train"] if name.startswith("seconds_")},
                }
            )
            index.append((rate, s, step))
            names.append(f"lr-{rate}_seed-{s}")
            states.append(status)
            losses.append((0.5 if status == "complete" else 2.0) ** position * (1 + 0.1 * s) / 2)
            targets.append(y)
    ends = np.flatnonzero(np.array(index)[1:, -1] == 0) + 1
    blocks = tuple(
        min(BLOCK_ROWS, len(run) - i) for run in np.split(targets, ends) for i in range(0, len(run), BLOCK_ROWS)
    )
    variables = {}
    for name, variable in GROUPS[group].items():
        stack = np.array(losses) if name == "loss" else np.stack([row[name] for row in rows])
        lazy = da.from_array(stack, chunks=(blocks, *stack.shape[1:]))
        variables[name] = (("snapshot", *variable.dims[1:]), lazy, described(variable))
    # as in a store, the targets of a run are one array, repeated without a copy
    repeated = [
        da.broadcast_to(da.from_array(run[:1].astype(dtype)), run.shape, chunks=(BLOCK_ROWS, n, c))
        for run in np.split(targets, ends)
    ]
    variables["target"] = (("snapshot", "sample", "output"), da.concatenate(repeated), described(PROBE["target"]))
    levels = pd.MultiIndex.from_tuples(index, names=["learning_rate", "seed", "step"])
    coords = {"run": ("snapshot", names), "status": ("snapshot", states)}
    if group != "train":
        coords["loss"] = ("snapshot", np.array(losses), described(ROW["loss"]))
    ds = xr.Dataset(variables, attrs={"Conventions": CONVENTIONS, "group": group})
    return ds.assign_coords(xr.Coordinates.from_pandas_multiindex(levels, "snapshot")).assign_coords(coords)


def described(variable: Variable) -> dict[str, str]:
    """The attributes of a variable of the store."""
    return {"long_name": variable.long_name, "units": variable.units, "description": variable.description}


def with_values(ds: xr.Dataset, **values: np.ndarray) -> xr.Dataset:
    """The dataset with other numbers in some of its variables."""
    return ds.assign({name: ds[name].variable.copy(data=np.asarray(data)) for name, data in values.items()})


def one_run(ds: xr.Dataset, run: str) -> xr.Dataset:
    """The rows of one run as plain xarray opens a group of it: along `step`, lazy row coordinates, no names."""
    rows = ds.isel(snapshot=np.flatnonzero(ds.run == run)).reset_index("snapshot").drop_vars(["run", "status"])
    rows = rows.assign_coords({name: rows[name].chunk() for name in ("learning_rate", "seed", "loss") if name in rows})
    return rows.swap_dims(snapshot="step")
