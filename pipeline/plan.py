"""What `run` would do: how each run of a study stands, the rows and bytes it gets, and the time it takes at most."""

import functools
import heapq
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from pipeline import schema
from pipeline.cadence import row_capacity
from pipeline.config import File, Imported, Record, RunConfig, StochasticGradientDescent, Study, needs_import
from pipeline.console import bytes_text, seconds_text
from pipeline.data import load_data, load_test, needs_download
from pipeline.disk import door
from pipeline.errors import InputError
from pipeline.store import FINAL, LEASE, Run, chain_seed, is_run, read_run, run_path

TIMED_STEPS = 40
# What a worker process needs until its first step, which is mostly the import of torch: 2 to 3 s were measured.
START_SECONDS = 3.0
BASE_BYTES = 300 * 2**20  # of a process that has imported torch


def kernel_bytes(samples: int, outputs: int) -> int:
    """What a row with a kernel in memory takes at its peak: in float32 and float64, and as a matrix of all outputs."""
    return 24 * samples**2 + (12 * (samples * outputs) ** 2 if outputs > 1 else 0)


@dataclass(frozen=True)
class Planned:
    """What one run will hold, and how far it is.

    Attributes:
        config: the run.
        rows: the most rows of each group.
        samples: n.
        outputs: c.
        parameters: p, or None where only the imported model knows it; `nbytes` is then without parameters and without
            the parts of the kernel by tensor.
        nbytes: of all arrays, uncompressed.
        state: new, resume (unfinished), continue (finished, and the study asks for more), running or done.
        steps_left: updates until `stop.steps`.
    """

    config: RunConfig
    rows: dict[str, int]
    samples: int
    outputs: int
    parameters: int | None
    nbytes: int
    state: str
    steps_left: int

    @property
    def memory(self) -> int:
        """Bytes that its process takes about, most of it for copies of a kernel in float32 and float64."""
        kernels = kernel_bytes(self.samples, self.outputs) + kernel_bytes(self.config.record.test or 0, self.outputs)
        return BASE_BYTES + kernels

    def as_row(self) -> dict[str, Any]:
        """For printing: the axes, the state, the rows and bytes at most, and the memory."""
        rows = {f"{group}_rows": count for group, count in self.rows.items()}
        sizes = {"bytes": self.nbytes, "memory": self.memory}
        return {"run": self.config.run_id, **self.config.axes, "state": self.state, **rows, **sizes}


@dataclass(frozen=True)
class Plan:
    """The runs of a study and what is left of them.

    Attributes:
        runs: in the order of the grid.
        workers: runs at a time.
        per_step: seconds; None where only running could tell: a user's own model, a run that diverges.
    """

    runs: tuple[Planned, ...]
    workers: int
    per_step: float | None

    @property
    def left(self) -> tuple[Planned, ...]:
        """The runs that are not done."""
        return tuple(run for run in self.runs if run.state != "done")

    @property
    def seconds(self) -> float | None:
        """At most, for what is left, the start of the workers included; None where only running could tell."""
        if not self.left:
            return 0.0
        if self.per_step is None:
            return None
        busy = [START_SECONDS] * min(self.workers, len(self.left))
        for run in self.left:  # each goes to the worker that is free first
            heapq.heapreplace(busy, busy[0] + run.steps_left * self.per_step)
        return max(busy)

    def rows(self) -> list[dict[str, Any]]:
        """For printing: what each run will hold, and the seconds that its steps take at most."""
        return [run.as_row() | {"seconds": self._seconds(run)} for run in self.runs]

    def _seconds(self, run: Planned) -> float | None:
        if run.state == "done":
            return 0.0
        return None if self.per_step is None else run.steps_left * self.per_step

    def summary(self) -> str:
        """One line to read."""
        left = self.left
        if not left:
            return f"nothing to do: all {len(self.runs)} runs are done"
        size = f"at most {bytes_text(sum(run.nbytes for run in left))} uncompressed"
        if any(run.parameters is None for run in left):
            size += " and the imported model's parameters"
        time = "time unknown" if self.seconds is None else f"at most {seconds_text(self.seconds)}"
        return f"{len(left)} of {len(self.runs)} runs to do, {size}, {time}"


