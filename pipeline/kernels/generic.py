"""Gradients of each example's outputs for any differentiable model, by `torch.func`, or one backward pass at a time.

This path asks nothing of how a model uses its parameters. Where `torch.func` cannot batch it (branches on values, code
in C++ without a batching rule, custom functions), each example gets a forward pass of its own.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pipeline.kernels.capture import example_count, trained
from pipeline.kernels.structure import some

EXAMPLES = 64  # batched at once


def jacobians(model: nn.Module, x: Any, names: tuple[str, ...], c: int) -> dict[str, Tensor]:
    """∂f/∂θ_l of each example, (n, c, p_l), by name.

    Args:
        model: treats examples independently.
        x: n examples.
        names: of the trained tensors asked for.
        c: outputs.
    """
    tensors = trained(model)
    wanted = [tensors[name] for name in names]
    try:
        with warnings.catch_warnings():
            # Some functions have no batching rule and are looped over; nobody who reads this could change that.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = _batched(model, x, wanted)
    except (RuntimeError, ValueError):  # what torch.func says of a model that it cannot batch
        found = _one_by_one(model, x, wanted)
    return {name: tensor.reshape(len(tensor), c, -1) for name, tensor in zip(names, found, strict=True)}


def _batched(model: nn.Module, x: Any, wanted: list[Tensor]) -> list[Tensor]:
    # Every place that holds one of the tensors: functional_call does not put back what it replaces twice.
    index = {id(tensor): position for position, tensor in enumerate(wanted)}
    places = {
        f"{prefix}.{name}".removeprefix("."): index[id(tensor)]
        for prefix, module in model.named_modules()
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(tensor) in index
    }

    def outputs(tensors: list[Tensor], example: Any) -> Tensor:
        replaced = {place: tensors[position] for place, position in places.items()}
        batch = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, example)
        return torch.func.functional_call(model, replaced, (batch,), tie_weights=False)[0]

    per_example = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0), chunk_size=EXAMPLES)
    return list(per_example([tensor.detach() for tensor in wanted], x))


def _one_by_one(model: nn.Module, x: Any, wanted: list[Tensor]) -> list[Tensor]:
    rows = []
    with torch.enable_grad():
        for i in range(example_count(x)):
            result = model(some(x, slice(i, i + 1)))[0]
            rows.append(
                [torch.autograd.grad(value, wanted, retain_graph=True, materialize_grads=True) for value in result]
            )
    return [
        torch.stack([torch.stack([gradients[j] for gradients in outputs]) for outputs in rows])
        for j in range(len(wanted))
    ]
