"""The parts of a kernel, each from one weight with its bias or from several tensors, and which form each part takes.

With A and B the captured input and output gradient of a linear map or convolution over T positions, d inputs and e
outputs, its part of the trace kernel over c outputs of the model is, whichever is cheapest,

    head        c (A Aᵀ + 1)                       T = 1, its output is the model's
    product     (A Aᵀ + 1) ∘ (B Bᵀ)                T = 1 and d + c e < c d e
    pairs       Σ_ts (A_t A_sᵀ + 1) ∘ (B_t B_sᵀ)   T² (d + c e) < c d e
    gradients   J_l J_lᵀ                           otherwise, and for every other tensor

where the 1 is the bias. For all pairs of outputs the condition is T² (d / c² + e) < d e. The costs are those of the
products of n² pairs of examples; at equal cost gradients are faster.

Source: Novak, Sohl-Dickstein, Schoenholz (2022), arXiv 2206.08720, section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast, final

from torch import Tensor

from pipeline.kernels import gram
from pipeline.kernels.rules import Convolution, Outer, Use
from pipeline.kernels.structure import Structure, Weight, gradient_rows

COLUMNS = 16_384  # of one block of gradients

Kept = tuple[Tensor, ...]
Where = tuple[slice, slice]


@dataclass(frozen=True)
class Measured:
    """Gradients of some examples.

    Attributes:
        uses: the calls that take each captured tensor, by name.
        gradients: B of each captured call, for each output, by id of the call's output.
        generic: (n, c, p_l) of the tensors that only the generic path knows, by name.
    """

    uses: Mapping[str, list[Use] | None]
    gradients: list[dict[int, Tensor]]
    generic: Mapping[str, Tensor]


class Term(ABC):
    """A part of the kernel.

    Attributes:
        names: the tensors that it is of.
        shapes: of what is kept of each example.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @abstractmethod
    def fill(self, kept: Kept, measured: Measured) -> None:
        """Write what is kept of some examples, (n, *shape) each."""

    @abstractmethod
    def add(self, kernel: Tensor, one: Kept, two: Kept, where: Where) -> None:
        """Add the part to a kernel, or to its lower triangle alone where `two` is `one`.

        Args:
            kernel: (m, n), or (m c, n c), changed.
            one: what is kept of m examples.
            two: what is kept of n examples.
            where: which of all examples these are.
        """


@dataclass(frozen=True)
class Setting:
    """What all terms of a kernel share.

    Attributes:
        c: outputs of the model.
        full: whether each pair of outputs is kept.
        factors: w_l by name of tensor.
    """

    c: int
    full: bool
    factors: Mapping[str, float]


@final
class Head(Term):
    """The model's last linear map."""

    def __init__(self, setting: Setting, name: str, weight: Weight, bias: str | None) -> None:
        self.names = (name,) if bias is None else (name, bias)
        self.shapes = ((weight.inputs + (bias is not None),),)
        self._setting = setting

    def fill(self, kept: Kept, measured: Measured) -> None:
        """A, with a column for the bias."""
        use, _ = _weight_use(self.names[0], measured)
        a, _ = use.factors(use.output.detach(), len(kept[0]))
        _write_inputs(kept[0][:, None], a, self.names, self._setting.factors)

    def add(self, kernel: Tensor, one: Kept, two: Kept, where: Where) -> None:
        """The sum c A Aᵀ, or A Aᵀ for each output and none between two."""
        c = self._setting.c
        if self._setting.full:
            gram.add_diagonal(kernel, one[0], two[0], c)
        else:
            gram.add_gram(kernel, one[0], two[0], c)


@final
class Product(Term):
    """A linear map of one position.

    Args:
        setting: of the kernel.
        name: of the weight.
        weight: what it does.
        bias: name of its bias, if that is part of the term.
        inputs: A Aᵀ + 1 of all examples, where it is known because A does not change.
    """

    def __init__(self, setting: Setting, name: str, weight: Weight, bias: str | None, inputs: Tensor | None) -> None:
        self.names = (name,) if bias is None else (name, bias)
        self._setting, self.inputs = setting, inputs
        own = () if inputs is not None else ((weight.inputs + (bias is not None),),)
        self.shapes = ((setting.c, weight.outputs), *own)

    def fill(self, kept: Kept, measured: Measured) -> None:
        """B, and A with a column for the bias unless the products are known."""
        outputs, *inputs = kept
        use, gradients = _weight_use(self.names[0], measured)
        for index, gradient in enumerate(gradients):
            a, b = use.factors(gradient, len(outputs))
            outputs[:, index] = b[:, 0]
        for own in inputs:
            _write_inputs(own[:, None], a, self.names, self._setting.factors)

    def add(self, kernel: Tensor, one: Kept, two: Kept, where: Where) -> None:
        """(A Aᵀ + 1) ∘ (B Bᵀ)."""
        c = self._setting.c if self._setting.full else 1
        b1 = one[0].view(len(one[0]) * c, -1)
        b2 = b1 if two is one else two[0].view(len(two[0]) * c, -1)
        gram.add_hadamard(kernel, (one[1], two[1]) if self.inputs is None else self.inputs[where], b1, b2, c)


