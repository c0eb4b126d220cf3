"""[model]: one table per architecture, each telling the shapes of its tensors without torch."""

import itertools
import math
import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.config.tables import Positive, Table, listed
from pipeline.images import image_shape

Shape = tuple[int, ...]
Width = Annotated[int, Field(ge=1, le=10**6)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Counts = Annotated[tuple[Width, ...], BeforeValidator(listed), Field(min_length=1)]
Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]


def _import_path(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path, re.ASCII):
        raise PydanticCustomError("import_path", 'must be "package.module:callable"')
    return path


def _unless(default: Any) -> AfterValidator:
    """What says what no value says is no value, so that a run has one id."""
    return AfterValidator(lambda value: None if value == default else value)


def _linear(inputs: int, outputs: int, bias: bool = True) -> list[Shape]:
    return [(outputs, inputs), (outputs,)][: 1 + bias]


def _conv(inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,)][: 1 + bias]


class Architecture(Table, ABC):
    """A network whose tensors are known before it is built."""

    @abstractmethod
    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """Shapes of the trained tensors in their order.

        Args:
            input_shape: shape of one example.
            outputs: c.

        Raises:
            InputError: if the network does not take such examples.
        """

    def parameters(self, input_shape: Shape, outputs: int) -> int:
        """p; as for `shapes`."""
        return sum(map(math.prod, self.shapes(input_shape, outputs)))

    def tensors(self, input_shape: Shape, outputs: int) -> int:
        """l, the trained tensors; as for `shapes`."""
        return len(self.shapes(input_shape, outputs))


class Scaled(Architecture):
    """What `pipeline.models.layers` lets a network choose: how it is parametrised, and from where it starts."""

    parametrisation: Annotated[Literal["pytorch", "ntk", "mean_field"], _unless("pytorch")] | None = None
    init: Literal["lecun_normal", "he_normal", "xavier_normal"] | None = None
    init_scale: Annotated[Positive, _unless(1.0)] | None = None
    output_scale: Annotated[Positive, _unless(1.0)] | None = None

    @field_validator("init")
    @classmethod
    def _of_its_own_weights(cls, init: str | None, info: ValidationInfo) -> str | None:
        if init is not None and info.data.get("parametrisation") is not None:
            raise PydanticCustomError("init", "leave it out: with this model.parametrisation weights are from N(0, 1)")
        return init


class Mlp(Scaled):
    """A fully connected network: `depth` hidden layers of `width` units."""

    name: Literal["mlp"] = "mlp"
    width: Width = 64
    depth: Depth = 2
    activation: Activation = "tanh"
    bias: Annotated[bool, _unless(True)] | None = None

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """A weight and a bias per layer."""
        sizes = [math.prod(input_shape), *[self.width] * self.depth, outputs]
        return [shape for a, b in itertools.pairwise(sizes) for shape in _linear(a, b, self.bias is not False)]


class TwoLayerLinear(Architecture):
    """f = a W x: two matrices and nothing else."""

    name: Literal["two_layer_linear"] = "two_layer_linear"
    width: Width = 64
    init_std: Positive = 0.05
    rank_one: Annotated[bool, _unless(False)] | None = None

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """W and a."""
        return [(self.width, math.prod(input_shape)), (outputs, self.width)]


class DeepLinear(Scaled):
    """f = W_L … W_1 x with `depth` L matrices."""

    name: Literal["deep_linear"] = "deep_linear"
    width: Width = 50
    depth: Depth = 20

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """The matrices."""
        sizes = [math.prod(input_shape), *[self.width] * (self.depth - 1), outputs]
        return [(b, a) for a, b in itertools.pairwise(sizes)]


