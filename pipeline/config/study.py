"""Reading a study file: TOML, overrides, and the runs that come of them."""

import functools
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.models import Imported
from pipeline.config.reader import Reader
from pipeline.config.run import KINDS, Heading, RunConfig, kind_of
from pipeline.config.tables import at, replaced
from pipeline.config.words import nearest, show
from pipeline.errors import MissingError, StudyError, line

MAX_BYTES = 2**20
MAX_DEPTH = 16


SIZES = ("smoke", "quick", "full")
DEFAULT_SIZE = "quick"


@dataclass(frozen=True)
class Study:
    """A validated study, or one part of it: the runs of one store.

    Attributes:
        name: stem of its file.
        title: one line for people.
        whole: the title of the study that this is a part of, or its own.
        paper: its module in `analysis.studies`, or None.
        claims: what it must reproduce.
        figures: what its report shows; None for what every store has.
        source: text of the file, as read.
        overrides: the `key=value` that were laid over it.
        size: smoke, quick or full; None if the file has no sizes.
        part: the part of the file that this is; None if the file has no parts.
    """

    name: str
    title: str
    whole: str
    paper: str | None
    claims: tuple[str, ...]
    figures: tuple[str, ...] | None
    source: str = field(repr=False)
    overrides: tuple[str, ...]
    size: str | None
    part: str | None
    _runs: tuple[RunConfig, ...] = field(repr=False)

    def runs(self) -> list[RunConfig]:
        """The grid's points: learning rates in the order listed, within each the seeds, then `[grid]`, last fastest."""
        return list(self._runs)

    @property
    def label(self) -> str:
        """The study, and which part of it."""
        return self.name if self.part is None else f"{self.name}/{self.part}"


def needs_import(study: Study) -> bool:
    """Whether running the study imports code of the user's."""
    return any(isinstance(run.model, Imported) for run in study.runs())


def check_imports_allowed(study: Study, allowed: bool) -> None:
    """Raise StudyError if the study imports a user's code and that was not allowed."""
    if needs_import(study) and not allowed:
        paths = {run.model.import_path for run in study.runs() if isinstance(run.model, Imported)}
        raise StudyError(
            f"{study.name}: model.import = {show(min(paths))} runs code from outside this package; "
            "pass --allow-imports if you trust it"
        )


def studies_dir() -> Path:
    """The folder of the shipped study files: inside an installed package, or `data/studies` of the repository."""
    installed = Path(__file__).parents[1] / "studies"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data" / "studies"


def shipped() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in studies_dir().glob("*.toml"))


def sizes_of(name_or_path: str | Path) -> list[str]:
    """The sizes that a study comes in, from small to large; none if it comes in one.

    Raises:
        MissingError: if there is no such study.
        StudyError: if its file cannot be read.
    """
    label, path = _located(name_or_path)
    _, sizes = _layers(label, _parsed(label, _read(label, path)))
    return [size for size in SIZES if size in sizes]


def load_study(name_or_path: str | Path, overrides: Sequence[str] = (), size: str | None = None) -> Study:
    """Read and validate a study that has no parts.

    Args:
        name_or_path: a shipped name ("digits") or the path of a .toml file.
        overrides: as `load_parts` takes them.
        size: as `load_parts` takes it.

    Raises:
        MissingError: if there is no such study.
        StudyError: for anything in it that cannot be used, or if it has several parts.
    """
    study, *others = load_parts(name_or_path, overrides, size)
    if others:
        raise StudyError(line(f"{study.name}: has {len(others) + 1} parts, each with a store of its own: load_parts"))
    return study


