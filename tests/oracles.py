"""Naive dense references in float64: slow, obvious, and written without the code that they judge."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def jacobian(model: torch.nn.Module, x: torch.Tensor) -> Array:
    """∂f_a(x_i)/∂θ of the trained parameters, (n, c, p), by one backward pass per example and output."""
    model = copy.deepcopy(model).double()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    rows = []
    for example in x.double():
        output = model(example[None])[0]
        for value in output:
            gradients = torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy())
    return np.stack(rows).reshape(len(x), len(output), -1)


def ntk(model: torch.nn.Module, x1: torch.Tensor, x2: torch.Tensor | None = None) -> Array:
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