class Cnn(Scaled):
    """3 x 3 convolutions, each with an activation and 2 x 2 pooling; a hidden layer, if there is one; a head."""

    name: Literal["cnn"] = "cnn"
    channels: Counts = (16, 16)
    activation: Activation = "tanh"
    pooling: Literal["avg", "max"] = "avg"
    hidden: Width | None = None
    bias: bool = True

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """A weight per layer, and a bias per layer or for the last one only."""
        shrunk = 2 ** len(self.channels)
        inputs, height, width = image_shape(self.name, input_shape, least=shrunk)
        convolutions = itertools.pairwise((inputs, *self.channels))
        features = self.channels[-1] * (height // shrunk) * (width // shrunk)
        hidden = [] if self.hidden is None else _linear(features, self.hidden, self.bias)
        return [
            *(shape for a, b in convolutions for shape in _conv(a, b, bias=self.bias)),
            *hidden,
            *_linear(self.hidden or features, outputs),
        ]


class Vit(Scaled):
    """A vision transformer of `depth` blocks on tokens of `dim` numbers."""

    name: Literal["vit"] = "vit"
    patch: Width = 2
    dim: Width = 32
    depth: Depth = 2
    heads: Annotated[Width, Field(validate_default=True)] = 4
    mlp_ratio: Annotated[int, Field(ge=1, le=1000)] = 4
    activation: Activation = "gelu"
    position: Annotated[Literal["sincos", "learned"], Field(validate_default=True)] = "sincos"
    head_scale: Annotated[float, Field(ge=0), _unless(1.0)] | None = None

    @field_validator("heads")
    @classmethod
    def _heads_divide(cls, heads: int, info: ValidationInfo) -> int:
        if (dim := info.data.get("dim")) is not None and dim % heads:
            raise PydanticCustomError("heads", "must divide model.dim = {dim}", {"dim": dim})
        return heads

    @field_validator("position")
    @classmethod
    def _four_waves(cls, position: str, info: ValidationInfo) -> str:
        if position == "sincos" and (dim := info.data.get("dim")) is not None and dim % 4:
            raise PydanticCustomError("position", 'needs a multiple of 4 as model.dim; or say "learned"')
        return position

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """Patches, positions if they are learned, the blocks, a norm and the head."""
        channels, height, width = image_shape(self.name, input_shape, patch=self.patch)
        dim, hidden = self.dim, self.mlp_ratio * self.dim
        norm: list[Shape] = [(dim,), (dim,)]
        attention = [*norm, *_linear(dim, 3 * dim, bias=False), *_linear(dim, dim)]
        block = [*attention, *norm, *_linear(dim, hidden), *_linear(hidden, dim)]
        position = [(height * width // self.patch**2, dim)] if self.position == "learned" else []
        embed = _linear(channels * self.patch**2, dim)
        return [*embed, *position, *block * self.depth, *norm, *_linear(dim, outputs)]


class Resnet(Scaled):
    """A residual network without normalisation: `blocks` of each stage, `width` channels in the first."""

    name: Literal["resnet"] = "resnet"
    width: Width = 16
    blocks: Counts = (1, 1, 1)
    activation: Activation = "relu"

    def shapes(self, input_shape: Shape, outputs: int) -> list[Shape]:
        """A first convolution; two in each block, then that of a shortcut that halves; the head."""
        inputs, *_ = image_shape(self.name, input_shape)
        found, before = _conv(inputs, self.width), self.width
        for stage, blocks in enumerate(self.blocks):
            width = self.width * 2**stage
            for block in range(blocks):
                halves = stage > 0 and block == 0
                found += [*_conv(before, width), *_conv(width, width), *(_conv(before, width, 1) if halves else [])]
                before = width
        return [*found, *_linear(before, outputs)]


class Imported(Table):
    """A user's own model: `callable(input_shape=..., outputs=..., **options)` of a module."""

    name: Literal["import"] = "import"
    import_path: Annotated[str, AfterValidator(_import_path), Field(alias="import")]
    options: dict[str, Any] = Field(default={})

    def parameters(self, input_shape: Shape, outputs: int) -> int | None:
        """Unknown without importing the model."""
        return None

    def tensors(self, input_shape: Shape, outputs: int) -> int | None:
        """Unknown without importing the model."""
        return None
