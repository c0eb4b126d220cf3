"""The tables of the catalogue: every column with its type, unit and meaning; and the table of runs itself.

This registry is to the catalogue what `pipeline.schema` is to a run: the code creates the tables from it, DuckDB
carries it as comments, and docs/catalogue.md lists it (`python -m analysis.tables` prints that part of the page).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import schema
from pipeline.errors import InputError, MissingError
from pipeline.store import Run, list_runs

if TYPE_CHECKING:  # pandas and DuckDB are imported where they are used: the command reads this registry too
    import duckdb
    import pandas as pd

# C(k), the cumulative alignment, is a column for these k.
LEADING = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: as in SQL.
        type: DuckDB's type.
        unit: UDUNITS string, "1" if dimensionless, "" for what is not a quantity.
        description: what it says. NULL is what is not known or does not exist.
    """

    name: str
    type: str
    unit: str
    description: str


@dataclass(frozen=True)
class Layout:
    """A table.

    Attributes:
        description: what a row is.
        columns: its columns, in order.
    """

    description: str
    columns: tuple[Column, ...]


def _stored(*variables: schema.Variable) -> tuple[Column, ...]:
    return tuple(Column(v.name, "DOUBLE", v.units, v.description) for v in variables)


RUN_ID = Column("run_id", "VARCHAR", "", "Name of the run, unique in its store.")
STEP = Column("step", "BIGINT", "1", schema.ROW["step"].description)
(LOSS,) = _stored(schema.ROW["loss"])

