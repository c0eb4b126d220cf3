"""Study files: TOML -> validated keys -> a grid of runs.

A study file is the whole description of an experiment; `docs/studies.md` lists every key. This module reads it without
importing torch or xarray, and without importing or opening anything that the file names: a study that asks for a
user's own model is only described here.

A run is identified by what determines its numbers. `[stop]` and `compute.commit_seconds` are left out, so that a
smaller loss or more steps continues a run. Of `data.file` only the name is taken, so that an identity is the same on
every machine; what stands in the file goes into the store, whose digest chain begins with the examples, so that a run
is never continued on other data.

A new key must default to None, which means "as before it existed": absent keys are not part of the identity, so the
ids of earlier runs stay.
"""

import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from pipeline.cadence import Cadence
from pipeline.errors import InputError, MissingError, StudyError

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_RUNS = 100_000
MAX_ID = 80

# --- the tables -----------------------------------------------------------------------------------------------------


class Table(BaseModel):
    """A table of a study file: immutable, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _descending(levels: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(levels)) < len(levels):
        raise PydanticCustomError("duplicate", "has the same level twice")
    return tuple(sorted(levels, reverse=True))


def _npz(path: str) -> str:
    if not path.endswith(".npz"):
        raise PydanticCustomError("npz", "must be the path of an .npz file with the arrays x and y")
    return path


def _import_path(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path, re.ASCII):
        raise PydanticCustomError("import_path", 'must be "package.module:callable"')
    return path


class Digits(Table):
    """Scikit-learn's handwritten digits as a two-class task with one output."""

    name: Literal["digits"] = "digits"
    n: Annotated[int, Field(ge=2, le=1797)] = 300
    target: Literal["digit<5", "parity"] = "digit<5"

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (64,), 1


