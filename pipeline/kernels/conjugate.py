"""The conjugate kernel: the Gram matrix of the features that a model's last linear map takes.

    K_ij = φ(x_i) · φ(x_j),    f(x) = W φ(x) + b

With one output it is the part of the NTK that belongs to W. Source: Fan and Wang (2020), arXiv 2005.11879, section 1
(the name); Daniely, Frostig, Singer (2016), arXiv 1602.05897 (its limit at infinite width).
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.kernels import gram
from pipeline.kernels.capture import capture, example_count
from pipeline.kernels.rules import Outer
from pipeline.kernels.structure import some, structure

EXAMPLES = 1024  # taken through the model at once


class ConjugateKernel:
    """The conjugate kernel on fixed examples.

    Args:
        x1: n1 examples, as for `NTK`.
        x2: n2 examples, or None for x1, which gives an exactly symmetric kernel.
    """

    def __init__(self, x1: Any, x2: Any = None) -> None:
        self._x1, self._x2 = x1, x2

    def __call__(self, model: nn.Module) -> Tensor:
        """The kernel of `model` as it is now, (n1, n2) in the model's dtype.

        Raises:
            InputError: if the model does not end in a linear map, mixes its examples or draws random numbers.
        """
        structure(model, self._x1)
        one = _features(model, self._x1)
        if self._x2 is not None:
            return gram.product(one, _features(model, self._x2))
        kernel = one.new_zeros(len(one), len(one))
        gram.add_gram(kernel, one, one)
        gram.mirror(kernel)
        return kernel


def _features(model: nn.Module, x: Any) -> Tensor:
    """φ(x), (n, d)."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    found = []
    for start in range(0, example_count(x), EXAMPLES):
        captured = capture(model, some(x, slice(start, start + EXAMPLES)), names)
        last = [use for uses in captured.uses.values() for use in uses or () if use.output is captured.result]
        features = next((use.inputs[0] for use in last if isinstance(use, Outer)), None)
        if features is None:
            raise InputError(
                f"{type(model).__name__} does not end in a linear map, so it has no conjugate kernel: its result must "
                "be what the last nn.Linear returns"
            )
        found.append(features)
    return torch.cat(found).contiguous()
