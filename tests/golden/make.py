"""Writes the golden store of a format version; it is made once, kept in git, and read for ever.

python tests/golden/make.py tests/golden/format-1

Its numbers follow from names and positions, so that a test in any language can compute them, and are exact in
float32. What a machine would add (its name, the time) is left out: the same code writes the same bytes.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from pipeline.store import Writer

DIMS = {
    "sample": 4, "sample2": 4, "output": 2, "output2": 2, "eig": 3, "hessian_eig": 1, "parameter_index": 6, "layer": 2,
}  # fmt: skip
KERNEL = ["eigenvalue", "eigenvector", "eigenvalue_residual", "solver_iterations"]
SCALARS = ["ntk_sharpness", "frobenius_norm", "trace", "target_energy"]
TRAIN = ["loss", "accuracy", "grad_norm", "wall_time", "seconds_kernel", "seconds_commit"]
FULL = {
    "hessian": ["hessian_eigenvalue", "hessian_residual", "hessian_products"],
    "scalars": [*SCALARS, *(f"conjugate_{name}" for name in SCALARS)],
    "snapshots": ["ntk", "parameter", *KERNEL, "prediction", *SCALARS, "ntk_layer", "ntk_full", "conjugate_ntk",
                  *(f"conjugate_{name}" for name in (*KERNEL, *SCALARS))],
    "spectra": [*KERNEL, "prediction", *(f"conjugate_{name}" for name in KERNEL)],
    "train": TRAIN,
}  # fmt: skip
PLAIN = {"scalars": SCALARS, "train": TRAIN}
EVERY = {"hessian": 5, "scalars": 2, "snapshots": 5, "spectra": 3, "train": 1}

# name -> learning rate, seed, variables of each group, last step, final status
RUNS = {
    "lr-0.5_seed-0_complete": (0.5, 0, FULL, 10, "complete"),
    "lr-2.0_seed-0_diverged": (2.0, 0, PLAIN, 3, "diverged"),
    "lr-0.5_seed-1_growing": (0.5, 1, PLAIN, 4, None),
}
CAPACITY = 20


def values(name: str, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Entry i, in C order, of a variable at a step: ((sum of the name's bytes + 7 step + 3 i) mod 41 - 20) / 8."""
    start = sum(name.encode()) + 7 * step
    return ((start + 3 * np.arange(int(np.prod(shape)))) % 41 - 20).reshape(shape) / 8


def integers(name: str, step: int) -> int:
    """The same of a whole number: (sum of the name's bytes + 7 step) mod 41."""
    return (sum(name.encode()) + 7 * step) % 41


def probe(seed: int) -> dict[str, np.ndarray]:
    """The examples of a run."""
    n, c = DIMS["sample"], DIMS["output"]
    return {
        "sample_index": np.arange(n) + seed,
        "input": values("input", seed, (n, 2, 3)).astype("float32"),
        "target": values("target", seed, (n, c)).astype("float32"),
    }


def shape(name: str) -> tuple[int, ...]:
    """Shape of one row of a variable."""
    n, c, k = DIMS["sample"], DIMS["output"], DIMS["eig"]
    name = name.removeprefix("conjugate_")
    return {
        "ntk": (n, n), "ntk_layer": (DIMS["layer"], n, n), "ntk_full": (n, c, n, c), "eigenvalue": (k,),
        "eigenvector": (n, k), "eigenvalue_residual": (k,), "prediction": (n, c),
        "parameter": (DIMS["parameter_index"],), "hessian_eigenvalue": (1,), "hessian_residual": (1,),
    }.get(name, ())  # fmt: skip


def row(names: list[str], step: int, learning_rate: float, seed: int) -> dict[str, object]:
    """What a group that has these variables gets at a step."""
    own = {"step": step, "learning_rate": learning_rate, "seed": seed}
    whole = ("solver_iterations", "hessian_products")
    return own | {
        name: integers(name, step) if name.endswith(whole) else values(name, step, shape(name))
        for name in ["loss", *names]
    }


def checkpoint(step: int) -> bytes:
    """A safetensors file of one tensor: length of the header, header, bytes."""
    tensor = values("weight", step, (6,)).astype("<f4").tobytes()
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, len(tensor)]}
    header = json.dumps({"__metadata__": {"step": str(step)}, "model.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + tensor


def make(root: str | Path) -> None:
    """Write the store."""
    nowhere = (
        patch.object(socket, "gethostname", lambda: "nowhere"), patch.object(os, "getpid", lambda: 1),
        patch.object(time, "time", lambda: 0.0), patch.object(time, "monotonic", lambda: 0.0),
        patch.object(time, "gmtime", lambda: time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0))),
    )  # fmt: skip
    for patched in nowhere:
        patched.start()
    for name, (learning_rate, seed, groups, last, status) in RUNS.items():
        with Writer.open(
            root,
            name,
            identity={"learning_rate": learning_rate, "seed": seed, "process": "discrete", "model": {"name": "mlp"}},
            attrs={
                "title": "The golden store", "study": "golden", "learning_rate": learning_rate, "seed": seed,
                "axes": {"learning_rate": learning_rate, "seed": seed}, "created_at": "2026-01-01T00:00:00+00:00",
                "provenance": {"versions": {"torch": "none"}, "threads": 1, "device": "cpu"},
                "environment_changes": [],
            },
            dims=DIMS,
            groups=groups,
            capacity=dict.fromkeys(groups, CAPACITY),
            probe=probe(seed),
            dtype="float32",
            attributes={"snapshots/ntk_layer": {"names": ["weight", "bias"]},
                        "snapshots/parameter": {"names": ["weight", "bias"], "shapes": [[2, 2], [2]]}},
        ) as writer:  # fmt: skip
            for step in range(last + 1):
                writer.append(step, {group: row(names, step, learning_rate, seed)
                                     for group, names in groups.items() if step % EVERY[group] == 0})  # fmt: skip
                if step % 3 == 2:
                    writer.commit(checkpoint(step))
            writer.commit(checkpoint(last))
            if status is not None:
                writer.finish(status, "steps" if status == "complete" else f"loss at step {last + 1} is inf")
    for patched in nowhere:
        patched.stop()


if __name__ == "__main__":
    make(sys.argv[1])
