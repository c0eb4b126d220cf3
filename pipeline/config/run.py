"""One point of the grid: everything that a run needs to know, its identity and its id."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.data import Chebyshev, Cifar10, Digits, File, OneOutlier, Patterns1d, WhitenedLinear
from pipeline.config.models import Cnn, DeepLinear, Imported, Mlp, Resnet, TwoLayerLinear, Vit
from pipeline.config.record import Record
from pipeline.config.tables import Name, Positive, Table, listed
from pipeline.config.training import (
    Adam,
    Compute,
    CrossEntropy,
    GradientDescent,
    HeavyBall,
    Mse,
    Nesterov,
    RmsProp,
    StochasticGradientDescent,
    Stop,
)

MAX_ID = 80


class Heading(Table):
    """The keys of a study that describe it and belong to no run."""

    title: Annotated[str, Field(min_length=1)]
    paper: Name | None = None
    claims: Annotated[tuple[Name, ...], BeforeValidator(listed)] = ()
    figures: Annotated[tuple[Name, ...], BeforeValidator(listed)] | None = None


class RunConfig(Table):
    """One point of the grid: everything that a run needs to know.

    Attributes:
        learning_rate: step size η.
        seed: of data, initialisation and order.
        process: what moves the parameters from row to row: the steps of the update rule, their midpoints, or a flow of
            gradient descent.
        axes: value of each grid axis at this point; always has learning_rate and seed.
    """

    learning_rate: Positive
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    model: Mlp | TwoLayerLinear | DeepLinear | Cnn | Vit | Resnet | Imported
    data: Digits | Cifar10 | Chebyshev | WhitenedLinear | OneOutlier | Patterns1d | File
    process: Literal["discrete", "midpoint", "gradient_flow", "central_flow"] = "discrete"
    loss: Mse | CrossEntropy = Mse()
    update: GradientDescent | StochasticGradientDescent | HeavyBall | Nesterov | RmsProp | Adam = GradientDescent()
    stop: Stop
    record: Record = Record()
    compute: Compute = Compute()
    axes: dict[str, bool | int | float | str] = Field(default={})

    @model_validator(mode="after")
    def _eigenpairs_fit(self) -> "RunConfig":
        if self.data.n is not None and self.record.eigenpairs > self.data.n:
            raise _together("record.eigenpairs", self.record.eigenpairs, f"must be at most data.n = {self.data.n}")
        return self

    @model_validator(mode="after")
    def _flows_are_of_gradient_descent(self) -> "RunConfig":
        if self.process.endswith("_flow") and self.update.name != "gd":
            rule = f'needs update.name = "gd", of which it is the flow, not "{self.update.name}"'
            raise _together("process", self.process, rule)
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the run's numbers, as JSON: same identity, same run, on every machine."""
        identity = self.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"stop": True, "axes": True, "compute": {"commit_seconds"}},
        )
        if "file" in identity["data"]:
            identity["data"]["file"] = Path(identity["data"]["file"]).name
        return identity

    @property
    def run_id(self) -> str:
        """Name of the run's store: a readable part from the axes and a hash of the identity.

        At most 80 of the characters A-Z a-z 0-9 . _ -, for example `lr-0.1_seed-0_width-32_3fa9c1d2`.
        """
        others = [(key.split(".")[-1], value) for key, value in self.axes.items() if "." in key or key == "process"]
        parts = [("lr", self.learning_rate), ("seed", self.seed), *others]
        readable = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", f"{name}-{value}") for name, value in parts)
        digest = _digest(self.identity())
        return f"{readable[: MAX_ID - 1 - len(digest)]}_{digest}"

    @property
    def family(self) -> str:
        """Hash of the identity without `process`: equal for runs that differ in nothing else."""
        identity = self.identity()
        del identity["process"]
        return _digest(identity)


def _together(key: str, value: int | str, rule: str) -> PydanticCustomError:
    """The error of a key whose value does not go together with others."""
    return PydanticCustomError("together", "{key} = {value}: {rule}", {"key": key, "value": value, "rule": rule})


def config_of(identity: dict[str, Any]) -> RunConfig | None:
    """The run that an identity describes, up to its end; None if it is not one of a study file.

    Of `data.file` an identity has only the name.
    """
    try:
        return RunConfig.model_validate({**identity, "stop": {"steps": 1}})
    except ValidationError:
        return None


def _kinds(table: str) -> dict[str, type[Table]]:
    annotation = RunConfig.model_fields[table].annotation
    return {cls.model_fields["name"].default: cls for cls in get_args(annotation) or (annotation,)}


# A table of several kinds says which by `name`, or by a key called as the kind itself: data.file, model.import.
KINDS = {table: _kinds(table) for table in ("data", "model", "loss", "update")}
TABLES: dict[str, type[Table]] = {"stop": Stop, "record": Record, "compute": Compute}


def _digest(identity: dict[str, Any]) -> str:
    # json writes floats by repr, the shortest text that reads back as the same number: the same on every machine.
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(canonical.encode()).hexdigest()[:8]


def kind_of(table: str, content: Any) -> str | None:
    """The kind of a table: its `name`, or the kind that has a key of its own name ("file", "import")."""
    if not isinstance(content, dict):
        return None
    if "name" in content:
        return content["name"] if isinstance(content["name"], str) else None
    return next((kind for kind in KINDS[table] if kind in content), None)
