"""[record]: what is recorded, of which kernels, and at which steps."""

import tomllib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from pipeline.cadence import Cadence
from pipeline.config.tables import Count, Positive, Table, keys_of, listed
from pipeline.config.words import RULES, nearest, show
from pipeline.errors import InputError, line


def _descending(levels: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(levels)) < len(levels):
        raise PydanticCustomError("duplicate", "has the same level twice")
    return tuple(sorted(levels, reverse=True))


class CadenceTable(Table):
    """{ every = m }, { log = points per decade }, both, or {}: first, last and loss levels only."""

    every: Count | None = None
    log: Annotated[int, Field(ge=1, le=1000)] | None = None


def _cadence_schema(_source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    return core_schema.no_info_after_validator_function(
        lambda table: Cadence(every=table.every, log=table.log),
        core_schema.no_info_before_validator_function(
            lambda value: vars(value) if isinstance(value, Cadence) else value, handler.generate_schema(CadenceTable)
        ),
        serialization=core_schema.plain_serializer_function_ser_schema(
            lambda cadence: {key: value for key, value in vars(cadence).items() if value is not None}
        ),
    )


CadenceKey = Annotated[Cadence, GetPydanticSchema(_cadence_schema)]


class Ntk(Table):
    """The neural tangent kernel."""

    name: Literal["ntk"] = "ntk"


class Conjugate(Table):
    """The Gram matrix of the features that the last linear map takes."""

    name: Literal["conjugate"] = "conjugate"


class Weighted(Table):
    """The NTK with a weight for each tensor: K = Σ_l w_l² J_l J_lᵀ, w_l = 1 where none is given."""

    name: Literal["weighted"] = "weighted"
    weights: Annotated[dict[str, float], Field(min_length=1)]


class Infinite(Table):
    """A kernel of an infinitely wide fully connected network, the same at every step."""

    name: Literal["nngp", "infinite_ntk"]
    depth: Annotated[int, Field(ge=1, le=1000)]
    activation: Literal["relu", "erf"] = "relu"
    weight_std: Annotated[float, Field(ge=0)] = 1.0
    bias_std: Annotated[float, Field(ge=0)] = 0.0


KERNELS: dict[str, type[Table]] = {
    "ntk": Ntk,
    "conjugate": Conjugate,
    "weighted": Weighted,
    "nngp": Infinite,
    "infinite_ntk": Infinite,
}


def _kernel(value: Any) -> Any:
    """The table of a kernel that is given by its name or by a table, its options checked."""
    if isinstance(value, Table):
        return value
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise PydanticCustomError("kernel", "must be the name of a kernel, or a table of its name and options")
    name = table.get("name")
    if not isinstance(name, str) or name not in KERNELS:
        hint = nearest(name, list(KERNELS))
        raise PydanticCustomError("kernel", "{message}", {"message": f"must be one of {', '.join(KERNELS)}{hint}"})
    allowed = keys_of(KERNELS[name])
    for key in table.keys() - set(allowed):
        message = f"{name} has no option {show(key)}{nearest(key, allowed)} (allowed: {', '.join(allowed)})"
        raise PydanticCustomError("kernel", "{message}", {"message": message})
    return KERNELS[name].model_validate(table)


def _with_the_ntk(kernels: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The kernels in one order, the NTK first; None if there is no other."""
    names = [kernel.name for kernel in kernels]
    if "ntk" not in names:
        raise PydanticCustomError("kernels", 'must have "ntk" among them; the others are recorded beside it')
    if len(set(names)) < len(names):
        raise PydanticCustomError("kernels", "has the same kernel twice; its variables are called by its name")
    return tuple(sorted(kernels, key=lambda kernel: (kernel.name != "ntk", kernel.name))) if len(names) > 1 else None


KernelKey = Annotated[Ntk | Conjugate | Weighted | Infinite, BeforeValidator(_kernel)]
Asked = Annotated[bool, AfterValidator(lambda asked: asked or None)]


class Record(Table):
    """What is recorded, and at which steps."""

    eigenpairs: Count = 20
    kernels: Annotated[tuple[KernelKey, ...], BeforeValidator(listed), AfterValidator(_with_the_ntk)] | None = None
    layers: Asked | None = None
    ntk_full: Asked | None = None
    test: Count | None = None
    loss_levels: Annotated[tuple[Positive, ...], BeforeValidator(listed), AfterValidator(_descending)] = ()
    snapshots: CadenceKey = Cadence(log=8)
    spectra: CadenceKey = Cadence(every=10)
    scalars: CadenceKey = Cadence(every=1)
    hessian: CadenceKey | None = None
    hessian_eigenpairs: Count | None = None

    @field_validator("hessian_eigenpairs")
    @classmethod
    def _of_a_hessian(cls, count: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("hessian") is None and count is not None:
            raise PydanticCustomError("hessian", "needs record.hessian, the steps at which the Hessian is measured")
        return None if count == 1 else count

    @property
    def cadences(self) -> dict[str, Cadence]:
        """The cadence of each group that has one."""
        cadences = {"scalars": self.scalars, "snapshots": self.snapshots, "spectra": self.spectra}
        return cadences if self.hessian is None else {"hessian": self.hessian, **cadences}

    def kernel_tables(self) -> list[dict[str, Any]]:
        """Name and options of each kernel, the NTK first."""
        return [kernel.model_dump(exclude_none=True) for kernel in self.kernels or (Ntk(),)]


def kernel_table(written: str) -> dict[str, Any]:
    """Name and options of a kernel, as a study file spells it: a name, or a table in TOML.

    Raises:
        InputError: if there is no such kernel, or it has no such options.
    """
    where = "kernel"
    try:
        value = tomllib.loads(f"value = {written}")["value"] if written.lstrip().startswith("{") else written
        return _kernel(value).model_dump(exclude_none=True)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        where = ".".join([where, *map(str, error["loc"])])
        rule = RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
        raise InputError(line(f"{where} = {show(error['input'])}: {rule}")) from None
    except PydanticCustomError as error:
        raise InputError(line(f"{where} = {show(value)}: {error.message()}")) from None
    except (ValueError, RecursionError) as error:
        raise InputError(line(f"{where} = {written[:60]}: not a TOML value: {error}")) from None
