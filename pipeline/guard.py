"""Look before believing: a commit record is held against the contract before anything in it is used.

A store may come from a stranger, and then its digests are his too. What has passed `check_record` has the attributes
that the rest of the code takes for granted, each of its type; names that are no paths; for every array the document
that this package would have written, so no other codec and no chunk beyond what memory and Blosc take; and lengths
that agree with each other.
"""

import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import numpy as np

from pipeline import schema, zarr3
from pipeline.errors import DamagedStore, InputError
from pipeline.zarr3 import Document

RUN_ID = re.compile(r"(?![.-])[ -.0-\[\]-~]{1,200}")  # ASCII without slashes: no other letter can look like one
DIGEST = re.compile(r"[0-9a-f]{32}")
CHECKPOINTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
STATUSES = ("running", "complete", "diverged")

MAX_CHUNK_BYTES = 2**31 - 17  # what Blosc takes
MAX_CHUNKS = 2**20  # of one array: 16 TiB of kernels, or 4 billion training steps
DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float16", "float32", "float64"}
SQUARE = {"sample2": "sample", "output2": "output"}

Check = Callable[[Any], bool]


def check_run_id(run_id: str) -> None:
    """Raise InputError for a name that could not be a run's: it becomes the name of a folder."""
    if not _matches(RUN_ID)(run_id):
        raise InputError(
            f"run id {_shown(run_id)}: must be 1 to 200 printable ASCII characters without slashes, and not begin with "
            "'.' or '-'"
        )


def check_record(document: Any) -> None:
    """Refuse a root `zarr.json` that is not a commit record of format version 1.

    Raises:
        DamagedStore: naming the first thing that cannot be.
        InputError: for a variable of a newer version.
    """
    document = _table(document, "it")
    attrs = _table(document.get("attributes"), "attributes")
    _require(document.get("node_type") == "group", "node_type", "group")
    _check_table("", attrs, REQUIRED)
    _check_table("", attrs, OPTIONAL)
    provenance = attrs.get("provenance", {})
    _check_table("provenance.", {name: provenance[name] for name in PROVENANCE if name in provenance}, PROVENANCE)
    nodes = _table(document.get("consolidated_metadata"), "consolidated_metadata").get("metadata")
    _check_nodes(_table(nodes, "consolidated_metadata.metadata"), attrs["lengths"])


# --- attributes -------------------------------------------------------------------------------------------------------


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def is_number(value: Any) -> bool:
    """Whether JSON gave a finite number that int64 or float64 holds."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or is_number(value)


def _is_time(value: Any) -> bool:
    try:
        return 1 < datetime.fromisoformat(value).year < 9999
    except (TypeError, ValueError):
        return False


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _one_of(*words: str) -> Check:
    return lambda value: isinstance(value, str) and value in words


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_identity(value: Any) -> bool:
    record = value.get("record", {}) if isinstance(value, dict) else None
    return isinstance(record, dict) and _list_of(is_number)(record.get("loss_levels") or [])


def _is_checkpoint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _one_of(*CHECKPOINTS)(value.get("name"))
        and _matches(DIGEST)(value.get("digest"))
    )  # fmt: skip


REQUIRED: dict[str, tuple[Check, str]] = {
    "run": (_matches(RUN_ID), "the name of a run"),
    "identity": (_is_identity, "a table, in whose table `record` loss_levels are numbers"),
    "seed_digest": (_matches(DIGEST), "a digest"),
    "head": (_matches(DIGEST), "a digest"),
    "record": (_matches(DIGEST), "a digest"),
    "status": (_one_of(*STATUSES), f"one of {', '.join(STATUSES)}"),
    "stop_reason": (_or_none(_is_text), "text or null"),
    "commits": (_is_count, "a count"),
    "last_step": (_or_none(_is_count), "a step or null"),
    "checkpoint": (_or_none(_is_checkpoint), "null or a name and a digest"),
    "lengths": (_table_of(_is_count), "a table of counts"),
}
OPTIONAL: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(
        (
            "title",
            "study_title",
            "study",
            "part",
            "size",
            "study_source",
            "paper",
            "family",
            "loss_convention",
            "Conventions",
            "lease",
        ),
        (_or_none(_is_text), "text or null"),
    ),
    "figures": (_or_none(_list_of(_is_text)), "a list of texts or null"),
    **dict.fromkeys(("claims", "overrides", "environment_changes"), (_list_of(_is_text), "a list of texts")),
    **dict.fromkeys(("stop", "provenance"), (_is_table, "a table")),
    "axes": (_table_of(_is_scalar), "a table of numbers and words"),
    "learning_rate": (lambda value: is_number(value) and value > 0, "a positive number"),
    "seed": (_is_count, "a whole number"),
    "created_at": (_or_none(_is_time), "a time in ISO 8601 or null"),
}
PROVENANCE: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("git_commit", "device", "host"), (_or_none(_is_text), "text or null")),
    "git_dirty": (lambda value: value in (None, True, False), "true, false or null"),
    "threads": (_or_none(_is_count), "a count or null"),
    "versions": (_table_of(_or_none(_is_text)), "a table of texts"),
}


def _check_table(where: str, table: Document, checks: dict[str, tuple[Check, str]]) -> None:
    for name, (check, rule) in checks.items():
        if name in table or checks is REQUIRED:
            shown = _shown(table[name]) if name in table else "nothing"
            _require(name in table and check(table[name]), f"{where}{name} = {shown}", rule)


# --- arrays -----------------------------------------------------------------------------------------------------------


def _check_nodes(nodes: Document, lengths: dict[str, int]) -> None:
    """Every group has what it must have, nothing else is there, and sizes agree."""
    unknown = lengths.keys() - schema.GROUPS.keys()
    _require(not unknown, f"lengths of {_shown(sorted(unknown))}", f"of the groups {', '.join(schema.GROUPS)}")
    sizes: dict[str, int] = {}
    expected = {"probe", *lengths}
    for group in ("probe", *lengths):
        _require(_table(nodes.get(group), group).get("node_type") == "group", group, "a group")
        names = [name.removeprefix(f"{group}/") for name in nodes if name.startswith(f"{group}/")]
        expected |= {f"{group}/{name}" for name in names}
        for name, dims in _planned(group, names):
            where = f"{group}/{name}"
            shape = _check_array(where, nodes.get(where), len(dims))
            if group != "probe":
                _require(shape[0] == lengths[group], f"length {shape[0]} of {where}", f"{lengths[group]}, as its group")
            _check_dims(where, nodes[where]["dimension_names"], dims, shape, sizes)
    extra = nodes.keys() - expected
    _require(not extra, f"entry {_shown(sorted(extra)[0] if extra else '')}", "of a group that the record has")


def _planned(group: str, names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The arrays that a group must have and those of these names, with their dimensions."""
    if group == "probe":
        known = schema.PROBE | (schema.TEST_PROBE if schema.TEST_PROBE.keys() & set(names) else {})
    else:
        known = {variable.name: variable for variable in schema.row_variables(group, names)}
    unknown = sorted(set(names) - known.keys())
    if unknown:
        variable = _shown(f"{group}/{unknown[0]}")
        raise InputError(f"this ntk-eos does not know its variable {variable}: install a newer one")
    yield from ((name, variable.dims) for name, variable in known.items())