class File(Table):
    """Arrays x (n, features...) and y (n,) or (n, c) of an .npz file."""

    name: Literal["file"] = "file"
    file: Annotated[str, AfterValidator(_npz)]
    n: Annotated[int, Field(ge=2, le=10**9)] | None = None
    normalise: Literal["none", "global"] = "none"

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c), from the headers of the file alone.

        Raises:
            MissingError: if there is no such file.
            InputError: if it cannot be used, or holds fewer than `n` examples.
        """
        where = _line(self.file)
        x, y = _npz_shape(where, self.file, "x"), _npz_shape(where, self.file, "y")
        if len(x) < 2 or len(y) not in (1, 2) or x[0] != y[0] or min(x + y) < 1:
            raise InputError(f"{where}: x {x} and y {y}: must be (n, features...) and (n,) or (n, c), not empty")
        if self.n is not None and self.n > x[0]:
            raise InputError(f"data.n = {self.n}: must be at most {x[0]}, the examples in {where}")
        return self.n or x[0], x[1:], y[1] if len(y) == 2 else 1


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
    options: dict[str, Any] = {}

    def parameters(self, inputs: int, outputs: int) -> int | None:
        """Unknown without importing the model."""
        return None

    def tensors(self) -> int | None:
        """Unknown without importing the model."""
        return None


class Mse(Table):
    """L = (1/2n) ‖f - y‖²."""

    name: Literal["mse"] = "mse"


class GradientDescent(Table):
    """θ <- θ - η ∇L(θ), on all examples."""

    name: Literal["gd"] = "gd"


class Stop(Table):
    """When a run ends: at the first step whose loss is below `loss`, at the latest after `steps` updates."""

    loss: Positive | None = None
    steps: Count

    def reached(self, loss: float) -> bool:
        """Whether a run may end at this loss."""
        return self.loss is not None and loss < self.loss

    def asks_for_more(self, last_step: int, lowest_loss: float) -> bool:
        """Whether a complete run is short of what its study asks for by now: a smaller loss, or more steps."""
        return last_step < self.steps and not self.reached(lowest_loss)


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
        hint = _nearest(name, list(KERNELS))
        raise PydanticCustomError("kernel", "{message}", {"message": f"must be one of {', '.join(KERNELS)}{hint}"})
    allowed = _keys(KERNELS[name])
    for key in table.keys() - set(allowed):
        message = f"{name} has no option {_show(key)}{_nearest(key, allowed)} (allowed: {', '.join(allowed)})"
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
    kernels: Annotated[tuple[KernelKey, ...], BeforeValidator(_listed), AfterValidator(_with_the_ntk)] | None = None
    layers: Asked | None = None
    ntk_full: Asked | None = None
    loss_levels: Annotated[tuple[Positive, ...], BeforeValidator(_listed), AfterValidator(_descending)] = ()
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


class Compute(Table):
    """How the numbers are computed (part of a run's identity) and how often rows are committed (not part of it)."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:[0-9]{1,3})?)$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    commit_seconds: Positive = 5.0


class Heading(Table):
    """The keys of a study that describe it and belong to no run."""

    title: Annotated[str, Field(min_length=1)]
    paper: Name | None = None
    claims: Annotated[tuple[Name, ...], BeforeValidator(_listed)] = ()


class RunConfig(Table):
    """One point of the grid: everything that a run needs to know.

    Attributes:
        learning_rate: step size η.
        seed: of data, initialisation and order.
        process: what moves the parameters; gradient descent in discrete steps.
        axes: value of each grid axis at this point; always has learning_rate and seed.
    """

    learning_rate: Positive
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    process: Literal["discrete"] = "discrete"
    data: Digits | File
    model: Mlp | Imported
    loss: Mse = Mse()
    update: GradientDescent = GradientDescent()
    stop: Stop
    record: Record = Record()
    compute: Compute = Compute()
    axes: dict[str, bool | int | float | str] = {}

    @model_validator(mode="after")
    def _eigenpairs_fit(self) -> "RunConfig":
        if self.data.n is not None and self.record.eigenpairs > self.data.n:
            raise PydanticCustomError(
                "eigenpairs",
                "record.eigenpairs = {k}: must be at most data.n = {n}",
                {"k": self.record.eigenpairs, "n": self.data.n},
            )
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
        rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
        raise InputError(_line(f"{where} = {_show(error['input'])}: {rule}")) from None
    except PydanticCustomError as error:
        raise InputError(_line(f"{where} = {_show(value)}: {error.message()}")) from None
    except (ValueError, RecursionError) as error:
        raise InputError(_line(f"{where} = {written[:60]}: not a TOML value: {error}")) from None


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


@dataclass(frozen=True)
class Study:
    """A validated study.

    Attributes:
        name: stem of its file.
        title: one line for people.
        paper: its module in `analysis.studies`, or None.
        claims: what it must reproduce.
        source: text of the file, as read.
        overrides: the `key=value` that were laid over it.
    """

    name: str
    title: str
    paper: str | None
    claims: tuple[str, ...]
    source: str = field(repr=False)
    overrides: tuple[str, ...]
    _runs: tuple[RunConfig, ...] = field(repr=False)

    def runs(self) -> list[RunConfig]:
        """The grid's points: learning rates in the order listed, within each the seeds, then `[grid]`, last fastest."""
        return list(self._runs)


def needs_import(study: Study) -> bool:
    """Whether running the study imports code of the user's."""
    return any(isinstance(run.model, Imported) for run in study.runs())


def check_imports_allowed(study: Study, allowed: bool) -> None:
    """Raise StudyError if the study imports a user's code and that was not allowed."""
    if needs_import(study) and not allowed:
        paths = {run.model.import_path for run in study.runs() if isinstance(run.model, Imported)}
        raise StudyError(
            f"{study.name}: model.import = {_show(min(paths))} runs code from outside this package; "
            "pass --allow-imports if you trust it"
        )


# --- reading --------------------------------------------------------------------------------------------------------


def studies_dir() -> Path:
    """The folder of the shipped study files: inside an installed package, or `data/studies` of the repository."""
    installed = Path(__file__).parent / "studies"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "data" / "studies"


def shipped() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in studies_dir().glob("*.toml"))