@final
class Pairs(Term):
    """A linear map or convolution over few positions of many features."""

    def __init__(self, setting: Setting, name: str, weight: Weight, bias: str | None) -> None:
        self.names = (name,) if bias is None else (name, bias)
        inputs, outputs = weight.inputs + (bias is not None), weight.outputs
        if setting.full:
            self.shapes = ((weight.positions, inputs), (setting.c, weight.positions, outputs))
        else:
            self.shapes = ((weight.positions, inputs), (1, weight.positions, setting.c * outputs))
        self._setting, self._outputs = setting, outputs

    def fill(self, kept: Kept, measured: Measured) -> None:
        """A, with a column for the bias, and B, for the trace with the outputs side by side."""
        use, gradients = _weight_use(self.names[0], measured)
        inputs, outputs = kept
        for index, gradient in enumerate(gradients):
            a, b = use.factors(gradient, len(inputs))
            if self._setting.full:
                outputs[:, index] = b
            else:
                outputs[:, 0, :, index * self._outputs : (index + 1) * self._outputs] = b
        _write_inputs(inputs, a, self.names, self._setting.factors)

    def add(self, kernel: Tensor, one: Kept, two: Kept, where: Where) -> None:
        """Σ_ts (A_t A_sᵀ + 1) ∘ (B_t B_sᵀ)."""
        gram.add_pairs(kernel, one[0], two[0], one[1], two[1])


@final
class Gradients(Term):
    """Tensors whose gradients are kept example by example."""

    def __init__(self, setting: Setting, names: tuple[str, ...], sizes: Mapping[str, int]) -> None:
        self.names = names
        self.shapes = ((setting.c, sum(sizes[name] for name in names)),)
        self._setting, self._sizes = setting, sizes

    def fill(self, kept: Kept, measured: Measured) -> None:
        """J, the tensors one after the other."""
        start = 0
        for name in self.names:
            rows = kept[0][:, :, start : start + self._sizes[name]]
            start += self._sizes[name]
            if name in measured.generic:
                rows.copy_(measured.generic[name])
            else:
                for output, gradients in enumerate(measured.gradients):
                    gradient_rows(measured.uses[name] or [], gradients, rows[:, output])
            if (factor := self._setting.factors.get(name, 1.0)) != 1:
                rows *= factor

    def add(self, kernel: Tensor, one: Kept, two: Kept, where: Where) -> None:
        """J Jᵀ, the outputs side by side for the trace and below each other for all pairs."""
        c = self._setting.c if self._setting.full else 1
        j1 = one[0].view(len(one[0]) * c, -1)
        gram.add_gram(kernel, j1, j1 if two is one else two[0].view(len(two[0]) * c, -1))


def _weight_use(name: str, measured: Measured) -> tuple[Outer | Convolution, list[Tensor]]:
    """The one call that takes a weight, and the gradients with respect to its output."""
    (use,) = cast(list[Outer | Convolution], measured.uses[name])  # so the structure says, and it was checked
    return use, [gradients[id(use.output)] for gradients in measured.gradients]


def _write_inputs(inputs: Tensor, a: Tensor, names: tuple[str, ...], factors: Mapping[str, float]) -> None:
    """A (n, T, d), each side by side with a constant for the bias if there is one."""
    d = a.shape[-1]
    inputs[..., :d] = a
    if (factor := factors.get(names[0], 1.0)) != 1:
        inputs[..., :d] *= factor
    if len(names) == 2:
        inputs[..., d] = factors.get(names[1], 1.0)


def terms_of(
    known: Structure, setting: Setting, layers: bool, inputs: Callable[[str, str | None], Tensor | None]
) -> list[Term]:
    """The parts of a kernel.

    Args:
        known: structure of the model.
        setting: of the kernel.
        layers: a term for each tensor, not for what is cheap together.
        inputs: A Aᵀ + 1 of the examples themselves for a weight and its bias, or None.
    """
    found: list[Term] = []
    left = [name for name in known.sizes if known.calls.get(name) or name in known.generic]
    for name, weight in known.weights.items():
        kind, bias = _kind(weight, setting), None if layers else weight.bias
        if kind is Product:
            found.append(Product(setting, name, weight, bias, inputs(name, bias) if weight.of_examples else None))
        elif kind is not Gradients:
            found.append(kind(setting, name, weight, bias))
        if kind is not Gradients:
            left = [other for other in left if other not in (name, bias)]
    block: list[str] = []
    for name in left:
        if block and (layers or sum(known.sizes[other] for other in (*block, name)) > COLUMNS):
            found.append(Gradients(setting, tuple(block), known.sizes))
            block = []
        block.append(name)
    return [*found, Gradients(setting, tuple(block), known.sizes)] if block else found


def _kind(weight: Weight, setting: Setting) -> type[Head | Product | Pairs | Gradients]:
    """The cheapest form of a weight's part."""
    t, d, e, c = weight.positions, weight.inputs, weight.outputs, setting.c
    if weight.head and t == 1 and c > 1:
        return Head
    cheaper = t * t * (d / c**2 + e) < d * e if setting.full else t * t * (d + c * e) < c * d * e
    if not cheaper:
        return Gradients
    return Product if t == 1 else Pairs