def load_parts(name_or_path: str | Path, overrides: Sequence[str] = (), size: str | None = None) -> list[Study]:
    """Read and validate a study: one entry per part of the file, or one for a file without parts.

    The keys of a part are laid over those at the top of the file, then those of the size, then those that the size
    has for the part, then the overrides. A table that gets another kind (another model) starts afresh.

    Args:
        name_or_path: a shipped name ("digits") or the path of a .toml file.
        overrides: "key.path=value" with the value in TOML; a bare word is text. An override of a grid axis replaces
            the values of the axis. One that changes the kind of a table (data.file on digits, model.import on an
            MLP) starts that table afresh, wherever it stands among the overrides.
        size: smoke, quick or full; quick by default where the file has sizes.

    Raises:
        MissingError: if there is no such study.
        StudyError: for anything in it that cannot be used.
    """
    label, path = _located(name_or_path)
    source = _read(label, path)
    raw = _parsed(label, source)
    parts, sizes = _layers(label, raw)
    size = _size(label, sizes, size)
    common = {key: value for key, value in raw.items() if key not in ("parts", "sizes")}
    of_size, of_parts = _split(sizes.get(size or "", {}))
    found = []
    for part in parts or [None]:
        own = (common, parts[part], of_size, of_parts.get(part, {})) if part else (common, of_size)
        where = f"{label} ({', '.join(filter(None, [part and f'part {part}', size]))})" if part or size else label
        tables = [_normalised(f"{label}:", table, path.parent) for table in own]
        point, overridden = _overridden(functools.reduce(_laid_over, tables), overrides)
        reader = Reader(where, overridden)
        heading = reader.heading(point)
        runs = tuple(reader.runs({key: value for key, value in point.items() if key not in Heading.model_fields}))
        found.append(
            Study(path.stem, heading.title, common.get("title", heading.title), heading.paper, heading.claims,
                  heading.figures, source, tuple(overrides), size, part, runs)
        )  # fmt: skip
    return found


