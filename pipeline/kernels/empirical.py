"""The empirical neural tangent kernel of a model on given examples.

    K_ij^ab = Σ_l w_l² Σ_{θ in l} (∂f_a(x_i)/∂θ) (∂f_b(x_j)/∂θ),    w_l = 1 unless asked for

over the trained tensors θ_l. One forward pass, and a backward pass per output, capture what the gradients of linear
maps, convolutions, embeddings, normalisations and free parameters follow from (`rules`); what has no such structure
takes the generic path (`generic`). How the parts are put together is in `terms`.

Sources: Jacot, Gabriel, Hongler (2018), arXiv 1806.07572; Novak, Sohl-Dickstein, Schoenholz (2022), arXiv 2206.08720;
Tan, Wu, Huang (2021), arXiv 2103.11558 (the weights w_l).
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.errors import InputError
from pipeline.kernels import gram
from pipeline.kernels.capture import capture, example_count, output_gradients, trained
from pipeline.kernels.generic import jacobians
from pipeline.kernels.rules import Unstructured
from pipeline.kernels.structure import Structure, channels_last, some, structure, unproven
from pipeline.kernels.terms import Kept, Measured, Product, Setting, Term, Where, terms_of

Outputs = Literal["trace", "full"]
Method = Literal["auto", "jacobian"]

MEMORY = 2**30
# Of the widest output captured at once: larger buffers are fresh pages of the system every time.
CAPTURE_BYTES = 2**22
GENERIC_BYTES = 2**26  # of the gradients that the generic path gives at once
# Of the Gram matrices that are kept beside the newest: those of a few datasets, for all steps and learning rates.
GRAM_BYTES = 2**27


class NTK:
    """The kernel on fixed examples, for many evaluations of a model whose parameters change.

    It keeps what does not depend on the parameters, the Gram matrix of the inputs, and the memory to work in. One
    object serves one thread.

    Args:
        x1: n1 examples: a tensor (n1, ...), or a tuple, list or dict of such tensors, with which the model is called
            as it is; on the model's device, and not to be changed afterwards.
        x2: n2 examples, or None for x1, which gives an exactly symmetric kernel.
        outputs: "trace" sums the kernels of the c outputs, "full" keeps each pair of outputs.
        layers: give the part of each trained tensor by itself; their sum is the kernel.
        weights: w_l by name of tensor, or by a beginning of names that ends before a dot; 1 for the others.
        method: "auto", or "jacobian" to take every gradient by the generic path.
        memory: bytes to work in, beside the examples and the kernel. More examples than fit at once are taken in
            blocks, whose forward and backward passes are then made once per pair of blocks.
        keep: keep the Gram matrix of the inputs for later calls, of other kernels on the same examples too.

    Attributes:
        predictions: f(x1) at the last call, (n1, c); None where nothing was captured, as with method "jacobian".

    Raises:
        InputError: if the arguments do not fit.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> NTK(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))(model)
        tensor([[25.,  4.],
                [ 4.,  1.]])
    """

    def __init__(
        self,
        x1: Any,
        x2: Any = None,
        *,
        outputs: Outputs = "trace",
        layers: bool = False,
        weights: Mapping[str, float] | None = None,
        method: Method = "auto",
        memory: int = MEMORY,
        keep: bool = True,
    ) -> None:
        if outputs not in ("trace", "full"):
            raise InputError(f"outputs = {outputs!r}: must be 'trace' or 'full'")
        if method not in ("auto", "jacobian"):
            raise InputError(f"method = {method!r}: must be 'auto' or 'jacobian'")
        shapes = [[leaf.shape[1:] for leaf in tree_leaves(x) if isinstance(leaf, Tensor)] for x in (x1, x2)]
        if x2 is not None and shapes[0] != shapes[1]:
            one, two = (", ".join(str(tuple(shape)) for shape in of) for of in shapes)
            raise InputError(f"x1 and x2 have examples of shape {one} and {two}: must be the same")
        self._x1, self._x2, self._symmetric = x1, x1 if x2 is None else x2, x2 is None
        self._n1, self._n2 = example_count(self._x1), example_count(self._x2)
        self._full, self._layers, self._method = outputs == "full", layers, method
        self._memory, self._keep = memory, keep
        self._weights = dict(weights or {})
        self._buffers: dict[str, Tensor] = {}
        self._digest: str | None = None
        self.predictions: Tensor | None = None

    def __call__(self, model: nn.Module) -> Any:
        """The kernel of `model` as it is now; the model, its gradients and modes are left as they were.

        Returns:
            In the model's dtype, in memory that the next call overwrites: (n1, n2) for the trace, (n1, n2, c, c) for
            all pairs of outputs; with `layers` a dict of such kernels by name of tensor.

        Raises:
            InputError: if the model mixes its examples or draws random numbers, has nothing that is trained or not
                the tensors that `weights` names, or two examples do not fit into the memory.
        """
        widest = self._x1 if self._n1 >= self._n2 else self._x2
        known = structure(model, widest)
        if self._method == "auto":
            try:
                return self._kernel(model, known)
            except Unstructured:
                pass  # the data choose what is called, and these choose otherwise
        return self._kernel(model, unproven(model, widest))

    def _kernel(self, model: nn.Module, known: Structure) -> Any:
        """The kernel by way of a structure."""
        like = next(iter(trained(model).values())).detach()
        setting = Setting(known.c, self._full, _factors(self._weights, known))
        terms = terms_of(known, setting, self._layers, lambda *names: self._inputs(like, names, setting.factors))
        work = _Work(model, known, terms, like, known.c if self._full else 1)
        size, c = self._block(work), work.c
        self.predictions = like.new_empty(self._n1, known.c) if known.calls else None
        kernels: dict[str, Tensor] = {}
        for i, rows in enumerate(_blocks(self._n1, size)):
            left = self._kept(work, self._x1, rows, "left")
            for j, columns in enumerate(_blocks(self._n2, size)):
                if self._symmetric and j > i:
                    break
                same = self._symmetric and i == j
                right = left if same else self._kept(work, self._x2, columns, "right")
                parts = self._parts(work, left, right, (rows, columns))
                if size >= max(self._n1, self._n2):
                    kernels = parts
                    continue
                for group, part in parts.items():
                    whole = self._buffer(f"whole {group}", like, self._n1 * c, self._n2 * c)
                    whole[rows.start * c : rows.stop * c, columns.start * c : columns.stop * c] = part
                    kernels[group] = whole
        for kernel in kernels.values():
            if self._symmetric:
                gram.mirror(kernel)
        if self._layers:  # no output depends on a tensor that has no term
            for name in known.sizes.keys() - kernels.keys():
                kernels[name] = like.new_zeros(self._n1 * c, self._n2 * c)
        if self._full:
            kernels = {
                group: kernel.view(self._n1, c, self._n2, c).transpose(1, 2) for group, kernel in kernels.items()
            }
        return kernels if self._layers else kernels[""]

    def _block(self, work: "_Work") -> int:
        """How many examples are taken at once.

        Raises:
            InputError: if there is no room for two.
        """
        most = max(self._n1, self._n2)
        each, fixed = work.kept_bytes, work.fixed_bytes(most, self._memory)
        if (self._n1 if self._symmetric else self._n1 + self._n2) * each + fixed <= self._memory:
            return most
        size = (self._memory - fixed) // (2 * each)
        if size < 1:
            raise InputError(
                f"memory = {self._memory}: two examples of this model need {2 * each + fixed} bytes beside the kernel; "
                "give more, or fewer examples"
            )
        return size

    def _kept(self, work: "_Work", x: Any, rows: slice, side: str) -> list[Kept]:
        """What the terms keep of some examples."""
        n, known = rows.stop - rows.start, work.known
        kept = [
            tuple(
                self._buffer(f"{side} {term.names[0]} {i}", work.like, n, *shape) for i, shape in enumerate(term.shapes)
            )
            for term in work.terms
        ]
        parameters = trained(work.model)
        names = {id(parameters[name]): name for name in known.calls}
        step = work.captured_at_once(n, self._memory)
        with gram.one_blas_thread():
            for start in range(0, n, step):
                few = slice(start, min(n, start + step))
                examples = some(x, slice(rows.start + few.start, rows.start + few.stop))
                if known.images:
                    examples = channels_last(examples)
                captured = capture(work.model, examples, names, known.copied) if names else None
                if captured:
                    known.check(captured)
                    if side == "left" and self.predictions is not None:
                        self.predictions[rows][few] = captured.result.detach()
                measured = Measured(
                    captured.uses if captured else {},
                    output_gradients(captured) if captured else [],
                    jacobians(work.model, examples, known.generic, known.c) if known.generic else {},
                )
                with torch.no_grad():
                    for term, tensors in zip(work.terms, kept, strict=True):
                        term.fill(tuple(tensor[few] for tensor in tensors), measured)
        return kept

    def _parts(self, work: "_Work", left: list[Kept], right: list[Kept], where: Where) -> dict[str, Tensor]:
        """The kernel of two blocks of examples; by name of tensor if the layers are kept apart."""
        height, width = (rows.stop - rows.start for rows in where)
        parts: dict[str, Tensor] = {}
        with torch.no_grad(), gram.one_blas_thread():
            for term, one, two in zip(work.terms, left, right, strict=True):
                group = term.names[0] if self._layers else ""
                if group not in parts:
                    parts[group] = self._buffer(f"part {group}", work.like, height * work.c, width * work.c).zero_()
                term.add(parts[group], one, two, where)
        return parts

    def _buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory to work in, overwritten by the next use of `name`; a smaller shape is a part of it."""
        numbers = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numbers or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = like.new_empty(numbers)
        return buffer[:numbers].view(shape)

    def _inputs(self, like: Tensor, names: tuple[str, str | None], factors: Mapping[str, float]) -> Tensor | None:
        """w² x x'ᵀ + w_b² of the examples, kept for all steps and for other kernels on the same examples.

        None if it is not to be kept, or takes more than half of the memory.
        """
        if not self._keep or 2 * self._n1 * self._n2 * like.element_size() > self._memory:
            return None
        x1, x2 = (x.detach().flatten(1) for x in (self._x1, self._x2))
        if self._digest is None:
            self._digest = "".join(
                hashlib.blake2b(x.numpy(force=True).tobytes(), digest_size=16).hexdigest() for x in (x1, x2)
            )
        weight, bias = names
        scale, shift = factors.get(weight, 1.0), 0.0 if bias is None else factors.get(bias, 1.0)
        key = (self._digest, x1.shape, x2.shape, x1.dtype, x1.device, scale, shift)
        if key not in _grams:
            with gram.one_blas_thread():
                product = gram.product(x1, x1 if self._symmetric else x2)
            while sum(kept.numel() * kept.element_size() for kept in _grams.values()) > GRAM_BYTES:
                _grams.popitem(last=False)
            _grams[key] = product.mul_(scale**2).add_(shift**2)
        _grams.move_to_end(key)
        return _grams[key]


