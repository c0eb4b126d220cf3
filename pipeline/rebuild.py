"""The model of a recorded run, built again, with the parameters of one of its snapshots."""

import numpy as np
import torch
from torch import nn

from pipeline.config import Imported, config_of
from pipeline.errors import InputError
from pipeline.models import build_model
from pipeline.store import Run
from pipeline.train import find_device

# A model built again must predict what the run did, up to the rounding of another machine.
AGREEMENT = 1e-3


def threads_of(source: Run) -> int:
    """Threads of torch and BLAS that the run was trained with."""
    config = config_of(source.attrs["identity"])
    return config.compute.threads if config else source.attrs["provenance"]["threads"]


def network_of(source: Run, allow_imports: bool) -> nn.Module:
    """The run's model, freshly built.

    Raises:
        InputError: if only a loop of the user's own knows it, or its code is imported and that is not allowed.
    """
    config = config_of(source.attrs["identity"])
    if config is None:
        raise InputError(
            f"run {source.run_id} was recorded by a loop of its own, which alone knows the model: "
            "pipeline.replay.replay(..., model=...)"
        )
    if isinstance(config.model, Imported) and not allow_imports:
        raise InputError(
            f"run {source.run_id}: its model {config.model.import_path} runs code from outside this package; "
            "pass --allow-imports if you trust it"
        )
    inputs, outputs = (source.node(f"probe/{name}")["shape"] for name in ("input", "target"))
    dtype = getattr(torch, config.compute.dtype)
    built = build_model(config.model, tuple(inputs[1:]), outputs[1], config.seed, dtype)
    return built.to(find_device(config.compute.device, otherwise="cpu"))


def check_parameters(source: Run, model: nn.Module) -> None:
    """Raise InputError for a model whose parameters have other names or shapes than the run stored."""
    stored = source.node("snapshots/parameter")["attributes"]
    shapes = dict(zip(stored["names"], map(tuple, stored["shapes"]), strict=True))
    built = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if list(built.items()) != list(shapes.items()):
        other = next((name for name in [*built, *shapes] if built.get(name) != shapes.get(name)), "their order")
        raise InputError(f"the model has other parameters than run {source.run_id} stored ({other}): is it the same?")


def load_snapshot(source: Run, model: nn.Module, row: int) -> None:
    """Put the parameters of a snapshot into the model."""
    flat = torch.from_numpy(source.read("snapshots/parameter", row, row + 1)[0])
    with torch.no_grad():
        parameters = list(model.parameters())
        for tensor, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def check_predictions(source: Run, model: nn.Module, row: int, x: torch.Tensor) -> None:
    """Refuse a model that is not what the run trained, as one whose imported code has changed."""
    if "prediction" not in source.arrays("snapshots"):
        return
    with torch.no_grad():
        now = model(x).numpy(force=True)
    then = source.read("snapshots/prediction", row, row + 1)[0]
    if np.abs(now - then).max() > AGREEMENT * max(1.0, np.abs(then).max()):
        raise InputError(
            f"the model with the parameters of run {source.run_id} predicts other values than were recorded: is it "
            "the same model, in the same mode?"
        )