def _check_array(where: str, node: Any, least_dims: int) -> list[int]:
    """The shape of an array whose document is as this package writes it."""
    node = _table(node, where)
    try:
        shape, dtype = node["shape"], node["data_type"]
        chunks, attributes = node["chunk_grid"]["configuration"]["chunk_shape"], node["attributes"]
        dims = node["dimension_names"]
    except (KeyError, TypeError):
        raise DamagedStore(f"{where}: is not an array of this format") from None
    for name, sizes in (("shape", shape), ("chunk_shape", chunks)):
        _require(_list_of(_is_count)(sizes) and least_dims <= len(sizes) <= 32, f"{where}: {name} = {_shown(sizes)}",
                 f"{least_dims} sizes")  # fmt: skip
    _require(len(chunks) == len(shape) and min(chunks) > 0, f"{where}: chunk_shape = {_shown(chunks)}", "of its shape")
    _require(_one_of(*DTYPES)(dtype), f"{where}: data_type = {_shown(dtype)}", "a number")
    _require(_list_of(_is_text)(dims) and len(dims) == len(shape), f"{where}: dimension_names", "one per size")
    _require(_is_table(attributes), f"{where}: attributes", "a table")
    for name in ("units", "long_name", "description", "coordinates"):
        _require(_or_none(_is_text)(attributes.get(name)), f"{where}: {name}", "text")
    _require(_list_of(_is_text)(attributes.get("names", [])), f"{where}: names", "a list of texts")
    _require(_list_of(_list_of(_is_count))(attributes.get("shapes", [])), f"{where}: shapes", "a list of shapes")
    chunk_bytes = math.prod(chunks) * np.dtype(dtype).itemsize
    _require(chunk_bytes <= MAX_CHUNK_BYTES, f"{where}: a chunk of {chunk_bytes} bytes", f"at most {MAX_CHUNK_BYTES}")
    count = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    _require(count <= MAX_CHUNKS, f"{where}: {count} chunks", f"at most {MAX_CHUNKS}")
    document = zarr3.array_document(tuple(shape), dtype, tuple(chunks), tuple(dims), attributes)
    odd = sorted(key for key in document.keys() | node.keys() if document.get(key) != node.get(key))
    _require(not odd, f"{where}: {_shown(odd)}", "as this format has it")
    return shape


def _check_dims(where: str, dims: list[str], planned: tuple[str, ...], shape: list[int], sizes: dict[str, int]) -> None:
    """An array has the dimensions of its variable, and those of one name have one size throughout a run."""
    features = dims[len(planned):] if where.startswith("probe/") else []  # fmt: skip
    _require(dims == [*planned, *features], f"{where}: dimensions {_shown(dims)}", ", ".join(planned))
    for dim, size in zip(planned, shape, strict=False):
        if dim != "step":
            size_of = sizes.setdefault(SQUARE.get(dim, dim), size)
            _require(size == size_of, f"{where}: {size} along {dim}", f"{size_of}, as elsewhere in the run")


# --- messages ---------------------------------------------------------------------------------------------------------


def _table(value: Any, what: str) -> Document:
    _require(isinstance(value, dict), what, "a table")
    return value


def _require(holds: Any, what: str, rule: str) -> None:
    if not holds:
        raise DamagedStore(f"{what}: must be {rule}")


def _shown(value: Any) -> str:
    """A value for a message: short and on one line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
