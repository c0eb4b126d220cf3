"""A small store that looks like a real one, made without torch.

Each run is gradient descent, in float64 numpy, on a tanh network with one hidden layer whose NTK is known in closed
form, so that losses, kernels, eigenpairs and scalars belong together:

    f = tanh(X W) A,   K_cd = δ_cd H Hᵀ + (D_c D_dᵀ) ∘ X Xᵀ,   H = tanh(X W),  D_c = (1 - H²) diag(A[:, c])
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from pipeline import schema
from pipeline.cadence import Cadence
from pipeline.store import Writer

CADENCES = {
    "hessian": Cadence(every=10),
    "snapshots": Cadence(log=4),
    "spectra": Cadence(every=5),
    "scalars": Cadence(every=1),
}
FEATURES, WIDTH = 3, 8


def run_id(learning_rate: float, seed: int, **axes: Any) -> str:
    """Name of a run of a mock store."""
    return "_".join([f"lr-{learning_rate}", f"seed-{seed}", *(f"{name}-{value}" for name, value in axes.items())])


def mock_store(
    root: str | Path,
    *,
    learning_rates: Iterable[float] = (0.1, 1.2),
    seeds: Iterable[int] = (0, 1),
    axes: Mapping[str, Iterable[Any]] | None = None,
    diverged: Iterable[tuple[float, int]] = (),
    growing: Iterable[tuple[float, int]] = (),
    **options: Any,
) -> Path:
    """Write a run for every point of the grid.

    Args:
        root: folder of the store.
        learning_rates: one axis of the grid.
        seeds: another one.
        axes: further axes, such as {"model.width": [8, 16]}.
        diverged: (learning rate, seed) of runs that end as diverged.
        growing: (learning rate, seed) of runs that are not finished.
        options: as `mock_run` takes them.
    """
    further = {name: list(values) for name, values in (axes or {}).items()}
    for learning_rate, seed, *values in product(learning_rates, seeds, *further.values()):
        point = (learning_rate, seed)
        end = "diverged" if point in set(diverged) else None if point in set(growing) else "complete"
        mock_run(root, learning_rate, seed, axes=dict(zip(further, values, strict=True)), end=end, **options)
    return Path(root)


def mock_run(
    root: str | Path,
    learning_rate: float,
    seed: int,
    *,
    steps: int = 40,
    n: int = 12,
    c: int = 1,
    k: int = 5,
    axes: Mapping[str, Any] | None = None,
    cadences: Mapping[str, Cadence] = CADENCES,
    end: Literal["complete", "diverged"] | None = "complete",
    attrs: Mapping[str, Any] | None = None,
    conjugate: bool = False,
    layers: bool = False,
    full: bool = False,
    test: int = 0,
) -> Path:
    """Write one run, or go on with one that was left unfinished.

    Args:
        root: folder of the store.
        learning_rate: step size η.
        seed: of the data and the initialisation.
        steps: updates to make.
        n: probe examples.
        c: outputs.
        k: eigenpairs.
        axes: values of further axes; `model.width` is obeyed.
        cadences: steps of each group; `train` has every step.
        end: how the run ends; None leaves it unfinished after `steps`.
        attrs: further root attributes.
        conjugate: record the conjugate kernel H Hᵀ too.
        layers: record the parts of the NTK that belong to W and to A.
        full: record the NTK of all pairs of outputs.
        test: held-out examples.

    Returns:
        Folder of the run.
    """
    axes = dict(axes or {})
    width = axes.get("model.width", WIDTH)
    identity = {
        "learning_rate": learning_rate,
        "seed": seed,
        "process": "discrete",
        "data": {"name": "mock", "n": n},
        "model": {"name": "mlp", "width": width, "depth": 1},
        "loss": {"name": "mse"},
        "update": {"name": "gd"},
        "record": {"eigenpairs": k, "loss_levels": [0.5, 0.1]},
        "compute": {"threads": 1, "device": "cpu"},
    }
    rng = np.random.default_rng(seed)
    x, rule = rng.normal(size=(n, FEATURES)), rng.normal(size=(FEATURES, c))
    unseen = np.random.default_rng([seed, 1]).normal(size=(test, FEATURES))
    y, unseen_y = (np.where(np.sin(2 * inputs @ rule) > 0, 1.0, -1.0) for inputs in (x, unseen))
    w, a = rng.normal(size=(FEATURES, width)) / np.sqrt(FEATURES), rng.normal(size=(width, c)) / np.sqrt(width)
    name = run_id(learning_rate, seed, **axes)
    others = ["conjugate"] if conjugate else []
    groups = dict(schema.GROUPS)
    if others or layers or full or test:
        groups |= schema.recorded(others, layers, full, test=schema.HELD_OUT if test else ())
    probe = {"sample_index": np.arange(n), "input": x.astype(np.float32), "target": y.astype(np.float32)}
    if test:
        probe |= {"test_sample_index": np.arange(n, n + test), "test_input": unseen.astype(np.float32),
                  "test_target": unseen_y.astype(np.float32)}  # fmt: skip
    # A store for a test need not survive a power cut, and the hundreds of fsyncs of a run take most of its time.
    with patch("os.fsync"), Writer.open(
        root,
        name,
        identity=identity,
        attrs={
            "title": "A mock study",
            "study": "mock",
            "learning_rate": learning_rate,
            "seed": seed,
            "axes": {"learning_rate": learning_rate, "seed": seed, **axes},
            "family": f"family-{name}",
            "created_at": "2026-01-02T03:04:05+00:00",
            "provenance": {
                "git_commit": "0" * 40, "git_dirty": False, "threads": 1, "device": "cpu", "host": "nowhere",
                "command": "mock", "dataset_digest": "0" * 32, "cpu": "none",
                "versions": {"python": "3.11", "torch": "2.13.0"},
            },
            **(attrs or {}),
        },
        dims={
            "layer": 2, "sample": n, "sample2": n, "output": c, "output2": c, "eig": k, "hessian_eig": 1,
            "parameter_index": w.size + a.size, "test_sample": test, "test_sample2": test,
        },
        groups={name: list(variables) for name, variables in groups.items()},
        attributes={"snapshots/ntk_layer": {"names": ["W", "A"]}},
        capacity={group: steps + 1 for group in schema.GROUPS},
        probe=probe,
        dtype="float32",
    ) as writer:  # fmt: skip
        for step in range(steps + 1):
            if writer.last_step is None or step > writer.last_step:
                due = {group for group, cadence in cadences.items() if cadence.due(step) or step == steps}
                rows = measure(x, y, w, a, k, due, step=step, learning_rate=learning_rate, seed=seed)
                if test:
                    values = measure_held_out(x, unseen, unseen_y, w, a)
                    for group in due & schema.MORE.keys():
                        rows[group] |= {name: values[name] for name in schema.variables_of(group, values)}
                writer.append(step, rows)
            w, a = descend(x, y, w, a, learning_rate)
        writer.commit(b"")
        if end is not None:
            writer.finish(end, "steps" if end == "complete" else "loss is not finite")
        return writer.directory.path


def descend(x: Any, y: Any, w: Any, a: Any, learning_rate: float) -> tuple[Any, Any]:
    """One step of gradient descent on L = (1/2n) ‖f - y‖²."""
    h = np.tanh(x @ w)
    residual = (h @ a - y) / len(x)
    return w - learning_rate * x.T @ ((1 - h**2) * (residual @ a.T)), a - learning_rate * h.T @ residual


def measure(x: Any, y: Any, w: Any, a: Any, k: int, due: set[str], **row: Any) -> dict[str, dict[str, Any]]:
    """The rows of the groups `due`, and of `train`."""
    n, c = y.shape
    h = np.tanh(x @ w)
    f = h @ a
    d = (1 - h**2)[:, :, None] * a  # (n, width, c)
    full = np.einsum("ahc,bhd->acbd", d, d) * (x @ x.T)[:, None, :, None] + np.einsum("ab,cd->acbd", h @ h.T, np.eye(c))
    kernel = np.einsum("acbc->ab", full)
    measured = {
        **of_kernel(kernel, y, k),
        **{f"conjugate_{name}": value for name, value in of_kernel(h @ h.T, y, k).items()},
        "ntk_full": full,
        "ntk_layer": np.stack([kernel - c * h @ h.T, c * h @ h.T]),
        "parameter": np.concatenate([w.ravel(), a.ravel()]),
        "prediction": f,
        "ntk_sharpness": np.linalg.eigvalsh(full.reshape(n * c, n * c))[-1] / n,
        "accuracy": np.mean(np.sign(f) == y),
        "grad_norm": np.linalg.norm(np.concatenate([part.ravel() for part in descend(x, y, w, a, 1.0)])
                                    - np.concatenate([w.ravel(), a.ravel()])),
        "wall_time": 0.01 * row["step"],
        **{name: 0.001 for name in schema.GROUPS["train"] if name.startswith("seconds_")},
        "hessian_residual": np.zeros(1),
        "hessian_products": 4,
    }  # fmt: skip
    measured["hessian_eigenvalue"] = measured["ntk_sharpness"][None]  # of the Gauss-Newton matrix
    row["loss"] = np.sum((f - y) ** 2) / (2 * n)
    return {group: {**{name: measured[name] for name in schema.variables_of(group, measured)}, **row}
            for group in due | {"train"}}  # fmt: skip


def measure_held_out(x: Any, unseen: Any, y: Any, w: Any, a: Any) -> dict[str, Any]:
    """What is recorded on examples (m, features) with targets (m, c) that are not trained on."""

    def summed(one: Any, two: Any) -> Any:
        """The kernel between two sets of examples, summed over outputs."""
        h = [np.tanh(inputs @ w) for inputs in (one, two)]
        d = [(1 - features**2)[:, :, None] * a for features in h]
        return np.einsum("ahc,bhc->ab", *d) * (one @ two.T) + y.shape[1] * h[0] @ h[1].T

    f = np.tanh(unseen @ w) @ a
    return {
        "ntk_test": summed(unseen, unseen),
        "ntk_cross": summed(unseen, x),
        "prediction_test": f,
        "test_loss": np.sum((f - y) ** 2) / (2 * len(y)),
        "test_accuracy": np.mean(np.sign(f) == y),
    }


def of_kernel(kernel: Any, y: Any, k: int) -> dict[str, Any]:
    """What is recorded of one kernel (n, n)."""
    values, vectors = np.linalg.eigh(kernel)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    largest = np.abs(vectors).argmax(axis=0)
    return {
        "ntk": kernel,
        "eigenvalue": values,
        "eigenvector": vectors * np.sign(vectors[largest, np.arange(k)]),
        "eigenvalue_residual": np.linalg.norm(kernel @ vectors - vectors * values, axis=0),
        "solver_iterations": 0,
        "ntk_sharpness": values[0] / len(kernel),
        "frobenius_norm": np.linalg.norm(kernel),
        "trace": np.trace(kernel),
        "target_energy": np.einsum("nc,nc->", y, kernel @ y),
    }
