"""What one call that takes a trained tensor contributes to the Jacobian of each example.

A call is one of torch's functions as the model uses it: `F.linear(x, W, b)`, `x + position`, and so on. With A_i its
input for example i and B_i = ∂f_a(x_i)/∂output, a tensor it takes has the gradient

    outer      Σ_t B_it A_itᵀ             weight of a linear map or a convolution over T positions t
    scaled     Σ B_i ∘ M_i                gain of a normalisation, factor of a product; M_i is what it multiplies
    summed     Σ B_i                      bias, shift, learned position: as scaled, with M_i = 1
    scattered  row v: Σ_{t: id_it = v} B_it    table of an embedding

where the plain sums run over the axes along which the tensor was broadcast. Nothing here knows modules, so a layer of
the user's own has the same rules as one of torch's. A tensor that is used in any other way has no rule.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Examples whose patches are copied at once: the copy then stays in the cache until it is multiplied.
PATCH_EXAMPLES = 16


class Unstructured(Exception):
    """A call that no rule covers; its tensors are left to the generic path."""


class Use(ABC):
    """One call that takes a trained tensor.

    Attributes:
        shape: of the tensor.
        output: what the call returned; B is the gradient with respect to it.
        inputs: what of the call's inputs is needed later: one tensor, or none.
    """

    def __init__(self, shape: torch.Size, output: Tensor, *inputs: Tensor) -> None:
        self.shape, self.output = shape, output
        self.inputs = tuple(tensor.detach() for tensor in inputs)

    @abstractmethod
    def write_gradients(self, gradient: Tensor, rows: Tensor) -> None:
        """Write the gradients of one output of each example.

        Args:
            gradient: B, the shape of `output`.
            rows: (n, p_l), overwritten; rows may lie apart, the numbers of a row may not.
        """


def by_example(tensor: Tensor, n: int) -> Tensor:
    """(n, ...) of a tensor whose first axis runs over examples, or over examples and within each over positions."""
    if tensor.ndim == 0 or len(tensor) % n:
        raise Unstructured
    return tensor if len(tensor) == n else tensor.unflatten(0, (n, -1))


@final
class Outer(Use):
    """Weight W (e, d) of `x Wᵀ`; or (d, e) of `x W` if `transposed`."""

    def __init__(self, shape: torch.Size, output: Tensor, input: Tensor, transposed: bool = False) -> None:
        super().__init__(shape, output, input)
        self.transposed = transposed

    def factors(self, gradient: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """A (n, T, d) and B (n, T, e)."""
        a, b = (by_example(tensor, n) for tensor in (*self.inputs, gradient))
        return a.reshape(n, -1, a.shape[-1]), b.reshape(n, -1, b.shape[-1])

    def write_gradients(self, gradient: Tensor, rows: Tensor) -> None:
        """Σ_t B_it A_itᵀ."""
        a, b = self.factors(gradient, len(rows))
        one, two = (a, b) if self.transposed else (b, a)
        batched_product(one.transpose(1, 2), two, rows.unflatten(1, self.shape))


@final
class Convolution(Use):
    """Weight (e, channels, *kernel) of a convolution: a linear map of the patches, d = channels times places in it.

    Patches are copied as windows of the padded input, one per place in the kernel, each with its channels side by side:
    the order in which an input in torch's channels-last format lies in memory.
    """

    def __init__(
        self, shape: torch.Size, output: Tensor, padded: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
    ) -> None:
        super().__init__(shape, output, padded)
        self.stride, self.dilation = stride, dilation

    def patches(self, examples: slice, buffer: Tensor | None = None) -> Tensor:
        """Patches of some examples (m, T, d), the channels within each place of the kernel."""
        padded, kernel, sizes = self.inputs[0][examples].movedim(1, -1), self.shape[2:], self.output.shape[2:]
        m, channels = len(padded), padded.shape[-1]
        if buffer is None:
            buffer = padded.new_empty(m, *sizes, math.prod(kernel), channels)
        for place, offsets in enumerate(product(*map(range, kernel))):
            window = (
                slice(offset * spread, offset * spread + step * (size - 1) + 1, step)
                for offset, spread, step, size in zip(offsets, self.dilation, self.stride, sizes, strict=True)
            )
            buffer[:m, ..., place, :] = padded[(slice(None), *window)]
        return buffer[:m].flatten(-2).flatten(1, -2)

    def factors(self, gradient: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """A (n, T, d), the patches, and B (n, T, e)."""
        return self.patches(slice(n)), gradient.flatten(2).transpose(1, 2)

    def write_gradients(self, gradient: Tensor, rows: Tensor) -> None:
        """Σ_t B_it A_itᵀ, a few examples at a time."""
        n, e = gradient.shape[:2]
        channels, places = self.shape[1], math.prod(self.shape[2:])
        gradient, matrices = gradient.flatten(2), rows.unflatten(1, (e, channels, places))
        few = min(n, PATCH_EXAMPLES)
        buffer = rows.new_empty(few, *self.output.shape[2:], places, channels)
        products = rows.new_empty(few, e, places * channels)
        for start in range(0, n, few):
            some = slice(start, min(n, start + few))
            found = products[: some.stop - start]
            batched_product(gradient[some], self.patches(some, buffer), found)
            matrices[some] = found.unflatten(2, (places, channels)).transpose(2, 3)


def batched_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A_i B_i of each example.

    In one thread on the CPU by numpy, which writes to rows that lie apart without a copy; with more, by torch, whose
    threads are the ones at work here.
    """
    if a.device.type == "cpu" and torch.get_num_threads() == 1:
        np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    else:
        out.copy_(torch.bmm(a, b))


