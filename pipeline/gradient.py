"""The gradient ∇L(θ) of all examples or of some, whole or as a sum over parts, and the order of mini-batches.

    L = Σ_s (m_s / n) L_s,    ∇L = Σ_s (m_s / n) ∇L_s

over parts s of m_s of the n examples, for a loss that is a mean over examples and a model that keeps them apart. For
convolutions small parts in channels-last order cost less than half of one batch in torch's usual order: most of the
time of the latter is spent on fresh pages for its intermediate images. Other networks gain nothing and take one batch.

Mini-batches are drawn without replacement: each epoch is a new permutation of the examples, cut into batches of one
size. The examples that are left over are no part of that epoch, so that every gradient is a mean over as many.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.losses import Loss
from pipeline.seeds import stream

PART = 32  # examples, for models with convolutions


class FullGradient(NamedTuple):
    """What one pass over the examples gives."""

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
        self._model, self._criterion, self._x, self._y = model, criterion, x, y
        self._step = PART if convolutions else len(x)

    def gradient(self, parameters: Sequence[Tensor], examples: Tensor | None = None) -> FullGradient:
        """Loss, predictions and ∇L at the model's parameters as they are.

        Args:
            parameters: the model's, by which to differentiate.
            examples: take the loss of these alone, by their numbers; of all by default.
        """
        x, y = (self._x, self._y) if examples is None else (self._x[examples], self._y[examples])
        parts = list(zip(x.split(self._step), y.split(self._step), strict=True))
        loss, predictions = 0.0, []
        total: list[Tensor] = []
        for some, targets in parts:
            prediction = self._model(some)
            share = self._criterion(prediction, targets)
            if len(parts) > 1:
                share = share * (len(some) / len(x))
            gradients = torch.autograd.grad(share, parameters, materialize_grads=True)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
            loss += share.item()
            predictions.append(prediction.detach())
        return FullGradient(loss, torch.cat(predictions), total)


class MiniBatches:
    """Which examples each step takes: a function of the seed and the step, so that it can be taken up anywhere.

    Args:
        n: examples.
        size: of a batch.
        seed: of the run; each epoch has a stream of its own.

    Raises:
        InputError: if a batch would have more examples than there are.
    """

    def __init__(self, n: int, size: int, seed: int) -> None:
        if size > n:
            raise InputError(f"update.batch_size = {size}: must be at most the {n} examples")
        self._n, self._size, self._seed = n, size, seed

    def examples(self, step: int) -> Tensor:
        """The numbers of the examples (size,) that the step from `step` to `step` + 1 takes."""
        epoch, batch = divmod(step, self._n // self._size)
        order = stream(self._seed, f"order of epoch {epoch}").permutation(self._n)
        return torch.from_numpy(order[batch * self._size : (batch + 1) * self._size])


def _takes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Whether the model runs on images in channels-last order; a `view` in it may want the other one."""
    try:
        with torch.no_grad():
            model(x[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True
