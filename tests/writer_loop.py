"""A torch-free training loop for tests of the store: its rows follow from the step, so every reader can check them.

python tests/writer_loop.py ROOT run STEPS     write the run to its end, with commits at random moments
python tests/writer_loop.py ROOT hold          hold the run's lease until stdin closes
"""

import random
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.schema import GROUPS
from pipeline.store import Run, Writer, find_run

RUN = "lr-0.1_seed-0"
N, C, K, P = 6, 2, 3, 7
DIMS = {"sample": N, "sample2": N, "output": C, "eig": K, "hessian_eig": 2, "parameter_index": P}
CADENCES = {"hessian": 7, "train": 1, "scalars": 2, "spectra": 3, "snapshots": 5}


def probe(seed: int = 0) -> dict[str, np.ndarray]:
    """The examples of a run."""
    rng = np.random.default_rng(seed)
    return {
        "sample_index": np.arange(N),
        "input": rng.normal(size=(N, 4)).astype(np.float32),
        "target": rng.normal(size=(N, C)).astype(np.float32),
    }


def row(group: str, step: int) -> dict[str, Any]:
    """What `group` gets at `step`."""
    rng = np.random.default_rng([step, 1])
    kernel = rng.normal(size=(N, N))
    values = {
        "step": step,
        "learning_rate": 0.1,
        "seed": 0,
        "loss": 1 / (step + 1),
        "accuracy": 0.5,
        "grad_norm": float(rng.normal()),
        "wall_time": float(step),
        **{name: float(step) for name in GROUPS["train"] if name.startswith("seconds_")},
        "ntk": kernel,
        "parameter": rng.normal(size=P),
        "eigenvalue": np.linalg.eigvalsh(kernel @ kernel.T)[:K],
        "eigenvector": rng.normal(size=(N, K)),
        "eigenvalue_residual": np.abs(rng.normal(size=K)),
        "solver_iterations": step + 1,
        "prediction": rng.normal(size=(N, C)),
        "hessian_eigenvalue": rng.normal(size=2),
        "hessian_residual": np.abs(rng.normal(size=2)),
        "hessian_products": step + 2,
        "ntk_sharpness": float(rng.normal()),
        "frobenius_norm": float(rng.normal()),
        "trace": float(np.trace(kernel)),
        "target_energy": float(rng.normal()),
    }
    return {name: values[name] for name in ("step", "learning_rate", "seed", "loss", *GROUPS.get(group, ()))}


def rows(step: int, groups: tuple[str, ...] = tuple(GROUPS)) -> dict[str, dict[str, Any]]:
    """Rows of all groups that are due at `step`."""
    return {group: row(group, step) for group in groups if step % CADENCES[group] == 0}


def open_writer(root: Path | str, **options: Any) -> Writer:
    """The writer of a run, with the defaults of these tests."""
    groups = options.pop("groups", tuple(GROUPS))  # names, or the variables of each
    variables = groups if isinstance(groups, dict) else {group: list(GROUPS[group]) for group in groups}
    options = {
        "run_id": RUN,
        "identity": {"model": "none"},
        "attrs": {"title": "a test", "learning_rate": 0.1, "seed": 0},
        "dims": DIMS,
        "groups": variables,
        "capacity": dict.fromkeys(groups, 50),
        "probe": probe(),
        "dtype": "float32",
    } | options
    return Writer.open(root, options.pop("run_id"), **options)


def next_step(writer: Writer) -> int:
    """The step that the run lacks."""
    return 0 if writer.last_step is None else writer.last_step + 1


def advance(writer: Writer, stop: int, every: int = 1000, groups: tuple[str, ...] = tuple(GROUPS)) -> None:
    """Go on to step `stop`, exclusive, with a commit after every `every` steps and at the end."""
    for step in range(next_step(writer), stop):
        writer.append(step, rows(step, groups))
        if (step + 1) % every == 0 and step + 1 < stop:
            writer.commit(checkpoint(step))
    writer.commit(checkpoint(stop - 1))


def checkpoint(step: int) -> bytes:
    """What continues the run after `step`."""
    return f"step {step}".encode()


def write_run(root: Path | str, steps: int = 12, *, every: int = 4, status: str | None = "complete",
              **options: Any) -> Run:  # fmt: skip
    """Write a run, or go on with one, to `steps` rows of `train`; left growing if `status` is None."""
    groups = options.get("groups", tuple(GROUPS))
    with open_writer(root, **options) as writer:
        advance(writer, steps, every, groups)
        if status is not None:
            writer.finish(status, "steps")
    return find_run(root, options.get("run_id", RUN))


def assert_rows_are_those_of_their_steps(run: Run) -> int:
    """Compare every visible value with what was written; returns the number of rows."""
    for group, length in run.lengths.items():
        columns = {name: run.read(f"{group}/{name}") for name in run.arrays(group) if name != "digest"}
        assert_columns_are_those_of_their_steps(group, length, columns)
    return sum(run.lengths.values())


def assert_columns_are_those_of_their_steps(group: str, length: int, columns: dict[str, np.ndarray]) -> None:
    """Compare the first `length` rows of arrays of a group with what was written."""
    expected = [_row(group, CADENCES[group] * index) for index in range(length)]
    for name, column in columns.items():
        assert len(column) == length, (group, name, len(column), length)
        if length:
            there = np.stack([values[name] for values in expected]).astype(column.dtype)
            np.testing.assert_array_equal(column, there, err_msg=f"{group}/{name}")


_row = cache(row)


def planned_rows(group: str, stop: int) -> int:
    """Rows that `group` has after the steps below `stop`."""
    return -(-stop // CADENCES[group])


def record(root: Path | str, groups: dict[str, list[str]], committed: list[int]) -> None:
    """The life of a run: created, committed twice, outgrown, finished, taken up again, committed, finished.

    Goes on from wherever the run stands; the steps that are safe are added to `committed`.
    """
    with open_writer(root, groups=groups, capacity=dict.fromkeys(groups, 1)) as writer:
        for stop in (3, 6):
            if writer.status == "running" and next_step(writer) < stop:
                advance(writer, stop, groups=tuple(groups))
                committed.append(stop)
        if writer.status == "running":
            writer.finish("complete", "loss")
    with open_writer(root, groups=groups) as writer:
        if next_step(writer) == 6:
            writer.reopen(dict.fromkeys(groups, 4))
            advance(writer, 8, groups=tuple(groups))
            committed.append(8)
        writer.finish("complete", "steps")


def main(root: str, what: str, steps: str = "0") -> None:
    """Be the other process of a test."""
    with open_writer(root) as writer:
        print("open", flush=True)
        if what == "hold":
            sys.stdin.read()
            return
        go_on(writer, int(steps))


def go_on(writer: Writer, steps: int, groups: tuple[str, ...] = tuple(GROUPS)) -> None:
    """To the end, with commits at random moments."""
    dice = random.Random()
    while next_step(writer) < steps:
        advance(writer, min(next_step(writer) + dice.randint(1, 4), steps), groups=groups)
        time.sleep(0.02)  # so that the test's kills, not the disk, decide how far it comes
    writer.finish("complete", "steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
