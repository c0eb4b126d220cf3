"""The full-batch gradient ∇L(θ), whole or as a sum over parts of the batch.

    L = Σ_s (m_s / n) L_s,    ∇L = Σ_s (m_s / n) ∇L_s

over parts s of m_s of the n examples, for a loss that is a mean over examples and a model that keeps them apart. For
convolutions small parts in channels-last order cost less than half of one batch in torch's usual order: most of the
time of the latter is spent on fresh pages for its intermediate images. Other networks gain nothing and take one batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.losses import Loss

PART = 32  # examples, for models with convolutions


class FullGradient(NamedTuple):
    """What one pass over the batch gives."""

    loss: float
    prediction: Tensor  # (n, c), without a graph
    gradients: list[Tensor]  # one per parameter, in its shape


class FullBatch:
    """The batch of a run, in the order and the parts in which its model takes it fastest.

    The parts depend on the model's layers alone, so a run has the same bits wherever it is taken up again.

    Args:
        model: treats examples independently; the weights of convolutions are put in channels-last order.
        criterion: a mean over examples, of predictions and targets (n, c).
        x: the examples (n, ...).
        y: their targets (n, c).
    """

    def __init__(self, model: nn.Module, criterion: Loss, x: Tensor, y: Tensor) -> None:
        layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        convolutions = any(isinstance(module, layers) for module in model.modules())
        if convolutions and x.ndim == 4 and _takes_channels_last(model, x):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has no hint for it
            x = x.contiguous(memory_format=torch.channels_last)
        step = PART if convolutions else len(x)
        self._model, self._criterion, self._n = model, criterion, len(x)
        self._parts = list(zip(x.split(step), y.split(step), strict=True))

    def gradient(self, parameters: Sequence[Tensor]) -> FullGradient:
        """Loss, predictions and ∇L at the model's parameters as they are."""
        loss, predictions = 0.0, []
        total: list[Tensor] = []
        for x, y in self._parts:
            prediction = self._model(x)
            share = self._criterion(prediction, y)
            if len(self._parts) > 1:
                share = share * (len(x) / self._n)
            gradients = torch.autograd.grad(share, parameters, materialize_grads=True)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
            loss += share.item()
            predictions.append(prediction.detach())
        return FullGradient(loss, torch.cat(predictions), total)


def _takes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Whether the model runs on images in channels-last order; a `view` in it may want the other one."""
    try:
        with torch.no_grad():
            model(x[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True
