"""A user's own model, by import path."""

import importlib
from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError


def import_model(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The user's own model, `callable(input_shape=..., outputs=..., **options)`.

    This runs the user's code: whoever calls it has asked for permission.

    Args:
        options: `import_path`, "package.module:callable", and `options`, further arguments of the callable.
        input_shape: shape of one example.
        outputs: c; the model must map (n, *input_shape) to (n, c).

    Raises:
        InputError: naming what failed: the import, the call, its result, or a forward pass.
    """
    what = f"model.import = {options.import_path}"
    module_name, _, name = options.import_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise InputError(f"{what}: importing {module_name} failed: {_describe(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"{what}: {module_name} has no callable {name}")
    try:
        model = factory(input_shape=input_shape, outputs=outputs, **options.options)
    except Exception as error:
        call = ", ".join(["input_shape", "outputs", *options.options])
        raise InputError(f"{what}: calling it with {call} failed: {_describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{what}: it returned a {type(model).__name__}; it must return a torch.nn.Module")
    _check_forward(what, model, input_shape, outputs)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"{what}: the model has no parameter with requires_grad, so there is nothing to train")
    return model


def _check_forward(what: str, model: nn.Module, input_shape: tuple[int, ...], outputs: int) -> None:
    """Try the model on two examples, in eval mode so that no running statistic takes them up."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            result = model(torch.zeros(2, *input_shape))
    except Exception as error:
        raise InputError(
            f"{what}: a forward pass on 2 examples of shape {input_shape} failed: {_describe(error)}"
        ) from error
    for module in training:
        module.training = True
    if not isinstance(result, torch.Tensor) or result.shape != (2, outputs):
        got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise InputError(f"{what}: a forward pass on 2 examples gave {got}; it must give (2, {outputs})")


def _describe(error: Exception) -> str:
    """An error of the user's code on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
