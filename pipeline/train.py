"""The built-in training loop: one run of a study, from its data to its last row.

Each step measures the model before its process moves it (`pipeline.processes`), so that the row of step t describes
the parameters of step t.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline import schema
from pipeline.config import File, RunConfig
from pipeline.data import Data, load_data, load_test
from pipeline.errors import InputError
from pipeline.losses import LOSSES, OF_LABELS, accuracy
from pipeline.models import build_model
from pipeline.optim import UPDATES
from pipeline.processes import PROCESSES, Problem
from pipeline.record import Probe, Recorder
from pipeline.spectra import NonFiniteKernel


def train(
    run: RunConfig,
    root: str,
    *,
    attrs: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train one run and record it; resume it, continue it or leave it alone, by what its store holds.

    Args:
        run: one point of a study's grid.
        root: folder of the store.
        attrs: further root attributes of the run (title, study).
        should_stop: asked after each step; True commits what there is and returns.

    Returns:
        complete, diverged or interrupted.

    Raises:
        InputError: if the device is not there, or the data or the model cannot be used.
        RunLocked: if another process writes the run.
    """
    device, dtype = find_device(run.compute.device), getattr(torch, run.compute.dtype)
    with computing(run.compute.threads):
        data = load_data(run.data, run.seed)
        probe = _probe(data, dtype, device)
        held_out = run.record.test and load_test(run.data, run.seed, run.record.test)
        x, y = probe.input, probe.target
        model = build_model(run.model, x.shape[1:], y.shape[1], run.seed, dtype).to(device)
        if run.loss.name in OF_LABELS and not data.labels:
            raise InputError(f"loss.name = {run.loss.name!r}: the targets must be labels, -1 and +1 or one-hot")
        criterion = LOSSES[run.loss.name]
        rule = UPDATES[run.update.name](**run.update.model_dump(exclude={"name"}))
        line = rule.stability_line(run.learning_rate)
        preconditioned = run.update.preconditioned
        process = PROCESSES[run.process](Problem(model, criterion, x, y, rule, run.learning_rate, run.seed))
        recorder = Recorder(
            root,
            model,
            probe,
            test=_probe(held_out, dtype, device) if held_out else None,
            identity=run.identity(),
            learning_rate=run.learning_rate,
            seed=run.seed,
            steps=run.stop.steps,
            run_id=run.run_id,
            cadences=run.record.cadences,
            loss_levels=run.record.loss_levels,
            eigenpairs=run.record.eigenpairs,
            kernels=run.record.kernel_tables(),
            layers=bool(run.record.layers),
            ntk_full=bool(run.record.ntk_full),
            criterion=criterion,
            hessian_eigenpairs=run.record.hessian_eigenpairs or 1,
            train=["loss", *(["accuracy"] if data.labels else []), "grad_norm", *schema.GIVEN_BY[run.process]],
            state=process.state,
            preconditioner=process.preconditioner if preconditioned else None,
            attrs={
                "axes": run.axes,
                "family": run.family,
                "loss_convention": (inspect.getdoc(criterion) or run.loss.name).splitlines()[0],
                "stop": run.stop.model_dump(exclude_none=True),
                "stability_line": None if preconditioned else line,
                **({"preconditioned_stability_line": line} if preconditioned else {}),
                **({"data_file": run.data.file} if isinstance(run.data, File) else {}),
                **(attrs or {}),
            },
            threads=run.compute.threads,
            commit_seconds=run.compute.commit_seconds,
        )
        with recorder:
            if recorder.status == "complete" and run.stop.asks_for_more(recorder.last_step, recorder.lowest_loss):
                recorder.extend()
            if recorder.restored_state:
                process.restore({name: tensor.to(device) for name, tensor in recorder.restored_state.items()})
            try:
                for step in recorder:
                    (loss, prediction, gradients), columns = process.row()
                    measured = {"grad_norm": _norm(gradients), **columns}
                    if data.labels:
                        measured["accuracy"] = accuracy(prediction, y)
                    if not recorder.record(step, loss=loss, last=run.stop.reached(loss), **measured):
                        break
                    if should_stop():
                        recorder.interrupt(step)
                        return "interrupted"
                    process.advance(step)
            except NonFiniteKernel as error:
                recorder.diverge(step, str(error))
            return recorder.status


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """So many threads of torch and BLAS, and algorithms whose results do not depend on their order.

    Args:
        threads: of one run.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def find_device(name: str, otherwise: str | None = None) -> torch.device:
    """The device of that name.

    Args:
        name: as in `compute.device`.
        otherwise: the device to take if that one is not there.

    Raises:
        InputError: if it is not there.
    """
    device = torch.device(name)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available[device.type]:
        if device.type == "cuda":  # without a workspace of a fixed size cuBLAS does not promise one order of summing
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return device
    if otherwise is None:
        raise InputError(f"compute.device = {name!r}: torch finds no such device here; use 'cpu'")
    return torch.device(otherwise)


def _probe(data: Data, dtype: torch.dtype, device: torch.device) -> Probe:
    """Examples as the model takes them."""
    x, y = (torch.as_tensor(array, dtype=dtype, device=device) for array in (data.x, data.y))
    return Probe(x, y, data.sample_index)


def _norm(gradients: Iterable[Tensor]) -> float:
    """‖∇L‖₂ over all parameters, accumulated in float64."""
    return math.sqrt(sum(torch.linalg.vector_norm(g, dtype=torch.float64).item() ** 2 for g in gradients))
