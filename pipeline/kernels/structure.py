"""How the gradients of each trained tensor are to be had, found out once per model and proven against autograd.

On a few examples, with random weights w_ia, the captured gradients must reproduce

    Σ_ia w_ia J_ia = ∇_θ Σ_ia w_ia f_a(x_i)

for every tensor θ_l; those that do not (parameters used in C++, in custom functions, batches that come second, …) are
left to the generic path, which is right for every differentiable model. The check is made beside the model's own
parameters, at a random distance: a head that starts at zero would hide every other gradient. Models for which no
example has a gradient of its own are refused: those that mix their examples, and those that draw random numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from pipeline.errors import InputError
from pipeline.kernels.capture import Captured, capture, example_count, output_gradients, trained
from pipeline.kernels.rules import Convolution, Outer, Scaled, Unstructured, Use

CHECKED = 8  # examples of the check
# Relative to the size of the gradients: rounding stays far below, a wrong gradient far above.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Weight:
    """A linear map or convolution that a tensor is the weight of, by itself and once.

    Attributes:
        positions: T.
        inputs: d.
        outputs: e.
        head: its output is the model's.
        bias: name of the tensor that is its bias and nothing else.
        of_examples: its input is the examples themselves.
    """

    positions: int
    inputs: int
    outputs: int
    head: bool
    bias: str | None
    of_examples: bool


@dataclass(frozen=True)
class Structure:
    """What was found out about a model.

    Attributes:
        c: outputs.
        weights: by name, the tensors for which products of captured tensors are an alternative to their gradients.
        calls: the kinds of calls that take each tensor whose gradients follow from them, by name; none for a tensor
            that was not used.
        generic: names of the others.
        sizes: numbers in each tensor, by name.
        copied: calls that have to copy what the model changes in place afterwards.
        images: its examples are images, which the model takes in channels-last order too, the faster one.
        held: numbers that one example's captured tensors have together.
        widest: numbers of the largest captured output of one example.
    """

    c: int
    weights: dict[str, Weight]
    calls: dict[str, tuple[type[Use], ...] | None]
    generic: tuple[str, ...]
    sizes: dict[str, int]
    copied: frozenset[int]
    images: bool
    held: int
    widest: int

    def check(self, captured: Captured) -> None:
        """Raise Unstructured if the calls are others than those that were proven, as where the data choose layers."""
        if any(_kinds(captured.uses[name]) != kinds for name, kinds in self.calls.items()):
            raise Unstructured


# Per model and layout of its examples: what the structure depends on, how many examples have proven it, and it.
_known: "WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, int, Structure]]]" = WeakKeyDictionary()


def structure(model: nn.Module, x: Any) -> Structure:
    """The structure of `model` on examples like `x`; looked up if it is known already.

    Args:
        model: any module that treats examples independently; left as it was.
        x: examples.

    Raises:
        InputError: if the model has nothing that is trained, mixes its examples, is random, or has parameters of a
            dtype other than float32 and float64, or of two.
    """
    leaves, layout = tree_flatten(x)
    examples = (str(layout), *((leaf.shape[1:], leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)))
    depends = (
        [(id(tensor), tensor.dtype, tensor.requires_grad) for tensor in model.parameters()],
        [
            (type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
    )
    few = some(x, slice(0, CHECKED))
    known = _known.setdefault(model, {})
    before, proven, kept = known.get(examples, (None, 0, None))
    # One example cannot show which axis the examples are on, so the structure is looked for again when there are more.
    if kept is not None and before == depends and proven >= example_count(few):
        return kept
    _refuse_by_type(model)
    with _left_as_it_was(model):
        found = _inspect(model, few)
    if found is None:
        # A model that has diverged proves nothing: whatever gives its kernel gives one that is not finite.
        return unproven(model, few)
    known[examples] = depends, example_count(few), found
    return found


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Move the trained parameters at random, and in the end give the model and the random numbers back as they were.

    Through `.data`, which leaves a tensor's version as it is: the caller may hold a graph that is still to be used.
    """
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    devices = {tensor.device for tensor, _ in kept if tensor.device.type == "cuda"}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=devices):
        try:
            for tensor in trained(model).values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
                tensor.data.add_(noise * (0.1 * tensor.detach().square().mean().sqrt() + 0.02))
            yield
        finally:
            for tensor, value in kept:
                tensor.data.copy_(value)