def total(plans: Sequence[Plan]) -> dict[str, Any]:
    """Of what is left of the parts of a study: runs, bytes and seconds at most; the parts run one after the other."""
    left = [run for plan in plans for run in plan.left]
    seconds = [plan.seconds for plan in plans]
    known = None if None in seconds else sum(filter(None, seconds))
    return {"runs": len(left), "bytes": sum(run.nbytes for run in left), "seconds": known}


def plan_runs(runs: Iterable[RunConfig], root: str) -> tuple[Planned, ...]:
    """Count rows and bytes of runs, opening nothing but their records and the headers of the data files.

    Args:
        runs: points of a grid.
        root: folder of the store, which need not exist.

    Raises:
        MissingError: if a data file does not exist.
        InputError: if a data file cannot be used, `data.n` or `record.eigenpairs` is more than it holds, the model does
            not take such examples, or something is to be recorded that data or model do not have.
    """
    shape = functools.cache(lambda data: data.shape())
    planned = []
    for run in runs:
        samples, features, outputs = shape(run.data)
        parameters = run.model.parameters(features, outputs)
        _check_record(run.record, samples, outputs, parameters)
        if isinstance(run.update, StochasticGradientDescent) and run.update.batch_size > samples:
            raise InputError(f"update.batch_size = {run.update.batch_size}: must be at most n = {samples}")
        rows = row_capacity(run.record.cadences, len(run.record.loss_levels), run.stop.steps)
        nbytes = _nbytes(run, rows, samples, features, outputs, parameters or 0)
        state, last_step = _state(run, root)
        left = max(0, run.stop.steps - last_step)
        planned.append(Planned(run, rows, samples, outputs, parameters, nbytes, state, left))
    return tuple(planned)


def plan_study(study: Study, root: str, workers: int) -> Plan:
    """Plan a study for a store that may exist already; nothing is written to it.

    The time is that of a few steps of the largest run, measured here, times the steps left: runs that are smaller or
    reach their loss end earlier. It stays unknown where that would import a user's model or download data.

    Args:
        study: what would be run.
        root: folder of the store.
        workers: runs at a time.

    Raises:
        MissingError: if a data file does not exist.
        InputError: if a data file cannot be used, or the kernel of a run needs more memory than this machine has.
    """
    runs = plan_runs(study.runs(), root)
    left = [run for run in runs if run.state != "done"]
    machine = psutil.virtual_memory().total
    for run in left:
        if run.memory > machine:
            raise InputError(
                f"run {run.config.run_id}: its kernel of n = {run.samples} examples takes {bytes_text(run.memory)} of "
                f"memory, and this machine has {bytes_text(machine)}: train on fewer (data.n), and compute the kernel "
                "on more of them afterwards in tiles: ntk-eos kernel ROOT --probe test"
            )
    if not left or needs_import(study) or any(needs_download(run.config.data) for run in left):
        return Plan(runs, workers, None)
    largest = max(left, key=lambda run: run.samples * (run.samples + (run.parameters or 0)))
    return Plan(runs, workers, _seconds_per_step(largest.config))


def _check_record(record: Record, samples: int, outputs: int, parameters: int | None) -> None:
    """Refuse to record what the data or the model do not have."""
    if record.eigenpairs > samples:
        raise InputError(f"record.eigenpairs = {record.eigenpairs}: must be at most n = {samples}")
    if record.ntk_full and outputs == 1:
        raise InputError("record.ntk_full = true: the data have one output, whose kernel is ntk itself; leave it out")
    if parameters is not None and (record.hessian_eigenpairs or 1) > parameters:
        raise InputError(
            f"record.hessian_eigenpairs = {record.hessian_eigenpairs}: must be at most p = {parameters} parameters"
        )


def _state(config: RunConfig, root: str) -> tuple[str, int]:
    """How a run stands, and its newest step."""
    path = run_path(root, config.run_id)
    if not is_run(path):
        return "new", 0
    run = read_run(path)
    last = run.attrs["last_step"] or 0
    if run.status not in FINAL:
        return "running" if run.status == "running" else "resume", last
    _check_data(config, run)
    if run.status == "diverged":
        return "done", last
    more = config.stop.asks_for_more(last, float(run.read("train/loss").min()))
    return "continue" if more else "done", last