class BlockPairs:
    """The NTK summed over outputs between blocks of examples; blocks that were used last are not captured again.

    The model must not change meanwhile. A kernel has the same bits whatever is kept.

    Args:
        model: maps n examples to (n, c), each on its own.
        x: all examples (n, ...).
        size: examples of a block, at most.
        memory: as of `NTK`, for the kernel of two blocks.
        spare: bytes beside that, for what was captured of further blocks.
        weights: as of `NTK`.

    Attributes:
        held: how many blocks can be kept, two of which are those in use; none where two blocks do not fit into the
            memory and are taken in parts.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        size: int,
        memory: int = MEMORY,
        spare: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._model, self._x = model, x
        self._options: dict[str, Any] = {"weights": weights, "memory": memory, "keep": False}
        self._ntk = NTK(x, **self._options)
        known = structure(model, x)  # found on the first examples, whichever block is the first
        like, size = next(iter(trained(model).values())).detach(), min(size, len(x))
        setting = Setting(known.c, False, _factors(dict(weights or {}), known))
        self._work = _Work(model, known, terms_of(known, setting, False, lambda *_: None), like, 1)
        block = size * self._work.kept_bytes
        fits = 2 * block + self._work.fixed_bytes(size, memory) <= memory
        self.held = 2 + spare // max(block, 1) if fits else 0
        self._blocks: OrderedDict[tuple[int, int], tuple[str, list[Kept]]] = OrderedDict()

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        """The kernel of two blocks, in memory that the next call overwrites; exactly symmetric for twice the same.

        Raises:
            InputError: as `NTK` and its call.
        """
        if self.held:
            try:
                left = self._kept(rows)
                right = left if rows == columns else self._kept(columns)
                kernel = self._ntk._parts(self._work, left, right, (rows, columns))[""]
                if rows == columns:
                    gram.mirror(kernel)
                return kernel
            except Unstructured:
                self._blocks.clear()  # the data choose what is called, and these choose otherwise
        return NTK(self._x[rows], None if rows == columns else self._x[columns], **self._options)(self._model)

    def _kept(self, rows: slice) -> list[Kept]:
        """What is kept of a block, captured if it is not there; the one that was not used for longest makes room."""
        key = rows.start, rows.stop
        if key in self._blocks:
            self._blocks.move_to_end(key)
        else:
            room = f"block {len(self._blocks)}"
            if len(self._blocks) == self.held:
                _, (room, _) = self._blocks.popitem(last=False)
            self._blocks[key] = room, self._ntk._kept(self._work, self._x, rows, room)
        return self._blocks[key][1]


@dataclass(frozen=True)
class _Work:
    """One evaluation.

    Attributes:
        model: what is evaluated.
        known: its structure.
        terms: the parts of its kernel.
        like: a tensor of the kernel's dtype and device.
        c: rows of the kernel per example.
    """

    model: nn.Module
    known: Structure
    terms: list[Term]
    like: Tensor
    c: int

    @property
    def kept_bytes(self) -> int:
        """Of what the terms keep of an example."""
        return sum(math.prod(shape) for term in self.terms for shape in term.shapes) * self.like.element_size()

    def fixed_bytes(self, most: int, memory: int) -> int:
        """Beside that, for blocks of at most so many examples: while they are captured, and for their products."""
        inputs = (term.inputs for term in self.terms if isinstance(term, Product))
        numbers = 2 * min(gram.TILE, most) * most * self.c + sum(gram.numel() for gram in inputs if gram is not None)
        captured = self.captured_at_once(most, memory) * self.captured_bytes
        return captured + numbers * self.like.element_size()

    @property
    def generic_numbers(self) -> int:
        """Of an example's gradients that take the generic path."""
        return self.known.c * sum(self.known.sizes[name] for name in self.known.generic)

    @property
    def captured_bytes(self) -> int:
        """Of an example while it goes through the model: what is captured and its gradients, and the generic ones.

        Those are three times there: as torch.func makes them, chunk by chunk, joined, and in the order of outputs.
        """
        return ((2 + self.known.c) * self.known.held + 3 * self.generic_numbers) * self.like.element_size()

    def captured_at_once(self, n: int, memory: int) -> int:
        """How many of n examples go through the model together."""
        item = self.like.element_size()
        limits = (
            (CAPTURE_BYTES, self.known.widest * item),
            (GENERIC_BYTES, self.generic_numbers * item),
            (memory // 4, self.captured_bytes),
        )
        return max(1, min(n, *(most // each for most, each in limits if each)))


_grams: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


def _blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive rows, at most `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _factors(weights: Mapping[str, float], known: Structure) -> dict[str, float]:
    """w_l by name of tensor; the longest beginning that fits counts."""
    found: dict[str, float] = {}
    for start in sorted(weights, key=len):
        fitting = [name for name in known.sizes if name == start or name.startswith(f"{start}.")]
        if not fitting or not math.isfinite(weights[start]):
            raise InputError(
                f"weights: {start!r} = {weights[start]}: must be a finite number for one of {', '.join(known.sizes)}, "
                "or for a beginning of such names"
            )
        found |= dict.fromkeys(fitting, float(weights[start]))
    return found


def empirical_ntk(model: nn.Module, x1: Any, x2: Any = None, **options: Any) -> Any:
    """The kernel of one model on one set of examples; `NTK` does the same for many evaluations.

    Args:
        model: maps n examples to (n, c), each on its own.
        x1: n1 examples.
        x2: n2 examples, or None for x1.
        options: `outputs`, `layers`, `weights`, `method` and `memory` of `NTK`.

    Returns:
        (n1, n2), or (n1, n2, c, c) for outputs="full"; with layers=True a dict of such kernels.

    Raises:
        InputError: as `NTK` and its call.
    """
    return NTK(x1, x2, **options)(model)
