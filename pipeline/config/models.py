"""[model]: one table per architecture, each telling its numbers of parameters and tensors without torch."""

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pipeline.config.tables import Table


def _import_path(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path, re.ASCII):
        raise PydanticCustomError("import_path", 'must be "package.module:callable"')
    return path


class Mlp(Table):
    """A fully connected network with biases: `depth` hidden layers of `width` units."""

    name: Literal["mlp"] = "mlp"
    width: Annotated[int, Field(ge=1, le=10**6)] = 64
    depth: Annotated[int, Field(ge=1, le=1000)] = 2
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"

    def parameters(self, inputs: int, outputs: int) -> int | None:
        """p, for `inputs` features and `outputs` outputs."""
        sizes = [inputs, *[self.width] * self.depth, outputs]
        return sum((a + 1) * b for a, b in itertools.pairwise(sizes))

    def tensors(self) -> int | None:
        """l, the trained tensors: a weight and a bias per layer."""
        return 2 * (self.depth + 1)


class Imported(Table):
    """A user's own model: `callable(input_shape=..., outputs=..., **options)` of a module."""

    name: Literal["import"] = "import"
    import_path: Annotated[str, AfterValidator(_import_path), Field(alias="import")]
    options: dict[str, Any] = Field(default={})

    def parameters(self, inputs: int, outputs: int) -> int | None:
        """Unknown without importing the model."""
        return None

    def tensors(self) -> int | None:
        """Unknown without importing the model."""
        return None