TABLES: dict[str, Layout] = {
    "runs": Layout(
        "One row per run, from its record.",
        (
            RUN_ID,
            Column("path", "VARCHAR", "", "Folder of the run, relative to the root of the store."),
            Column(
                "status", "VARCHAR", "",
                "complete, diverged, running, interrupted, failed, or stale: unfinished, and nobody writes it.",
            ),
            Column("stop_reason", "VARCHAR", "", "Why a finished run ended: steps, loss, or what was not finite."),
            Column("learning_rate", "DOUBLE", "1", "Step size η."),
            Column("seed", "BIGINT", "", "Seed of data, initialisation and order."),
            Column("axes", "JSON", "", "Place of the run on each axis of its grid: `axes->>'$.\"model.width\"'`."),
            Column("study", "VARCHAR", "", "Name of the study that the run belongs to."),
            Column("part", "VARCHAR", "", "Part of that study, where it has parts."),
            Column("size", "VARCHAR", "", "smoke, quick or full, where the study has sizes."),
            Column("title", "VARCHAR", "", "Title of that study."),
            Column("family", "VARCHAR", "", "Equal for runs that differ in nothing but their process."),
            Column("process", "VARCHAR", "", "What moves the parameters; discrete is the update rule."),
            Column("dataset", "VARCHAR", "", "Name of the data."),
            Column("model", "VARCHAR", "", "Name of the model."),
            Column("loss_function", "VARCHAR", "", "Name of the loss."),
            Column("update_rule", "VARCHAR", "", "Name of the update rule."),
            Column("n", "BIGINT", "1", "Probe examples."),
            Column("m", "BIGINT", "1", "Held-out examples."),
            Column("c", "BIGINT", "1", "Outputs."),
            Column("p", "BIGINT", "1", "Parameters."),
            Column("k", "BIGINT", "1", "Eigenpairs recorded."),
            Column("steps", "BIGINT", "1", "Last committed step: the number of updates made before it."),
            Column("n_snapshots", "BIGINT", "1", "Committed rows of the group snapshots."),
            Column("n_spectra", "BIGINT", "1", "Committed rows of the group spectra."),
            Column("n_scalars", "BIGINT", "1", "Committed rows of the group scalars."),
            Column("n_hessian", "BIGINT", "1", "Committed rows of the group hessian."),
            Column("n_train", "BIGINT", "1", "Committed rows of the group train."),
            Column("final_loss", "DOUBLE", "1", "Training loss at the last committed step."),
            Column("commits", "BIGINT", "1", "Commits so far."),
            Column("head", "VARCHAR", "", "Head of the digest chain: equal for runs that recorded the same numbers."),
            Column("created_at", "TIMESTAMP", "", "When the run was created, UTC."),
            Column("git_commit", "VARCHAR", "", "Commit of the code that created the run."),
            Column("git_dirty", "BOOLEAN", "", "Whether that code had changes that were not committed."),
            Column("device", "VARCHAR", "", "Device of the computation."),
            Column("threads", "BIGINT", "1", "Threads of the computation."),
            Column("torch_version", "VARCHAR", "", "Version of torch."),
            Column("host", "VARCHAR", "", "Machine on which the run was created."),
            Column("config", "JSON", "", "All that determines the run's numbers: `config->>'$.model.width'`."),
        ),
    ),
    "snapshots": Layout(
        "One row per recorded kernel; the kernels themselves stay in the store.",
        (
            RUN_ID,
            Column("position", "BIGINT", "1", "Place of the row in the run's group snapshots, counted from 0."),
            STEP,
            LOSS,
            *_stored(*schema.SCALARS.values(), *schema.TEST_SCALARS.values()),
        ),
    ),
    "train": Layout(
        "The training loop's own numbers, thinned to at most 2000 rows per run; the first and the last are kept.",
        (RUN_ID, STEP, *_stored(*schema.TRAIN.values(), *schema.OF_PROCESS.values())),
    ),
    "alignment": Layout(
        "One row per run and step at which a kernel was measured; NULL where the step lacks a measure's input.",
        (
            RUN_ID,
            STEP,
            LOSS,
            *_stored(*schema.TEST_SCALARS.values(), schema.SCALARS["ntk_sharpness"]),
            Column("kta", "DOUBLE", "1", "Kernel target alignment ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖)."),
            Column("kta_centred", "DOUBLE", "1", "The same of the centred kernel and targets; at snapshots."),
            Column("effective_rank", "DOUBLE", "1", "exp(-Σ p_i log p_i), p_i = λ_i / Σ λ; at snapshots."),
            *(
                Column(
                    f"c{k}", "DOUBLE", "1",
                    f"C({k}): share of the target in the first {k} eigenvectors; at eigenpairs." if k > 1
                    else "C(1): share of the target in the first eigenvector; at eigenpairs.",
                )
                for k in LEADING
            ),
        ),
    ),
    "phases": Layout(
        "One row per run and step of the group scalars: the sharpness, its line and the phase of training.",
        (
            RUN_ID,
            STEP,
            Column("sharpness", "DOUBLE", "1", "NTK sharpness λ₁/n."),
            Column("line", "DOUBLE", "1", "2/η, the line of gradient descent."),
            Column(
                "phase", "VARCHAR", "",
                "progressive_sharpening or stable before the first crossing of the line, eos_rising or eos_falling "
                "after it, by the trend of the mean sharpness; diverged.",
            ),
            Column("sharpness_mean", "DOUBLE", "1", "Two-step mean of the sharpness, of this row and the next."),
            Column("kta_mean", "DOUBLE", "1", "Two-step mean of KTA, of this row and the next."),
            Column("sharpness_change", "DOUBLE", "1", "sharpness_mean minus that of the row before."),
            Column("kta_change", "DOUBLE", "1", "kta_mean minus that of the row before."),
        ),
    ),
    "phase_changes": Layout(
        "One row per run: what happened in its phases at the Edge of Stability.",
        (
            RUN_ID,
            Column("crossed", "BOOLEAN", "", "Whether the sharpness was ever above 2/η."),
            Column("crossing_step", "BIGINT", "1", "First recorded step with the sharpness above 2/η."),
            Column("kta_change_rising", "DOUBLE", "1", "Sum of kta_change over the rows eos_rising."),
            Column("kta_change_falling", "DOUBLE", "1", "Sum of kta_change over the rows eos_falling."),
            Column("steps_rising", "DOUBLE", "1", "Steps for which the rows eos_rising stand."),
            Column("steps_falling", "DOUBLE", "1", "Steps for which the rows eos_falling stand."),
            Column("kta_gain_rising", "DOUBLE", "1", "kta_change_rising per step."),
            Column("kta_gain_falling", "DOUBLE", "1", "kta_change_falling per step."),
            Column("max_sharpness", "DOUBLE", "1", "Largest recorded sharpness."),
            Column("final_sharpness_mean", "DOUBLE", "1", "Mean sharpness of the run's last two rows."),
            Column("n_valid", "BIGINT", "1", "Rows that count: eos_rising or eos_falling, with a kta_change."),
        ),
    ),
    "measures": Layout(
        "Every other measure, one row per value; no row where it is undefined or its input was not recorded.",
        (
            RUN_ID,
            STEP,
            Column("measure", "VARCHAR", "", "Name, such as radius, or mode_alignment_1 for the first of k values."),
            Column("value", "DOUBLE", "1", "Its value."),
        ),
    ),
    "claims": Layout(
        "The last verdict on each claim, until a run changes; `ntk-eos claims` judges anew.",
        (
            Column("study", "VARCHAR", "", "Name of the study."),
            Column("part", "VARCHAR", "", "Part of the study, where it has parts."),
            Column("size", "VARCHAR", "", "smoke, quick or full, where the study has sizes."),
            Column("claim", "VARCHAR", "", "Name of the claim."),
            Column("statement", "VARCHAR", "", "What is claimed."),
            Column("rule", "VARCHAR", "", "What has to hold, fixed before the study's first run."),
            Column("changes", "VARCHAR", "", "Later changes of the rule, with their reasons."),
            Column("source", "VARCHAR", "", "Where the statement comes from."),
            Column("level", "DOUBLE", "1", "Loss at which runs were compared."),
            Column("value", "VARCHAR", "", "The numbers that the verdict rests on, to read."),
            Column("verdict", "VARCHAR", "", "passed, failed, or underpowered: too few runs to tell."),
            Column("runs", "BIGINT", "1", "Runs that the verdict rests on."),
            Column("sql", "VARCHAR", "", "The query that gives those numbers."),
        ),
    ),
    "sync": Layout(
        "What the rows of each run were made from, so that only runs that changed are read again.",
        (
            RUN_ID,
            Column("fingerprint", "VARCHAR", "", "Digest of the run's record, its status, and its derived results."),
            Column("analyzed", "BOOLEAN", "", "Whether those results are of the run's last commit."),
        ),
    ),
    "meta": Layout(
        "One row about the catalogue itself.",
        (
            Column("format_version", "BIGINT", "", "Format of the stores that this catalogue indexes."),
            Column("layout", "VARCHAR", "", "Digest of these tables; a catalogue with another one is built anew."),
            Column("root", "VARCHAR", "", "Root of the store."),
            Column("built_at", "TIMESTAMP", "", "When the catalogue was last changed, UTC."),
            Column("package_version", "VARCHAR", "", "Version of ntk-eos that changed it."),
        ),
    ),
}  # fmt: skip