def load_study(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and validate a study.

    Args:
        name_or_path: a shipped name ("digits") or the path of a .toml file.
        overrides: "key.path=value" with the value in TOML; a bare word is text. An override of a grid axis replaces
            the values of the axis. One that changes the kind of a table (data.file on digits, model.import on an
            MLP) starts that table afresh, wherever it stands among the overrides.

    Raises:
        MissingError: if there is no such study.
        StudyError: for anything in it that cannot be used.
    """
    if str(name_or_path) in shipped():
        label, path = f"{name_or_path}.toml", studies_dir() / f"{name_or_path}.toml"
    else:
        label, path = str(name_or_path), Path(name_or_path)
    source = _read(label, path)
    raw = _normalised(f"{label}:", _parsed(label, source), path.parent)
    raw, overridden = _overridden(raw, overrides)
    reader = _Reader(label, overridden)
    heading = reader.heading(raw)
    runs = tuple(reader.runs({key: value for key, value in raw.items() if key not in Heading.model_fields}))
    return Study(path.stem, heading.title, heading.paper, heading.claims, source, tuple(overrides), runs)


def _read(label: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = _nearest(path.stem, shipped())
        names = ", ".join(shipped())
        raise MissingError(_line(f"{label}: no such study{hint} (shipped: {names}; or the path of a .toml)")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(_line(f"{label}: cannot be read: {reason}")) from None
    if len(content) > MAX_BYTES:
        raise StudyError(_line(f"{label}: more than {MAX_BYTES} bytes, so not a study file"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(_line(f"{label}: not UTF-8 text (byte {error.start}); save it as UTF-8")) from None


def _parsed(label: str, source: str) -> dict[str, Any]:
    try:
        raw = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        raise StudyError(_line(f"{label}: not valid TOML: {error}")) from None
    _check_tree(f"{label}:", raw)
    return raw


def _check_tree(source: str, value: Any, key: str = "", depth: int = 0) -> None:
    """Refuse what TOML can hold and no key takes, also among the options of a user's own model."""
    if depth > MAX_DEPTH:
        raise StudyError(_line(f"{source} {key[:60]}: more than {MAX_DEPTH} tables or lists inside one another"))
    if isinstance(value, dict):
        for name, item in value.items():
            _check_tree(source, item, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_tree(source, item, f"{key}[{i}]", depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise StudyError(_line(f"{source} {key}: the number has more than 64 bits"))
    elif isinstance(value, float) and not math.isfinite(value):
        raise StudyError(_line(f"{source} {key} = {value}: must be a finite number"))
    elif not isinstance(value, str | int | float):
        raise StudyError(_line(f"{source} {key} = {value}: no key takes a date or a time; write text in quotes"))


def _normalised(source: str, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One spelling for what has several: [grid] by dotted keys, and `data.file` absolute, seen from `folder`."""

    def absolute(file: Any) -> Any:
        if isinstance(file, list):
            return [absolute(one) for one in file]
        return os.path.abspath(folder / os.path.expanduser(file)) if isinstance(file, str) and file else file

    def flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    raw = dict(raw)
    if isinstance(raw.get("data"), dict) and "file" in raw["data"]:
        raw["data"] = raw["data"] | {"file": absolute(raw["data"]["file"])}
    if "grid" in raw:
        if not isinstance(raw["grid"], dict):
            raise StudyError(_line(f"{source} grid = {_show(raw['grid'])}: must be a table of axes"))
        pairs = list(flat(raw["grid"], ""))
        grid = dict(pairs)
        if len(grid) < len(pairs):
            raise StudyError(_line(f"{source} grid: an axis is given twice (axes: {', '.join(k for k, _ in pairs)})"))
        raw["grid"] = {key: absolute(value) if key == "data.file" else value for key, value in grid.items()}
    return raw


def _replaced(label: str, table: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `table` in which the value at the path `keys` is another."""
    if not isinstance(table, dict):
        raise StudyError(_line(f"{label}: {_show(table)} is a value, so it has no key {_show(keys[0])}"))
    inner = value if len(keys) == 1 else _replaced(label, table.get(keys[0], {}), keys[1:], value)
    return {**table, keys[0]: inner}


# --- overrides ------------------------------------------------------------------------------------------------------


def _overridden(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """`raw` with the overrides laid over it, and their dotted keys."""
    pairs = [_override(text) for text in overrides]
    # What decides the kind of a table comes first, so that the order of the options does not matter.
    pairs.sort(key=lambda pair: _kind_set(*pair) is None)
    for key, value in pairs:
        raw = _fresh_kind(raw, key, value)
        keys = ["grid", key] if key in raw.get("grid", {}) else key.split(".")
        nested = functools.reduce(lambda inner, part: {part: inner}, reversed(keys), value)
        nested = _normalised("--set", nested, Path.cwd())
        if keys[0] == "grid":
            raw = raw | {"grid": raw.get("grid", {}) | nested["grid"]}
        else:
            raw = _replaced(f"--set {key}", raw, keys, _at(nested, keys))
    return raw, {key.removeprefix("grid.") for key, _ in pairs}


def _override(text: str) -> tuple[str, Any]:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise StudyError(_line(f"--set {text[:60]}: must be UTF-8 text"))
    key, equals, written = text.partition("=")
    key, written = key.strip(), written.strip()
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise StudyError(_line(f"--set {_show(text)}: must be key=value, for example learning_rate=[0.1,0.2]"))
    try:
        value = tomllib.loads(f"value = {written}")
        if value.keys() != {"value"}:
            raise ValueError("more than one value")
    except (ValueError, RecursionError) as error:
        if not written or written[0] in "[{\"'" or "\n" in written:
            raise StudyError(_line(f"--set {key}={written[:60]}: not a TOML value: {error}")) from None
        value = {"value": written}
    _check_tree("--set", {key: value["value"]})
    return key, value["value"]


def _fresh_kind(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`raw` with the table of `key` emptied, and its axes gone, if the override gives it another kind."""
    kind, table = _kind_set(key, value), key.split(".")[0]
    if kind is None or kind == _kind(table, raw.get(table)):
        return raw
    grid = {axis: values for axis, values in raw.get("grid", {}).items() if not axis.startswith(f"{table}.")}
    return raw | {table: {}, "grid": grid}


def _kind_set(key: str, value: Any) -> str | None:
    """The kind of table that an override chooses, if it chooses one: data.name=file, data.file=..., model.import=..."""
    table, _, last = key.partition(".")
    kinds = KINDS.get(table, {})
    if last in kinds:
        return last
    return value if last == "name" and isinstance(value, str) and value in kinds else None


def _kind(table: str, content: Any) -> str | None:
    """The kind of a table: its `name`, or the kind that has a key of its own name ("file", "import")."""
    if not isinstance(content, dict):
        return None
    if "name" in content:
        return content["name"] if isinstance(content["name"], str) else None
    return next((kind for kind in KINDS[table] if kind in content), None)


# --- validation -----------------------------------------------------------------------------------------------------

_RULES = {
    "missing": "missing",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "string_type": "must be text in quotes",
    "string_unicode": "must be UTF-8 text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
}
_SCALAR = {"bool_type", "int_type", "float_type", "string_type", "literal_error"}
_PATTERNS = {
    "device": "must be cpu, cuda, mps or a numbered one such as cuda:0",
    "paper": "must be a name of letters, digits and underscores",
    "claims": "must be names of letters, digits and underscores",
}


def _keys(table: type[BaseModel]) -> list[str]:
    """Keys of a table as a study file spells them."""
    return sorted(info.alias or name for name, info in table.model_fields.items())


@dataclass(frozen=True)
class _Reader:
    """Turns the tables of one file into runs, and problems with them into one line each."""

    label: str
    overridden: set[str]

    def heading(self, raw: dict[str, Any]) -> Heading:
        try:
            return Heading.model_validate({key: raw[key] for key in Heading.model_fields if key in raw})
        except ValidationError as invalid:
            raise _failure([self.problem(error, Heading, ()) for error in invalid.errors()]) from None

    def runs(self, raw: dict[str, Any]) -> Iterator[RunConfig]:
        """Validate every point of the grid; learning rates slowest, then seeds, then the other axes as listed."""
        axes = self.axes(raw)
        if math.prod(map(len, axes.values())) > MAX_RUNS:
            sizes = " x ".join(f"{len(values)} {key}" for key, values in axes.items())
            raise _failure([f"{self.label}: the grid of {sizes} has more than {MAX_RUNS} runs"])
        base = {key: value for key, value in raw.items() if key not in ("grid", *axes)}
        seen = set()
        for values in itertools.product(*axes.values()):
            point = base
            for key, value in zip(axes, values, strict=True):
                point = _replaced(self.where(key, axes), point, key.split("."), value)
            run = self.run(point, list(axes))
            if run.run_id in seen:
                raise _failure([f"{self.label}: grid: two points have the id {run.run_id}; rename one of the files"])
            seen.add(run.run_id)
            yield run

    def axes(self, raw: dict[str, Any]) -> dict[str, list[Any]]:
        grid = raw.get("grid", {})
        for key in grid:
            if key in ("learning_rate", "seed") or key in Heading.model_fields:
                raise _failure([f"{self.label}: grid.{key}: is a key at the top of the file, not an axis of [grid]"])
            if key.split(".")[0] == "stop" or key == "compute.commit_seconds":
                raise _failure([f"{self.where(key, grid)}: does not tell runs apart, so it cannot be an axis"])
        if "learning_rate" not in raw:
            raise _failure([f"{self.label}: learning_rate: missing; must be a number or a list of numbers"])
        if "axes" in raw:  # a field of RunConfig that is filled from here, not from the file
            raise _failure([f"{self.label}: axes: unknown key; axes of the grid stand in [grid]"])
        axes = {}
        for key, value in {"learning_rate": raw["learning_rate"], "seed": raw.get("seed", 0), **grid}.items():
            values = axes[key] = value if isinstance(value, list) else [value]
            where = f"{self.where(key, grid)} = {_show(value)}"
            kinds = {type(one) if isinstance(one, str | bool | dict | list) else float for one in values}
            if not values or kinds & {dict, list}:
                raise _failure([f"{where}: must be one value or a list of values"])
            if len(kinds) > 1:
                raise _failure([f"{where}: the values of an axis must be of one type"])
            if len(set(values)) < len(values):
                raise _failure([f"{where}: has the same value twice"])
        return axes

    def run(self, point: dict[str, Any], axes: list[str]) -> RunConfig:
        """Validate one point: each table by the class of its kind, so that every problem is named by its key."""
        problems: list[str] = []
        tables: dict[str, Any] = {}
        for name in [name for name in (*KINDS, *TABLES) if name in point]:
            table = point[name]
            cls = TABLES.get(name) or KINDS[name].get(_kind(name, table) or "")
            if cls is None:
                problems.append(self.no_kind(name, table))
                continue
            try:
                tables[name] = cls.model_validate(table)
            except ValidationError as invalid:
                problems += [self.problem(error, cls, (name,), axes) for error in invalid.errors()]
        try:
            run = RunConfig.model_validate(point | tables)
        except ValidationError as invalid:
            rest = [error for error in invalid.errors() if not error["loc"] or error["loc"][0] not in KINDS | TABLES]
            absent = [name for name in ("data", "model", "stop") if name not in point]
            problems = [
                *(self.problem(error, RunConfig, (), axes) for error in rest),
                *(f"{self.label}: {name}: the table [{name}] is missing" for name in absent),
                *problems,
            ]
        if problems:
            raise _failure(problems)
        identity = run.identity()
        # A value that says what no value says is no part of the identity.
        own = {key: functools.reduce(lambda table, part: table.get(part, {}), key.split("."), identity) for key in axes}
        places = {key: _at(point, key.split(".")) if value == {} else value for key, value in own.items()}
        return run.model_copy(update={"axes": places})

    def where(self, key: str, axes: Iterable[str] = ()) -> str:
        """Where a key was given its value: an override, an axis or the file."""
        overridden = any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in self.overridden)
        grid = "grid." if key in axes and key not in ("learning_rate", "seed") else ""
        return f"{'--set' if overridden else f'{self.label}:'} {grid}{key}"

    def no_kind(self, name: str, table: Any) -> str:
        kinds = list(KINDS[name])
        if not isinstance(table, dict):
            return f"{self.where(name)} = {_show(table)}: must be a table"
        where = self.where(f"{name}.name")
        if "name" not in table:
            return f"{where}: missing; must be one of {', '.join(kinds)}"
        return f"{where} = {_show(table['name'])}: must be one of {', '.join(kinds)}{_nearest(table['name'], kinds)}"

    def problem(self, error: ErrorDetails, cls: type[Table], prefix: tuple[str, ...], axes: Iterable[str] = ()) -> str:
        """One error of pydantic as `where = value: rule`."""
        kind, value, context = error["type"], error["input"], error.get("ctx", {})
        path = (*prefix, *error["loc"])
        if kind == "eigenpairs":
            return f"{self.where('record.eigenpairs', axes)} = {context['k']}: must be at most data.n = {context['n']}"
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        where = self.where(key, axes)
        if kind == "missing":
            return f"{where}: missing"
        shown = f"{where} = {_show(value)}"
        if kind == "extra_forbidden":
            if prefix and path[-1] in KINDS.get(prefix[0], {}):
                return f'{shown}: with it, leave out {prefix[0]}.name or say "{path[-1]}"'
            return f"{shown}: unknown key{_spelling(error['loc'], cls)}"
        if kind == "string_pattern_mismatch":
            return f"{shown}: {_PATTERNS[next(str(part) for part in reversed(path) if part in _PATTERNS)]}"
        allowed = re.findall(r"'([^']*)'", context["expected"]) if kind == "literal_error" else []
        rule = _RULES[kind].format(**context | {"expected": ", ".join(allowed)}) if kind in _RULES else error["msg"]
        axis = f'; to make it an axis: [grid] "{key}" = [...]' if prefix and isinstance(value, list) else ""
        return f"{shown}: {rule}{_nearest(value, allowed)}{axis if kind in _SCALAR else ''}"


def _spelling(loc: tuple[int | str, ...], cls: type[Table]) -> str:
    """What an unknown key may have meant, and what is allowed in its place."""
    key, top = str(loc[-1]), cls is RunConfig
    here = RunConfig.model_fields.keys() | Heading.model_fields.keys() | {"grid"}
    allowed = sorted(here - {"axes"}) if top else _keys(cls if len(loc) == 1 else CadenceTable)
    hint = _nearest(key, allowed)
    if top and not hint:
        tables = [(name, one) for name, kinds in KINDS.items() for one in kinds.values()] + list(TABLES.items())
        found = sorted({f"{name}.{key}" for name, one in tables if key in _keys(one)})
        hint = f"; did you mean {' or '.join(found)}?" if found else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def _failure(problems: list[str]) -> StudyError:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return StudyError(_line(problems[0] + more))


def _at(table: Any, keys: Iterable[str]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], keys, table)


def _nearest(word: Any, allowed: Sequence[str]) -> str:
    found = difflib.get_close_matches(word[:80], allowed, 1) if isinstance(word, str) else []
    return f'; did you mean "{found[0]}"?' if found else ""


def _show(value: Any) -> str:
    """A value as TOML would spell it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(message: str) -> str:
    """One printable line, whatever keys and values it quotes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)


def _npz_shape(where: str, file: str, name: str) -> tuple[int, ...]:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    except FileNotFoundError:
        raise MissingError(f"{where}: no such file (data.file)") from None
    except KeyError:
        raise InputError(f"{where}: has no array {name}; save it with numpy.savez(file, x=..., y=...)") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(_line(f"{where}: not an .npz file that numpy.savez wrote: {error}")) from None
    if dtype.kind not in "fiub":
        raise InputError(_line(f"{where}: {name} has dtype {dtype}; must be real numbers"))
    return tuple(shape)
