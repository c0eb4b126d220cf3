"""Gradient flow, the limit of gradient descent for small steps, in the time of steps of size η.

    dθ/dt = -η ∇L(θ)

A unit of time is one step of gradient descent. It is integrated by the adaptive Runge-Kutta pair of orders 3 and 2,
whose first trial is the whole unit: below the Edge of Stability four gradients are then enough. Above it the flow is
stiff, with ηλ_1 of tens or hundreds, and this pair has more stability per gradient than those of higher order.

Source: Bogacki and Shampine (1989), Applied Mathematics Letters 2, as in scipy.integrate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from pipeline.gradient import FullBatch
from pipeline.spectra import NonFiniteKernel

# Bound on the error of a step of the integrator, of each parameter and of their root mean square. After 60 units of
# time on a small network the error was 1e-6 for ηλ_1 = 0.2 and 1e-5 for ηλ_1 = 25: a thousandth of the distance between
# gradient descent and the flow at most, and what rounding makes of a run in float32.
TOLERANCE = 1e-6


def gradient_flow(
    batch: FullBatch, parameters: Sequence[Tensor], learning_rate: float, *, tolerance: float = TOLERANCE
) -> int:
    """Move the parameters by a unit of time, in place.

    Args:
        batch: gives ∇L at the parameters as they are.
        parameters: θ, all that is trained.
        learning_rate: step size η.
        tolerance: bound on the relative error of a step of the integrator.

    Returns:
        Evaluations of the gradient.

    Raises:
        NonFiniteKernel: if the gradient is not finite on the way.
    """

    def velocity(_: float, theta: NDArray[Any]) -> NDArray[Any]:
        _put(parameters, theta)
        return -learning_rate * _flat(batch.gradient(parameters).gradients)

    start = _flat(parameters)
    # A trial step that overflows is no divergence: the integrator takes a shorter one.
    with np.errstate(over="ignore", invalid="ignore"):
        solution = solve_ivp(
            velocity,
            (0, 1),
            start,
            method="RK23",
            t_eval=(1,),
            first_step=1,
            rtol=tolerance,
            atol=tolerance * np.sqrt(np.mean(start**2)),
        )
    if not solution.success:
        raise NonFiniteKernel(f"gradient flow cannot be integrated further: {solution.message}")
    _put(parameters, solution.y[:, 0])
    return int(solution.nfev)


def _flat(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """Float64 on the CPU, where the integrator works."""
    return np.concatenate([tensor.detach().cpu().double().numpy().reshape(-1) for tensor in tensors])


@torch.no_grad()
def _put(parameters: Sequence[Tensor], theta: NDArray[np.float64]) -> None:
    """Give the parameters the values θ, in place."""
    pieces = torch.from_numpy(theta).split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))