def _layers(label: str, raw: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The tables [parts.NAME] and [sizes.NAME] of a file."""
    parts, sizes = (_tables(label, name, raw.get(name, {})) for name in ("parts", "sizes"))
    for part in parts:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", part, re.ASCII):
            raise StudyError(line(f"{label}: parts.{part}: must be named by letters a-z, digits and _: it is a folder"))
        if part in ("runs", "analysis"):
            raise StudyError(line(f"{label}: parts.{part}: a folder of that name makes a store; choose another name"))
    for size, table in sizes.items():
        if size not in SIZES:
            raise StudyError(line(f"{label}: sizes.{size}: must be one of {', '.join(SIZES)}{nearest(size, SIZES)}"))
        of_parts = _tables(label, f"sizes.{size}.parts", table.get("parts", {}))
        if unknown := [part for part in of_parts if part not in parts]:
            known = ", ".join(parts) or "there are none"
            raise StudyError(line(f"{label}: sizes.{size}.parts.{unknown[0]}: not a part of the study ({known})"))
    return parts, sizes


def _tables(label: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    """The value of a key under which each entry is a table."""
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise StudyError(line(f"{label}: {key} = {show(value)}: must be tables, [{key}.NAME]"))
    return value


def _size(label: str, sizes: Mapping[str, Any], asked: str | None) -> str | None:
    """The size to take."""
    if asked is None:
        return DEFAULT_SIZE if DEFAULT_SIZE in sizes else next(iter(sizes), None)
    if asked not in sizes:
        have = f"has the sizes {', '.join(sizes)}" if sizes else "comes in one size: leave the size out"
        raise StudyError(line(f"{label}: size = {show(asked)}: the study {have}"))
    return asked


def _split(size: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a size says for all parts, and what it says for each."""
    return {key: value for key, value in size.items() if key != "parts"}, size.get("parts", {})


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The keys of `above` laid over those of `below`: values replace values, tables are joined key by key."""
    joined = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(joined.get(key), dict):
            if key in KINDS and kind_of(key, value) not in (None, kind_of(key, joined[key])):
                joined = _emptied(joined, key)
            joined[key] = joined[key] | value
        else:
            joined[key] = value
    return joined


def _emptied(raw: dict[str, Any], table: str) -> dict[str, Any]:
    """`raw` with a table empty, and its axes gone."""
    grid = {axis: values for axis, values in raw.get("grid", {}).items() if not axis.startswith(f"{table}.")}
    return raw | {table: {}, "grid": grid}


def _located(name_or_path: str | Path) -> tuple[str, Path]:
    """What messages call a study, and its file."""
    if str(name_or_path) in shipped():
        return f"{name_or_path}.toml", studies_dir() / f"{name_or_path}.toml"
    return str(name_or_path), Path(name_or_path)


def _read(label: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = nearest(path.stem, shipped())
        names = ", ".join(shipped())
        raise MissingError(line(f"{label}: no such study{hint} (shipped: {names}; or the path of a .toml)")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(line(f"{label}: cannot be read: {reason}")) from None
    if len(content) > MAX_BYTES:
        raise StudyError(line(f"{label}: more than {MAX_BYTES} bytes, so not a study file"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(line(f"{label}: not UTF-8 text (byte {error.start}); save it as UTF-8")) from None


def _parsed(label: str, source: str) -> dict[str, Any]:
    try:
        raw = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        raise StudyError(line(f"{label}: not valid TOML: {error}")) from None
    _check_tree(f"{label}:", raw)
    return raw


def _check_tree(source: str, value: Any, key: str = "", depth: int = 0) -> None:
    """Refuse what TOML can hold and no key takes, also among the options of a user's own model."""
    if depth > MAX_DEPTH:
        raise StudyError(line(f"{source} {key[:60]}: more than {MAX_DEPTH} tables or lists inside one another"))
    if isinstance(value, dict):
        for name, item in value.items():
            _check_tree(source, item, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_tree(source, item, f"{key}[{i}]", depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise StudyError(line(f"{source} {key}: the number has more than 64 bits"))
    elif isinstance(value, float) and not math.isfinite(value):
        raise StudyError(line(f"{source} {key} = {value}: must be a finite number"))
    elif not isinstance(value, str | int | float):
        raise StudyError(line(f"{source} {key} = {value}: no key takes a date or a time; write text in quotes"))


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
            raise StudyError(line(f"{source} grid = {show(raw['grid'])}: must be a table of axes"))
        pairs = list(flat(raw["grid"], ""))
        grid = dict(pairs)
        if len(grid) < len(pairs):
            raise StudyError(line(f"{source} grid: an axis is given twice (axes: {', '.join(k for k, _ in pairs)})"))
        raw["grid"] = {key: absolute(value) if key == "data.file" else value for key, value in grid.items()}
    return raw


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
            raw = replaced(f"--set {key}", raw, keys, at(nested, keys))
    return raw, {key.removeprefix("grid.") for key, _ in pairs}


def _override(text: str) -> tuple[str, Any]:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise StudyError(line(f"--set {text[:60]}: must be UTF-8 text"))
    key, equals, written = text.partition("=")
    key, written = key.strip(), written.strip()
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise StudyError(line(f"--set {show(text)}: must be key=value, for example learning_rate=[0.1,0.2]"))
    try:
        value = tomllib.loads(f"value = {written}")
        if value.keys() != {"value"}:
            raise ValueError("more than one value")
    except (ValueError, RecursionError) as error:
        if not written or written[0] in "[{\"'" or "\n" in written:
            raise StudyError(line(f"--set {key}={written[:60]}: not a TOML value: {error}")) from None
        value = {"value": written}
    _check_tree("--set", {key: value["value"]})
    return key, value["value"]


def _fresh_kind(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`raw` with the table of `key` emptied, and its axes gone, if the override gives it another kind."""
    kind, table = _kind_set(key, value), key.split(".")[0]
    if kind is None or kind == kind_of(table, raw.get(table)):
        return raw
    return _emptied(raw, table)


def _kind_set(key: str, value: Any) -> str | None:
    """The kind of table that an override chooses, if it chooses one: data.name=file, data.file=..., model.import=..."""
    table, _, last = key.partition(".")
    kinds = KINDS.get(table, {})
    if last in kinds:
        return last
    return value if last == "name" and isinstance(value, str) and value in kinds else None