def _check_data(config: RunConfig, run: Run) -> None:
    """Refuse to call a run done that was recorded on other contents of its file: the name alone is its identity."""
    if not isinstance(config.data, File):
        return
    dtype = config.compute.dtype
    probe = load_data(config.data, config.seed).arrays(dtype)
    if config.record.test:
        held_out = load_test(config.data, config.seed, config.record.test).arrays(dtype)
        probe |= {f"test_{name}": array for name, array in held_out.items()}
    if chain_seed(config.identity(), probe).hex() != run.attrs["seed_digest"]:
        raise InputError(
            f"run {run.run_id} was recorded on other data than {config.data.file} holds now: write to another root, "
            f"or remove {run.path}"
        )


def check_start_here(planned: Sequence[Planned], root: str) -> None:
    """Refuse in one place what would end every one of these runs at its start on this machine.

    Args:
        planned: runs that are to be trained now.
        root: folder of their store.

    Raises:
        RunLocked: if another process writes all of them.
        InputError: if the device of all of them is not there, and as `check_start`.
    """
    runs = [one.config for one in planned]
    if all(one.state == "running" for one in planned):
        with door(run_path(root, runs[0].run_id)).lease(LEASE, b"a check"):
            pass  # its writer has ended meanwhile
    device = runs[0].compute.device
    if device != "cpu" and all(run.compute.device == device for run in runs):
        from pipeline.train import find_device

        find_device(device)
    check_start(planned)


def check_start(planned: Sequence[Planned]) -> None:
    """Refuse in one place what would end every one of these runs at its start on any machine.

    Args:
        planned: runs that are to be trained now.

    Raises:
        InputError: if their data cannot be downloaded, the imported model of all of them cannot be used, or their one
            dataset has too few examples left to be held out.
    """
    runs = [one.config for one in planned]
    first = runs[0]
    if all(needs_download(run.data) for run in runs):
        load_data(first.data, first.seed)  # once and here, not by every worker at a time
    held_out = first.record.test
    if held_out and all((run.data, run.record.test) == (first.data, held_out) for run in runs):
        load_test(first.data, first.seed, held_out)
    if isinstance(first.model, Imported) and all(run.model == first.model for run in runs):
        import torch

        from pipeline.models import build_model

        _, features, outputs = first.data.shape()
        build_model(first.model, features, outputs, first.seed, getattr(torch, first.compute.dtype))


def _seconds_per_step(config: RunConfig) -> float | None:
    """Mean over a few steps of a throw-away run with the cadences of the study, the first ones left out.

    None if it diverges before there is anything to measure.
    """
    from pipeline.train import train  # imports torch, which only this needs

    short = config.model_copy(update={"stop": config.stop.model_copy(update={"steps": TIMED_STEPS, "loss": None})})
    with tempfile.TemporaryDirectory() as folder:
        train(short, folder)
        times = read_run(run_path(folder, short.run_id)).read("train/wall_time")
    steps = np.diff(times)
    return float(steps[len(steps) // 2 :].mean()) if len(steps) else None


def _nbytes(
    run: RunConfig, rows: dict[str, int], samples: int, features: tuple[int, ...], outputs: int, parameters: int
) -> int:
    record, tensors = run.record, run.model.tensors(features, outputs)
    sizes = {
        "step": 1, "sample": samples, "sample2": samples, "output": outputs, "output2": outputs, "byte": 16,
        "eig": record.eigenpairs, "hessian_eig": record.hessian_eigenpairs or 1, "parameter_index": parameters,
        "layer": tensors or 0, "test_sample": record.test or 0, "test_sample2": record.test or 0,
    }  # fmt: skip

    def size(variable: schema.Variable) -> int:
        itemsize = np.dtype(run.compute.dtype if variable.dtype == "model" else variable.dtype).itemsize
        return itemsize * math.prod(sizes[dim] for dim in variable.dims)

    others = [kernel["name"] for kernel in record.kernel_tables()[1:]]
    preconditioned = run.update.preconditioned
    test = schema.HELD_OUT if record.test else ()
    names = schema.recorded(others, bool(record.layers), bool(record.ntk_full), preconditioned, test)
    names["train"] = [*schema.TRAIN, *schema.GIVEN_BY[run.process]]
    growing = sum(count * sum(map(size, schema.row_variables(group, names[group]))) for group, count in rows.items())
    held_out = schema.TEST_PROBE if record.test else {}
    probe = {name: size(variable) for name, variable in (schema.PROBE | held_out).items()}
    inputs = probe["input"] + probe.get("test_input", 0)
    return growing + sum(probe.values()) + inputs * (math.prod(features) - 1)
