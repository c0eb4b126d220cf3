"""From the tables of one file to validated runs, and from problems with them to one line each."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.record import CadenceTable
from pipeline.config.run import KINDS, TABLES, Heading, RunConfig, kind_of
from pipeline.config.tables import Table, at, keys_of, replaced
from pipeline.config.words import RULES, nearest, show
from pipeline.errors import StudyError, line

MAX_RUNS = 100_000


_SCALAR = {"bool_type", "int_type", "float_type", "string_type", "literal_error"}
_PATTERNS = {
    "device": "must be cpu, cuda, mps or a numbered one such as cuda:0",
    "paper": "must be a name of letters, digits and underscores",
    "claims": "must be names of letters, digits and underscores",
    "figures": "must be names of letters, digits and underscores",
}


@dataclass(frozen=True)
class Reader:
    """Turns the tables of one file into runs, and problems with them into one line each."""

    label: str
    overridden: set[str]

    def heading(self, raw: dict[str, Any]) -> Heading:
        """What describes the study and belongs to no run."""
        try:
            return Heading.model_validate({key: raw[key] for key in Heading.model_fields if key in raw})
        except ValidationError as invalid:
            raise failure([self.problem(error, Heading, ()) for error in invalid.errors()]) from None

    def runs(self, raw: dict[str, Any]) -> Iterator[RunConfig]:
        """Validate every point of the grid; learning rates slowest, then seeds, then the other axes as listed."""
        axes = self.axes(raw)
        if math.prod(map(len, axes.values())) > MAX_RUNS:
            sizes = " x ".join(f"{len(values)} {key}" for key, values in axes.items())
            raise failure([f"{self.label}: the grid of {sizes} has more than {MAX_RUNS} runs"])
        base = {key: value for key, value in raw.items() if key not in ("grid", *axes)}
        seen = set()
        for values in itertools.product(*axes.values()):
            point = base
            for key, value in zip(axes, values, strict=True):
                point = replaced(self.where(key, axes), point, key.split("."), value)
            run = self.run(point, list(axes))
            if run.run_id in seen:
                raise failure([f"{self.label}: grid: two points have the id {run.run_id}; rename one of the files"])
            seen.add(run.run_id)
            yield run

    def axes(self, raw: dict[str, Any]) -> dict[str, list[Any]]:
        """The axes of the grid, each with its values; learning rate and seed always."""
        grid = raw.get("grid", {})
        for key in grid:
            if key in ("learning_rate", "seed") or key in Heading.model_fields:
                raise failure([f"{self.label}: grid.{key}: is a key at the top of the file, not an axis of [grid]"])
            if key.split(".")[0] == "stop" or key == "compute.commit_seconds":
                raise failure([f"{self.where(key, grid)}: does not tell runs apart, so it cannot be an axis"])
        if "learning_rate" not in raw:
            raise failure([f"{self.label}: learning_rate: missing; must be a number or a list of numbers"])
        if "axes" in raw:  # a field of RunConfig that is filled from here, not from the file
            raise failure([f"{self.label}: axes: unknown key; axes of the grid stand in [grid]"])
        axes = {}
        for key, value in {"learning_rate": raw["learning_rate"], "seed": raw.get("seed", 0), **grid}.items():
            values = axes[key] = value if isinstance(value, list) else [value]
            where = f"{self.where(key, grid)} = {show(value)}"
            kinds = {type(one) if isinstance(one, str | bool | dict | list) else float for one in values}
            if not values or kinds & {dict, list}:
                raise failure([f"{where}: must be one value or a list of values"])
            if len(kinds) > 1:
                raise failure([f"{where}: the values of an axis must be of one type"])
            if len(set(values)) < len(values):
                raise failure([f"{where}: has the same value twice"])
        return axes

    def run(self, point: dict[str, Any], axes: list[str]) -> RunConfig:
        """Validate one point: each table by the class of its kind, so that every problem is named by its key."""
        problems: list[str] = []
        tables: dict[str, Any] = {}
        for name in [name for name in (*KINDS, *TABLES) if name in point]:
            table = point[name]
            cls = TABLES.get(name) or KINDS[name].get(kind_of(name, table) or "")
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
            raise failure(problems)
        identity = run.identity()
        # A value that says what no value says is no part of the identity.
        own = {key: functools.reduce(lambda table, part: table.get(part, {}), key.split("."), identity) for key in axes}
        places = {key: at(point, key.split(".")) if value == {} else value for key, value in own.items()}
        return run.model_copy(update={"axes": places})

    def where(self, key: str, axes: Iterable[str] = ()) -> str:
        """Where a key was given its value: an override, an axis or the file."""
        overridden = any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in self.overridden)
        grid = "grid." if key in axes and key not in ("learning_rate", "seed") else ""
        return f"{'--set' if overridden else f'{self.label}:'} {grid}{key}"

    def no_kind(self, name: str, table: Any) -> str:
        """A table of which no kind is known."""
        kinds = list(KINDS[name])
        if not isinstance(table, dict):
            return f"{self.where(name)} = {show(table)}: must be a table"
        where = self.where(f"{name}.name")
        if "name" not in table:
            return f"{where}: missing; must be one of {', '.join(kinds)}"
        return f"{where} = {show(table['name'])}: must be one of {', '.join(kinds)}{nearest(table['name'], kinds)}"

    def problem(self, error: ErrorDetails, cls: type[Table], prefix: tuple[str, ...], axes: Iterable[str] = ()) -> str:
        """One error of pydantic as `where = value: rule`."""
        kind, value, context = error["type"], error["input"], error.get("ctx", {})
        path = (*prefix, *error["loc"])
        if kind == "together":
            return f"{self.where(context['key'], axes)} = {show(context['value'])}: {context['rule']}"
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        where = self.where(key, axes)
        if kind == "missing":
            return f"{where}: missing"
        shown = f"{where} = {show(value)}"
        if kind == "extra_forbidden":
            if prefix and path[-1] in KINDS.get(prefix[0], {}):
                return f'{shown}: with it, leave out {prefix[0]}.name or say "{path[-1]}"'
            return f"{shown}: unknown key{_spelling(error['loc'], cls)}"
        if kind == "string_pattern_mismatch":
            return f"{shown}: {_PATTERNS[next(str(part) for part in reversed(path) if part in _PATTERNS)]}"
        allowed = re.findall(r"'([^']*)'", context["expected"]) if kind == "literal_error" else []
        rule = RULES[kind].format(**context | {"expected": ", ".join(allowed)}) if kind in RULES else error["msg"]
        axis = f'; to make it an axis: [grid] "{key}" = [...]' if prefix and isinstance(value, list) else ""
        return f"{shown}: {rule}{nearest(value, allowed)}{axis if kind in _SCALAR else ''}"


def _spelling(loc: tuple[int | str, ...], cls: type[Table]) -> str:
    """What an unknown key may have meant, and what is allowed in its place."""
    key, top = str(loc[-1]), cls is RunConfig
    here = RunConfig.model_fields.keys() | Heading.model_fields.keys() | {"grid"}
    allowed = sorted(here - {"axes"}) if top else keys_of(cls if len(loc) == 1 else CadenceTable)
    hint = nearest(key, allowed)
    if top and not hint:
        tables = [(name, one) for name, kinds in KINDS.items() for one in kinds.values()] + list(TABLES.items())
        found = sorted({f"{name}.{key}" for name, one in tables if key in keys_of(one)})
        hint = f"; did you mean {' or '.join(found)}?" if found else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def failure(problems: list[str]) -> StudyError:
    """The first problem as an error, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return StudyError(line(problems[0] + more))