DTYPES = {"BIGINT": "Int64", "DOUBLE": "Float64", "BOOLEAN": "boolean", "TIMESTAMP": "datetime64[us]"}
SIZES = {"sample": "n", "test_sample": "m", "output": "c", "eig": "k", "parameter_index": "p"}


def create_table(connection: "duckdb.DuckDBPyConnection", name: str) -> None:
    """Create an empty table of the catalogue, its columns described by comments."""
    layout = TABLES[name]
    columns = ", ".join(f"{column.name} {column.type}" for column in layout.columns)
    connection.execute(f"create table {name} ({columns})")
    connection.execute(f"comment on table {name} is {_literal(layout.description)}")
    for column in layout.columns:
        unit = f" [{column.unit}]" if column.unit else ""
        connection.execute(f"comment on column {name}.{column.name} is {_literal(column.description + unit)}")


def insert(connection: "duckdb.DuckDBPyConnection", name: str, frame: "pd.DataFrame") -> None:
    """Append the rows of a frame, by the names of its columns; NaN becomes NULL."""
    connection.register("incoming", frame)
    connection.execute(f"insert into {name} by name select * from incoming")
    connection.unregister("incoming")


def frame_of(name: str, rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows as a frame with the dtypes of a table; keys that a row lacks are NA."""
    import pandas as pd

    return pd.DataFrame(
        {
            column.name: pd.Series([row.get(column.name) for row in rows], dtype=DTYPES.get(column.type, "object"))
            for column in TABLES[name].columns
        }
    )


def reference() -> str:
    """The part of docs/catalogue.md that lists every table and column."""
    lines = []
    for name, layout in TABLES.items():
        lines += [f"## {name}", "", layout.description, "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        for column in layout.columns:
            # A bar would end the cell, also inside a formula.
            meaning = column.description.replace("|", "\\|")
            lines.append(f"| `{column.name}` | {column.type} | {column.unit} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def run_table(root: str | os.PathLike[str]) -> "pd.DataFrame":
    """The table `runs`: one row per run of a store; what is not known is NA."""
    return frame_of("runs", [run_row(run) for run in list_runs(root)])


def select(runs: Sequence[Run], where: str) -> list[Run]:
    """The runs that satisfy an SQL condition on the columns of the table `runs`.

    Raises:
        InputError: if DuckDB refuses the condition.
        MissingError: if it leaves no run.
    """
    import duckdb

    frame = frame_of("runs", [run_row(run) for run in runs])
    with duckdb.connect(config={"enable_external_access": False, "lock_configuration": True}) as connection:
        create_table(connection, "runs")
        insert(connection, "runs", frame)
        try:
            wanted = {row[0] for row in connection.table("runs").filter(where).project("run_id").fetchall()}
        except duckdb.Error as error:
            raise InputError(f"where = {where!r}: {one_line(error)}") from error
    if not wanted:
        raise MissingError(f"where = {where!r} leaves none of {len(runs)} runs; `ntk-eos status ROOT` lists them")
    return [run for run in runs if run.run_id in wanted]


def one_line(error: Exception) -> str:
    """DuckDB's message without the excerpt of the query that follows it."""
    return "; ".join(str(error).partition("\n\n")[0].split("\n"))


def run_row(run: Run) -> dict[str, Any]:
    """What the record of a run says, by column of the table `runs`."""
    attrs, axes = run.attrs, run_axes(run)
    identity, provenance = attrs["identity"], attrs.get("provenance", {})
    sizes: dict[str, int] = {}
    for group in run.lengths:
        sizes |= run_sizes(run, group)
    trained = next((group for group in ("train", "scalars", "spectra", "snapshots") if run.lengths.get(group)), None)
    return {
        "run_id": run.run_id,
        "path": f"{run.path.parent.name}/{run.path.name}",
        "status": run.status,
        "learning_rate": axes["learning_rate"],
        "seed": axes["seed"],
        "axes": json.dumps(axes),
        "dataset": _name(identity, "data"),
        "model": _name(identity, "model"),
        "loss_function": _name(identity, "loss"),
        "update_rule": _name(identity, "update"),
        "process": identity.get("process"),
        **{letter: sizes.get(letter) for letter in SIZES.values()},
        "steps": attrs["last_step"],
        **{f"n_{group}": run.lengths.get(group) for group in schema.GROUPS},
        "final_loss": run.read(f"{trained}/loss", run.lengths[trained] - 1)[0].item() if trained else None,
        "created_at": utc(attrs.get("created_at")),
        "torch_version": at(provenance, "versions", "torch"),
        "config": json.dumps(identity),
        **{
            name: attrs.get(name)
            for name in ("stop_reason", "study", "part", "size", "title", "family", "commits", "head")
        },
        **{name: provenance.get(name) for name in ("git_commit", "git_dirty", "device", "threads", "host")},
    }


def run_axes(run: Run) -> dict[str, Any]:
    """The point of the grid at which a run stands; always has learning_rate and seed."""
    axes = run.attrs.get("axes", {})
    return {name: axes[name] if name in axes else _recorded(run, name) for name in ("learning_rate", "seed")} | axes


def run_sizes(run: Run, group: str) -> dict[str, int]:
    """n, m, c, k and p, as far as the variables of a group and the targets have them."""
    nodes = [*run.arrays(group).values(), run.node("probe/target")]
    return {
        SIZES[dim]: size
        for node in nodes
        for dim, size in zip(node["dimension_names"], node["shape"], strict=True)
        if dim in SIZES
    }


def at(document: Any, *keys: str) -> Any:
    """Value at a path of nested tables; None if it is not there."""
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def _recorded(run: Run, name: str) -> Any:
    """Learning rate or seed of a run, from the root attributes or its first row."""
    if name in run.attrs:
        return run.attrs[name]
    group = next((group for group, rows in run.lengths.items() if rows), None)
    return None if group is None else run.read(f"{group}/{name}", 0, 1)[0].item()


def _name(identity: Mapping[str, Any], part: str) -> str | None:
    """The name of the run's data, model, loss or update rule: a table with a name, or the name itself."""
    value = identity.get(part)
    return value if isinstance(value, str) else at(value, "name")


def utc(text: str | None) -> datetime | None:
    """A time in ISO 8601 as a TIMESTAMP, which DuckDB keeps without a zone."""
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


if __name__ == "__main__":
    print(reference())
