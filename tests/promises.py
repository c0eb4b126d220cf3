"""What is promised of stores, runs and analyses, and the page of what was measured.

python tests/promises.py docs/reliability.json > docs/reliability.md
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        says: what holds.
        given: the conditions under which it does.
        target: what the figures must be.
    """

    says: str
    given: str
    target: str


LOCAL = "a local POSIX file system, or an object store with conditional PUT (see docs/store.md)"
DISK = "a local POSIX file system"

PROMISES = {
    "R1": Promise(
        "No committed row is ever lost, whenever the writer is killed.",
        f"{LOCAL}; SIGKILL of the process, its machine goes on",
        "0 rows that were seen or acknowledged are missing later",
    ),
    "R2": Promise(
        "No reader ever sees half a row, through our code or through plain xarray.",
        f"{LOCAL}; readers that honour consolidated metadata, xarray's default",
        "0 torn or wrong rows",
    ),
    "R3": Promise(
        "A failure of any single operation of creation, commit, finish, resume and repair is survived.",
        "the operation fails with an error, before it is done or after it",
        "every point recovers, and the run ends with the same head",
    ),
    "R4": Promise(
        "A power cut at any moment is survived.",
        f"{DISK} that keeps what was fsynced; simulated: what was not may be gone, empty or there, in any mixture",
        "every acknowledged commit survives at every cut",
    ),
    "R5": Promise(
        "A run that is killed and resumed ends with the bits of one that was not.",
        "the same device, threads, processor type and versions",
        "equal heads, for every update rule and process",
    ),
    "R6": Promise(
        "The same configuration records the same numbers.",
        "the same device, threads, processor type and versions; another number of threads changes last bits",
        "equal heads; another seed, another head",
    ),
    "R7": Promise(
        "Any number of processes write their runs into one root at once.",
        LOCAL,
        "all rows of all runs, no retry",
    ),
    "R8": Promise(
        "A run has one writer: the second is refused and told who holds the run; a killed one gives it back.",
        f"{DISK} with flock (NFS may lack it), or conditional PUT and clocks right to a minute",
        "0 rows from two writers",
    ),
    "R9": Promise(
        "A full disk costs what was not committed and nothing else.",
        f"{DISK}; the run is started again when there is room",
        "0 rows lost, and the same head after the resume",
    ),
    "R10": Promise(
        "Damage is noticed: any by `verify --deep`, flipped bits and truncation by any read.",
        "damage by accident; whoever can write the store can also recompute its digests",
        "all found, no alarm at a clean store",
    ),
    "R11": Promise(
        "Damage to one snapshot is named and contained: the rest stays usable.",
        "the commit record itself is whole",
        "all other values equal, bit for bit",
    ),
    "R12": Promise(
        "A store that was put back to an older state is noticed.",
        "run.json or the catalogue has seen the later state; with neither witness an old copy cannot be told apart",
        "all found",
    ),
    "R13": Promise(
        "A diverged run is a result: it ends at its first bad step and keeps every row before.",
        "loss, gradient, kernel or eigenvalues that are not finite",
        "status diverged, exit code 0, no value that is not finite stored, no eigensolver called on one",
    ),
    "R14": Promise(
        "A diverged run is never averaged in silently.",
        "results of the functions of `analysis`",
        "n_valid and status in every summary; NaN only where the status says so",
    ),
    "R15": Promise(
        "A store from a stranger runs no code, reads nothing outside its root and exhausts no memory.",
        "our commands and functions; other readers have their own rules",
        "0 executions, 0 reads outside, under 256 MiB before each refusal, one line each",
    ),
    "R16": Promise(
        "A study file from a stranger is refused in one line or means what it says.",
        "without --allow-imports",
        "0 tracebacks, no path outside the root",
    ),
    "R17": Promise(
        "SQL only reads the catalogue.",
        "`ntk-eos sql` and `analysis.connect`",
        "0 writes, 0 files or networks reached",
    ),
    "R18": Promise(
        "There is no pickle, eval or exec in the code, and no way to load one from a store.",
        "`pipeline/` and `analysis/`; Dask's own protocol between the processes of a cluster is another matter",
        "0 uses",
    ),
    "R19": Promise(
        "Stores of this format are read for ever, and by others without our code.",
        "format version 1",
        "every golden store reads equal; a newer format is refused with what to do",
    ),
    "R20": Promise(
        "The catalogue is disposable.",
        "the stores are there",
        "rebuilt tables equal; a kill leaves the old file whole",
    ),
    "R21": Promise(
        "Lost workers change no result, of an analysis, a sweep or a kernel in tiles.",
        "dask.distributed, on a folder that all workers see or an object store",
        "results equal bit for bit, heads equal to a serial run's",
    ),
    "R22": Promise(
        "Memory is bounded by what was given, not by the store or the kernel.",
        "chunks fit the budget: see docs/scaling.md",
        "the peak stays below the stated budget",
    ),
    "R23": Promise(
        "A process that commits for days leaks nothing.",
        DISK,
        "no growth of open files, threads or memory",
    ),
    "R24": Promise(
        "Recording safely costs little.",
        "n = 1024, a snapshot every 100 steps",
        "commits take under 5 % of the time",
    ),
    "R25": Promise(
        "No sequence of operations breaks a store.",
        "create, append, commit, crash, resume, finish, extend, verify, repair, copy, damage; in random order",
        "0 differences from a model that is a dictionary",
    ),
}


