"""The central flow of gradient descent: where its iterates go on average, oscillation and all.

At the Edge of Stability the iterates are θ(t) + δ, δ in the span of the unstable eigenvectors of the Hessian H, with
mean 0 and covariance Σ(t). On average they feel the gradient of L + ½ ⟨H, Σ⟩:

    dθ/dt = -η [∇L(θ) + ½ ∇⟨H(θ), Σ⟩],        Σ fixed under ∇,

where Σ ⪰ 0 is the one that lets no eigenvalue of H rise above 2/η and lives on the eigenspace of 2/η. Then the average
loss of the iterates is L(θ(t)) + tr Σ / η. Without critical eigenvalues this is gradient flow. A unit of time is a step
of gradient descent.

With u_i the k critical eigenvectors, D_ij = ∇(u_iᵀ H u_j) for fixed u, and Σ = Σ_ij X_ij u_i u_jᵀ, an Euler step of
length dt changes the critical block of H to first order by -η dt (⟨D_ij, ∇L⟩ + ½ Σ_lm ⟨D_ij, D_lm⟩ X_lm). It ends at or
below 2/η if and only if X solves `complementarity` with

    A_ij = (2/η - λ_i) [i = j] + η dt ⟨D_ij, ∇L⟩,        B_ijlm = ½ η dt ⟨D_ij, D_lm⟩.

Source: Cohen, Damian, Talwalkar, Kolter and Lee (2024), arXiv 2410.24206, and their published code for the substeps,
for what counts as critical, and for looking one substep ahead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.flows.complementarity import complementary
from pipeline.losses import Loss
from pipeline.operators import HessianOperator
from pipeline.spectra import NonFiniteKernel, OperatorPairs, lanczos

SUBSTEPS = 4  # Euler steps per unit of time

# Eigenvalues above this share of 2/η are critical: those that may reach it within a substep.
CRITICAL = 1.95 / 2

# Relative residual of the critical eigenpairs. In 200 units of time on small networks, 1e-4 moved the flow by 1e-4 from
# where 1e-8 leads, at half the cost; 1e-3 moved it by 1e-3.
TOLERANCE = 1e-4

MOST = 20  # critical eigenvalues; their problem has the fourth power of that many numbers


class Rate(NamedTuple):
    """The flow where it stands.

    Attributes:
        velocity: dθ/dt (p,).
        variance: tr Σ, the mean of ‖δ‖².
        critical: eigenvalues of the Hessian that are at 2/η or close below.
        vectors: (p, critical + 1), its leading eigenvectors, where the next search starts.
    """

    velocity: Tensor
    variance: float
    critical: int
    vectors: Tensor


class CentralFlow:
    """The central flow of gradient descent on a full batch.

    Args:
        model: maps (n, ...) to (n, c); three times differentiable, moved in place.
        criterion: the loss L, (prediction, target) -> scalar.
        x: the examples (n, ...).
        y: their targets (n, c).
        learning_rate: step size η.

    Raises:
        InputError: if the model has torch's layer norm, whose third derivatives are wrong.
    """

    def __init__(self, model: nn.Module, criterion: Loss, x: Tensor, y: Tensor, learning_rate: float) -> None:
        if fused := [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]:
            raise InputError(
                f"central flow of a model with torch.nn.LayerNorm ({', '.join(fused)}): its third derivatives are "
                "wrong in torch; use a layer norm written out in Python"
            )
        self._model, self._criterion, self._x, self._y = model, criterion, x, y
        self._learning_rate = learning_rate
        self._parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]

    def rate(self, start: Tensor | None = None) -> Rate:
        """The flow at the model's parameters as they are.

        Args:
            start: `vectors` of the rate before this one; None searches from a fixed random vector.

        Raises:
            NonFiniteKernel: if something is not finite, no finite Σ keeps the eigenvalues at 2/η, or far too many of
                them are above.
        """
        operator = HessianOperator(self._model, self._criterion, self._x, self._y)
        pairs = self._leading(operator, start)
        critical = self._count(pairs)
        u, gradient = pairs.vectors[:, :critical], operator.gradient
        derivatives = operator.gradients(u)
        x = torch.from_numpy(self._covariance(pairs.values[:critical], derivatives, gradient)).to(gradient)
        penalty = torch.einsum("ij,ijp->p", x, derivatives) / 2
        velocity = -self._learning_rate * (gradient + penalty)
        return Rate(velocity, float(x.trace()), critical, pairs.vectors[:, : critical + 1].contiguous())

    def advance(self, rate: Rate) -> Tensor:
        """Move the model by a unit of time.

        Args:
            rate: that at the model's parameters.

        Returns:
            The start for the rate where the model then stands.

        Raises:
            NonFiniteKernel: as `rate`.
        """
        for left in reversed(range(SUBSTEPS)):
            _move(self._parameters, rate.velocity / SUBSTEPS)
            if left:
                rate = self.rate(rate.vectors)
        return rate.vectors

    def _leading(self, operator: HessianOperator, start: Tensor | None) -> OperatorPairs:
        """All critical eigenpairs and, so as to see it come, the one below them."""
        k = 1 if start is None else start.shape[1]
        while True:
            pairs = lanczos(operator, k, start=start, tolerance=TOLERANCE)
            if self._count(pairs) < k or k == operator.shape[0]:
                return pairs
            if k > MOST:
                raise NonFiniteKernel(
                    f"more than {MOST} eigenvalues of the Hessian are above 2/η: far too many for a central flow"
                )
            k, start = k + 1, pairs.vectors

    def _count(self, pairs: OperatorPairs) -> int:
        return int((pairs.values > CRITICAL * 2 / self._learning_rate).sum())

    def _covariance(self, values: Tensor, derivatives: Tensor, gradient: Tensor) -> np.ndarray:
        """X (k, k), from the critical eigenvalues, D (k, k, p) and ∇L."""
        step = self._learning_rate / SUBSTEPS  # η dt
        to_line = torch.diag(2 / self._learning_rate - values)
        drift = step * (derivatives @ gradient)
        response = step / 2 * torch.einsum("ijp,lmp->ijlm", derivatives, derivatives)
        return complementary(to_line.numpy() + _exact(drift), _exact(response))


def _exact(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()


@torch.no_grad()
def _move(parameters: Sequence[Tensor], by: Tensor) -> None:
    """Add to the parameters, in place."""
    pieces = by.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.add_(piece.view_as(parameter))