def some(x: Any, rows: slice) -> Any:
    """Rows of a batch."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, x)


def channels_last(x: Any) -> Any:
    """A batch with its images (n, channels, height, width) in channels-last order."""

    def converted(leaf: Any) -> Any:
        is_images = isinstance(leaf, Tensor) and leaf.ndim == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_images else leaf

    return tree_map(converted, x)


def _kinds(uses: list[Use] | None) -> tuple[type[Use], ...] | None:
    return None if uses is None else tuple(type(use) for use in uses)


def _all(captured: Captured) -> Iterator[Use]:
    for uses in captured.uses.values():
        yield from uses or ()


def _inspect(model: nn.Module, x: Any) -> Structure | None:
    """What there is to know, from a few examples; None if something is not finite."""
    tensors = trained(model)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= TOLERANCE.keys():
        wrong = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(f"trained parameters of dtype {wrong}: must be all float32 or all float64")
    captured, copied = _captured(model, x, tensors)
    images = any(use.output.ndim == 4 for use in _all(captured) if isinstance(use, Convolution))
    if images:
        try:
            captured, copied = _captured(model, channels_last(x), tensors)
        except RuntimeError:  # a `view` that wants the other order
            images = False
    tolerance = TOLERANCE[dtypes.pop()]
    if not bool(torch.isfinite(captured.result).all()):
        return None
    _refuse_by_behaviour(model, x, captured.result.detach(), tolerance)
    right, absent = _proven(captured, tensors, tolerance)
    uses = {name: of for name in right if (of := captured.uses[name])}
    calls = {name: _kinds(captured.uses[name]) for name in (*uses, *absent) if captured.uses[name] is not None}
    outputs = {id(use.output): use.output.numel() for of in uses.values() for use in of}
    inputs = {one.data_ptr(): one.numel() for of in uses.values() for use in of for one in use.inputs}
    n = example_count(x)
    return Structure(
        c=captured.result.shape[1],
        weights=_weights(captured, uses, x),
        calls=calls,
        generic=tuple(name for name in tensors if name not in calls),
        sizes={name: tensor.numel() for name, tensor in tensors.items()},
        copied=frozenset(copied),
        images=images,
        held=(sum(outputs.values()) + sum(inputs.values())) // n,
        widest=max(outputs.values(), default=0) // n,
    )


def unproven(model: nn.Module, x: Any) -> Structure:
    """A structure that leaves everything to the generic path."""
    with torch.no_grad():
        c = model(some(x, slice(0, 1))).shape[1]
    sizes = {name: tensor.numel() for name, tensor in trained(model).items()}
    return Structure(c, {}, {}, tuple(sizes), sizes, frozenset(), False, 0, 0)


def _captured(model: nn.Module, x: Any, tensors: dict[str, Tensor]) -> tuple[Captured, set[int]]:
    """Capture, again with copies if the model changed something in place."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    captured = capture(model, x, names)
    if captured.modified:
        copied = captured.modified
        return capture(model, x, names, copied), copied
    return captured, set()


def _proven(captured: Captured, tensors: dict[str, Tensor], tolerance: float) -> tuple[list[str], list[str]]:
    """Names of the tensors whose captured gradients, weighted at random, are autograd's; and of those never used."""
    n, c = captured.result.shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, c, generator=generator, dtype=captured.result.dtype).to(captured.result.device)
    expected = torch.autograd.grad(
        captured.result, list(tensors.values()), weight, retain_graph=True, allow_unused=True
    )
    by_output = output_gradients(captured)
    sums: dict[str, tuple[float, float]] = {}  # distance from autograd's gradient, sum of the moduli of the terms
    absent: list[str] = []
    for (name, tensor), gradient in zip(tensors.items(), expected, strict=True):
        if gradient is None:
            absent.append(name)
        elif uses := captured.uses[name]:
            try:
                total, size = _weighted_sum(uses, by_output, weight, tensor.numel())
            except (Unstructured, RuntimeError):  # shapes that no rule foresaw
                continue
            sums[name] = float((total - gradient.reshape(-1)).abs().sum()), size
    # A gradient that cancels, as of a bias before a normalisation, is rounding of the others.
    rounding = 100 * torch.finfo(weight.dtype).eps
    largest = max((size / tensors[name].numel() for name, (_, size) in sums.items()), default=0.0)
    right = [
        name
        for name, (distance, size) in sums.items()
        if distance <= max(tolerance * size, rounding * largest * tensors[name].numel())
    ]
    return right, absent


