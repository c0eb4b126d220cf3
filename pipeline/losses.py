"""What is minimised: a registry of losses on predictions and targets (n, c), and the accuracy beside them.

Each loss is a mean over examples, so that the loss of a batch is the mean of those of its parts, by their sizes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from pipeline.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error, L = (1/2n) ‖f - y‖², summed over outputs.

    Args:
        prediction: f (n, c).
        target: y (n, c).

    Returns:
        A scalar with a graph.

    Raises:
        InputError: if the shapes differ, which would broadcast in silence.

    Source: Cohen et al. (2021), arXiv 2103.00065, whose published code has the same half and mean.
    """
    _check_shapes(prediction, target)
    return (prediction - target).square().sum() / (2 * len(target))


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of labels, L = -(1/n) Σ y log softmax(f), or (1/n) Σ log(1 + exp(-y f)) for one output and y = ±1.

    Its second derivative by f is no multiple of one, as that of `mse` is, and vanishes as the margins grow: λ₁/n of
    the NTK does not tell the sharpness, only the Hessian does.

    Args:
        prediction: f (n, c), logits.
        target: y (n, c), one-hot for several outputs, -1 and +1 for one.

    Returns:
        A scalar with a graph.

    Raises:
        InputError: if the shapes differ, which would broadcast in silence.
    """
    _check_shapes(prediction, target)
    if target.shape[1] == 1:
        return softplus(-target * prediction).mean()
    return -(target * log_softmax(prediction, 1)).sum() / len(target)


def accuracy(prediction: Tensor, target: Tensor) -> float:
    """Share of examples classified right: equal signs for one output, equal largest outputs for several.

    Args:
        prediction: f (n, c).
        target: labels y (n, c), -1 and +1 or one-hot. An output of exactly 0 counts as wrong.
    """
    _check_shapes(prediction, target)
    right = prediction * target > 0 if target.shape[1] == 1 else prediction.argmax(1) == target.argmax(1)
    return float(torch.count_nonzero(right)) / len(target)


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or target.ndim != 2:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise InputError(f"prediction and target have shapes {shapes}: both must be (examples, outputs)")


LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}
OF_LABELS = {"cross_entropy"}  # defined for class labels alone
