"""Naive dense references in float64: slow, obvious, and written without the code that they judge."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mapped(function: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
    """`function` of every tensor of a batch: a tensor, or dicts, tuples and lists of batches."""
    if isinstance(x, dict):
        return {key: mapped(function, value) for key, value in x.items()}
    return type(x)(mapped(function, value) for value in x) if isinstance(x, tuple | list) else function(x)


def first_tensor(x: Any) -> torch.Tensor:
    """One tensor of a batch, for the number of examples."""
    while not isinstance(x, torch.Tensor):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return x


def layer_jacobians(model: torch.nn.Module, x: Any) -> dict[str, Array]:
    """∂f_a(x_i)/∂θ of each trained parameter by its name, (n, c, p_l), by one backward pass per example and output.

    Args:
        model: maps a batch to (n, c).
        x: a tensor, or dicts, tuples and lists of tensors; integers and booleans stay what they are.
    """
    model = copy.deepcopy(model).double()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    x = mapped(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)
    rows: dict[str, list[Array]] = {name: [] for name in trained}
    n = len(first_tensor(x))
    for i in range(n):
        output = model(mapped(lambda leaf, i=i: leaf[i : i + 1], x))[0]
        for value in output:
            gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(trained, gradients, strict=True):
                rows[name].append(gradient.reshape(-1).numpy())
    return {name: np.stack(row).reshape(n, len(output), -1) for name, row in rows.items()}


def jacobian(model: torch.nn.Module, x: Any) -> Array:
    """∂f_a(x_i)/∂θ of all trained parameters in their order, (n, c, p)."""
    return np.concatenate(list(layer_jacobians(model, x).values()), axis=2)


def ntk(model: torch.nn.Module, x1: Any, x2: Any = None) -> Array:
    """J J^T for every pair of examples and outputs, (n1, n2, c, c)."""
    j1 = jacobian(model, x1)
    j2 = j1 if x2 is None else jacobian(model, x2)
    return np.einsum("iap,jbp->ijab", j1, j2)


def trace(full: Array) -> Array:
    """Sum of a full kernel (n1, n2, c, c) over equal outputs, (n1, n2)."""
    return np.einsum("ijaa->ij", full)


def tanh_mlp(parameters: list[Array], x: Array) -> Array:
    """A tanh network (n, d) -> (n, c) from weights and biases in torch's layout, in numpy alone."""
    hidden = x
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        last = weight is parameters[-2]
        hidden = hidden @ weight.T + bias
        hidden = hidden if last else np.tanh(hidden)
    return hidden


def finite_difference_ntk(parameters: list[Array], x: Array, width: float = 1e-5) -> Array:
    """The full kernel (n, n, c, c) of `tanh_mlp` from central differences in every parameter."""
    columns = []
    for index, tensor in enumerate(parameters):
        for entry in np.ndindex(tensor.shape):
            moved = []
            for shift in (width, -width):
                shifted = [array.copy() for array in parameters]
                shifted[index][entry] += shift
                moved.append(tanh_mlp(shifted, x))
            columns.append((moved[0] - moved[1]) / (2 * width))
    j = np.stack(columns, axis=-1)
    return np.einsum("iap,jbp->ijab", j, j)


def half_mean_squared_error(prediction: Array, target: Array) -> float:
    """(1/2n) sum over examples and outputs of (f - y)^2, by loops."""
    total = 0.0
    for row, wanted in zip(prediction, target, strict=True):
        for value, label in zip(row, wanted, strict=True):
            total += (value - label) ** 2
    return total / (2 * len(target))
