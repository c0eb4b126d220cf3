"""One forward pass that watches every call which takes a trained tensor, and the backward passes to those calls.

A `TorchFunctionMode` sees each of torch's functions as the model calls it, so what is captured is how the tensors are
really used, not which modules own them: functional calls, tied weights and modules that are called several times are
seen as they are. What the mode does not see (code in C++, custom autograd functions) shows when the captured gradients
are compared with autograd's, in `structure`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import InputError
from pipeline.kernels.rules import RULES, Unstructured, Use


@dataclass
class Captured:
    """What a forward pass on n examples left.

    Attributes:
        result: the model's output (n, c), with a graph.
        uses: the calls that take each tensor, by its name, in order; None if one of them has no rule.
        modified: calls, by number, whose input or output was changed in place afterwards.
    """

    result: Tensor
    uses: dict[str, list[Use] | None]
    modified: set[int]


def capture(model: Callable[[Any], Tensor], x: Any, names: dict[int, str], copied: Collection[int] = ()) -> Captured:
    """Call the model and watch.

    Args:
        model: maps the examples to (n, c).
        x: n examples, a tensor or nested containers of tensors.
        names: the tensors to watch, id -> name.
        copied: calls, by number, whose input and output are copied because the model changes them later.

    Raises:
        InputError: if the result is not (n, c).
    """
    watch = _Watch(names, copied)
    with torch.enable_grad(), watch:
        result = model(x)
    n = example_count(x)
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != n:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
        raise InputError(f"the model's output for {n} examples has {got}: it must have shape (n, outputs)")
    modified = {number for number, tensors in watch.kept for tensor, version in tensors if tensor._version != version}
    return Captured(result, watch.uses, modified)


def example_count(x: Any) -> int:
    """n, the length of every tensor of a batch.

    Raises:
        InputError: if there is no tensor, or they differ in length.
    """
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(f"examples with {sorted(lengths) or 'no'} rows: every tensor must have the same n >= 1 rows")
    return lengths.pop()


@dataclass
class _Watch(TorchFunctionMode):
    names: dict[int, str]
    copied: Collection[int]
    uses: dict[str, list[Use] | None] = field(default_factory=dict)
    kept: list[tuple[int, list[tuple[Tensor, int]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.uses = {name: [] for name in self.names.values()}
        self._calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        taken = {id(value) for value in _values((*args, *kwargs.values())) if id(value) in self.names}
        if not taken or not any(isinstance(value, Tensor) and value.requires_grad for value in _values((output,))):
            return output
        number, self._calls = self._calls, self._calls + 1
        if number in self.copied:
            args, kwargs = _copied(args, kwargs, self.names)
        for name, use in self._found(function, output, args, kwargs, taken):
            uses = self.uses[name]
            if use is None or uses is None:
                self.uses[name] = None
                continue
            uses.append(use)
            self.kept.append((number, [(tensor, tensor._version) for tensor in (use.output, *use.inputs)]))
        return output.clone() if number in self.copied else output

    def _found(
        self, function: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], taken: set[int]
    ) -> list[tuple[str, Use | None]]:
        """What the call does with each watched tensor that it takes; None where no rule says."""
        rule, found = RULES.get(function), []
        if rule is not None and isinstance(output, Tensor):
            try:
                found = [(tensor, use) for tensor, use in rule(output, *args, **kwargs) if id(tensor) in taken]
            except (Unstructured, TypeError):  # TypeError: a signature that the rule does not know
                found = []
        left = taken - {id(tensor) for tensor, _ in found}
        return [(self.names[id(tensor)], use) for tensor, use in found] + [(self.names[key], None) for key in left]


def _values(arguments: Iterable[Any]) -> Iterator[Any]:
    """What a call is given, with what is in containers; most calls have none, and there are many calls."""
    for argument in arguments:
        if isinstance(argument, tuple | list | dict):
            yield from tree_leaves(argument)
        else:
            yield argument


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any], names: dict[int, str]) -> tuple[tuple[Any, ...], Any]:
    """The arguments with tensors that the model may change replaced by copies; watched ones stay themselves."""

    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) and id(value) not in names else value

    return tuple(map(copy, args)), {name: copy(value) for name, value in kwargs.items()}


def output_gradients(captured: Captured) -> list[dict[int, Tensor]]:
    """∂f_a/∂output of every captured call, for each output a: id of the output -> B, its shape the output's.

    Examples are independent, so the gradient of an output summed over examples has each example's own in its row.
    """
    outputs = list({id(use.output): use.output for uses in captured.uses.values() for use in uses or ()}.values())
    c = captured.result.shape[1]
    if not outputs:
        return [{} for _ in range(c)]
    found = []
    with torch.enable_grad():
        for a in range(c):
            value = captured.result[:, a].sum()
            gradients = torch.autograd.grad(value, outputs, retain_graph=a + 1 < c, materialize_grads=True)
            found.append({id(output): gradient for output, gradient in zip(outputs, gradients, strict=True)})
    return found


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters with requires_grad by name, each tensor once."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
