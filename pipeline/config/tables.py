"""What the tables of a study file share."""

import functools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.words import show
from pipeline.errors import StudyError, line


class Table(BaseModel):
    """A table of a study file: immutable, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def listed(value: Any) -> Any:
    """A list as the tuple that a frozen table holds."""
    return tuple(value) if isinstance(value, list) else value


def keys_of(table: type[BaseModel]) -> list[str]:
    """Keys of a table as a study file spells them."""
    return sorted(info.alias or name for name, info in table.model_fields.items())


def at(table: Any, keys: Iterable[str]) -> Any:
    """What nested tables hold at a path of keys."""
    return functools.reduce(lambda inner, key: inner[key], keys, table)


def replaced(label: str, table: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `table` in which the value at the path `keys` is another."""
    if not isinstance(table, dict):
        raise StudyError(line(f"{label}: {show(table)} is a value, so it has no key {show(keys[0])}"))
    inner = value if len(keys) == 1 else replaced(label, table.get(keys[0], {}), keys[1:], value)
    return {**table, keys[0]: inner}