@final
class Scaled(Use):
    """A tensor that multiplies, or is added to, what comes in, broadcast along the axes where it has length 1.

    Args:
        shape: the tensor's, followed by 1s if its axes are not the last ones of the output.
        output: what the call returned.
        inputs: M, what the tensor multiplies; nothing if it is added.
    """

    def write_gradients(self, gradient: Tensor, rows: Tensor) -> None:
        """Σ B_i ∘ M_i over the axes along which the tensor was broadcast."""
        n = len(rows)
        found = by_example(math.prod(self.inputs, start=gradient), n)
        shape = list(self.shape)
        if len(shape) == found.ndim and shape[0] == 1:
            shape = shape[1:]  # it has an axis for the examples
        before = found.ndim - len(shape)
        if before < 1:
            raise Unstructured
        broadcast = [before + i for i, size in enumerate(shape) if size == 1]
        axes = [*range(1, before), *broadcast]
        rows.copy_((found.sum(axes) if axes else found).reshape(n, -1))


@final
class Scattered(Use):
    """Table (v, d) of an embedding, whose input is the row of each token."""

    def __init__(self, shape: torch.Size, output: Tensor, tokens: Tensor, padding: int | None) -> None:
        super().__init__(shape, output, tokens)
        self.padding = padding

    def write_gradients(self, gradient: Tensor, rows: Tensor) -> None:
        """Each token's gradient, added to its row of the table."""
        n, d = len(rows), self.shape[1]
        tokens = by_example(self.inputs[0], n).reshape(n, -1, 1)
        found = by_example(gradient, n).reshape(n, -1, d)
        if self.padding is not None:
            found = found * (tokens != self.padding)
        rows.zero_()
        rows.unflatten(1, self.shape).scatter_add_(1, tokens.expand(-1, -1, d), found)


# --- torch's functions ------------------------------------------------------------------------------------------------

Found = Iterator[tuple[Tensor | None, Use]]


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    yield weight, Outer(weight.shape, output, input)
    if bias is not None:
        yield bias, Scaled(bias.shape, output)


def _matmul(output: Tensor, input: Tensor, other: Tensor) -> Found:
    if other.ndim != 2 or input.ndim < 2:
        raise Unstructured
    yield other, Outer(other.shape, output, input, transposed=True)


def _convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Found:
    kernel = weight.shape[2:]
    if groups != 1 or input.ndim != len(kernel) + 2:
        raise Unstructured
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        total = [spread * (size - 1) for spread, size in zip(dilations, kernel, strict=True)]
        pads = [(one // 2, one - one // 2) for one in total]
    else:
        pads = [(one, one) for one in _each(0 if padding == "valid" else padding, kernel)]
    # F.pad names the last axis first.
    padded = F.pad(input.detach(), [size for pair in reversed(pads) for size in pair]) if any(map(any, pads)) else input
    yield weight, Convolution(weight.shape, output, padded, strides, dilations)
    if bias is not None:
        yield bias, Scaled(_channels(bias, output), output)


def _each(value: Any, kernel: torch.Size) -> tuple[int, ...]:
    """One number per axis of a kernel."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _sum(output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Found:
    if alpha != 1:
        raise Unstructured
    for one, two in ((input, other), (other, input)):
        if isinstance(one, Tensor) and one is not two:
            yield one, Scaled(one.shape, output)


def _multiple(output: Tensor, input: Any, other: Any) -> Found:
    for one, two in ((input, other), (other, input)):
        if isinstance(one, Tensor) and one is not two:
            yield one, Scaled(one.shape, output, two if isinstance(two, Tensor) else torch.full_like(output, two))


def _expanded(output: Tensor, input: Tensor, *sizes: Any) -> Found:
    yield input, Scaled(input.shape, output)


def _repeated(output: Tensor, input: Tensor, *sizes: Any) -> Found:
    if output.shape[1:] != input.shape[1:] or len(input) != 1:
        raise Unstructured
    yield input, Scaled(input.shape, output)


def _embedding(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise Unstructured
    padding = None if padding_idx is None else padding_idx % len(weight)
    yield weight, Scattered(weight.shape, output, input, padding)


def _channels(tensor: Tensor, output: Tensor) -> torch.Size:
    """The shape of one number per channel beside outputs (n, channels, ...)."""
    return torch.Size([len(tensor), *[1] * (output.ndim - 2)])


def _normalised(function: Callable[..., Tensor], channels: bool) -> Callable[..., Found]:
    """The rule of a normalisation: its gain multiplies the result without gain and shift."""
    signature = inspect.signature(function)

    def rule(output: Tensor, *args: Any, **options: Any) -> Found:
        given = signature.bind(*args, **options).arguments
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        if weight is not None:
            with torch.no_grad():
                plain = function(**given)
            yield weight, Scaled(_channels(weight, output) if channels else weight.shape, output, plain)
        if bias is not None:
            yield bias, Scaled(_channels(bias, output) if channels else bias.shape, output)

    return rule


RULES: dict[Any, Callable[..., Found]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.embedding: _embedding,
    F.layer_norm: _normalised(F.layer_norm, channels=False),
    F.rms_norm: _normalised(F.rms_norm, channels=False),
    F.group_norm: _normalised(F.group_norm, channels=True),
    F.instance_norm: _normalised(F.instance_norm, channels=True),
    F.batch_norm: _normalised(F.batch_norm, channels=True),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _sum),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiple),
    Tensor.expand: _expanded,
    Tensor.repeat: _repeated,
}