def _weighted_sum(uses: list[Use], by_output: list[dict[int, Tensor]], weight: Tensor, p: int) -> tuple[Tensor, float]:
    """Σ_ia w_ia J_ia of one tensor (p_l,), and the sum of the moduli of its terms."""
    total, size = weight.new_zeros(p), 0.0
    for column, gradients in zip(weight.T, by_output, strict=True):
        rows = gradient_rows(uses, gradients, weight.new_empty(len(weight), p))
        total += column @ rows
        size += float(column.abs() @ rows.abs().sum(1))
    return total, size


@torch.no_grad()
def gradient_rows(uses: list[Use], gradients: dict[int, Tensor], rows: Tensor) -> Tensor:
    """∂f_a/∂θ_l of each example, summed over the calls that take θ_l.

    Args:
        uses: those calls.
        gradients: B of each call, by the id of its output.
        rows: (n, p_l), overwritten.

    Returns:
        `rows`.
    """
    first, *others = uses
    first.write_gradients(gradients[id(first.output)], rows)
    for use in others:
        more = torch.empty_like(rows, memory_format=torch.contiguous_format)
        use.write_gradients(gradients[id(use.output)], more)
        rows += more
    return rows


def _weights(captured: Captured, uses: dict[str, list[Use]], x: Any) -> dict[str, Weight]:
    """The tensors that are the weight of one call and nothing else, with that call's bias."""
    n = example_count(x)
    alone = {name: found[0] for name, found in uses.items() if len(found) == 1}
    biases = {id(use.output): name for name, use in alone.items() if isinstance(use, Scaled) and not use.inputs}
    found = {}
    for name, use in alone.items():
        if not isinstance(use, Outer | Convolution) or (isinstance(use, Outer) and use.transposed):
            continue
        a, b = use.factors(use.output.detach(), n)
        (one,), leaf = use.inputs, tree_leaves(x)[0]
        found[name] = Weight(
            positions=a.shape[1],
            inputs=a.shape[2],
            outputs=b.shape[2],
            head=use.output is captured.result,
            bias=biases.get(id(use.output)),
            of_examples=leaf is x and (one.data_ptr(), one.numel()) == (leaf.data_ptr(), leaf.numel()),
        )
    return found


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_by_type(model: nn.Module) -> None:
    """Refuse what is known to mix examples or to be random, saying what to do."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameter with requires_grad: its kernel is empty")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
            raise InputError(
                f"module {name!r} is a {type(module).__name__} on batch statistics, which couples the examples: "
                "call model.eval() to use running statistics (with track_running_stats=True)"
            )
        if isinstance(module, DROPOUTS) and module.training and module.p > 0:
            raise InputError(
                f"module {name!r} is a live {type(module).__name__}, so the kernel is random: call model.eval()"
            )


@torch.no_grad()
def _refuse_by_behaviour(model: nn.Module, x: Any, result: Tensor, tolerance: float) -> None:
    """Refuse a model whose outputs change from call to call, or with the other examples of the batch."""
    scale = tolerance * float(result.abs().max()) or tolerance
    if not bool(torch.isfinite(result).all()):
        return  # a model that has diverged: its kernel is not finite either, which is for the caller to find
    what = type(model).__name__
    if float((model(x) - result).abs().max()) > scale:
        raise InputError(
            f"{what} gives other outputs when it is called again, so its kernel is random: call model.eval(), or fix "
            "what it draws"
        )
    if len(result) > 1:
        apart = torch.cat([model(some(x, slice(i, i + 1))) for i in range(len(result))])
        if float((apart - result).abs().max()) > scale:
            raise InputError(
                f"{what} gives an example other outputs beside other examples, so no example has a gradient of its "
                "own: replace what couples the batch (statistics or softmax over examples), or call model.eval()"
            )