def figures_text(figures: dict[str, Any]) -> str:
    """Figures as words and numbers."""
    return ", ".join(f"{name.replace('_', ' ')} {number_text(value)}" for name, value in figures.items())


def number_text(value: Any) -> str:
    """A number to read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def page(document: dict[str, Any]) -> str:
    """The page as markdown.

    Raises:
        ValueError: if a promise has no figure.
    """
    by_promise = {name: [one for one in document["records"] if one["promise"] == name] for name in PROMISES}
    if missing := [name for name, records in by_promise.items() if not records]:
        raise ValueError(f"no figure for {', '.join(missing)}: run make reliability")
    lines = [INTRODUCTION.format(**document["machine"])]
    lines += ["| | promise | target | |", "|---|---|---|---|"]
    for name, records in by_promise.items():
        lines.append(
            f"| [{name}](#{name.lower()}) | {PROMISES[name].says} | {PROMISES[name].target} | {state(records)} |"
        )
    for name, records in by_promise.items():
        promise = PROMISES[name]
        lines += [
            "",
            f"## {name}",
            "",
            promise.says,
            "",
            f"* Given: {promise.given}.",
            f"* Target: {promise.target}.",
            "",
        ]
        lines += ["| case | measured | test |", "|---|---|---|"]
        lines += [row(record) for record in records]
    return "\n".join(lines) + "\n"


def state(records: list[dict[str, Any]]) -> str:
    """What became of a promise."""
    if any(record["failed"] for record in records):
        return "**failed**"
    return "kept" if all(record["met"] for record in records) else "**missed**, see there"


def row(record: dict[str, Any]) -> str:
    """One measurement."""
    text = figures_text(record["figures"])
    if record["failed"]:
        text += "; **the test failed**"
    elif not record["met"]:
        text += f"; **missed**: {record['why']}"
    size = f" ({record['size']})" if record["size"] else ""
    return f"| {record['case']}{size} | {text} | `{record['test']}` |".replace("tests/reliability/", "")


INTRODUCTION = """\
# Reliability

What is promised, under which conditions, and what was measured: this page is written by the tests themselves, and so is
the file `reliability.json` beside it. `make reliability` measures the size called full and those without a size,
`make soak` the size called soak; `make test` holds a short part of each. One test alone:

```sh
.venv/bin/pytest -m "" "tests/reliability/test_kill_writer.py" -k full
```

Measured on {cores} cores ({processor}), Python {python}, torch {torch}, zarr {zarr}, numpy {numpy}. A case that has two
rows was measured in two sizes. Tests are below `tests/reliability/` unless they say otherwise.
"""


if __name__ == "__main__":
    try:
        print(page(json.loads(Path(sys.argv[1]).read_text())), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")
