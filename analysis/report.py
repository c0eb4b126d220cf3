"""The report of a store: one HTML page that needs nothing else, neither network nor the store it was made from.

Everything on it is read from the store: what was run, verdicts, figures, tables, provenance, and behind each number
the query that gives it. Whatever comes from a store is text and is escaped; the page allows no scripts.
"""

import base64
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import catalog, results, studies
from analysis.judge import CHANGES, judge_store
from analysis.load import shared_level
from analysis.plots import FIGURES, render
from analysis.plots.files import write
from analysis.plots.numbers import LINES, either, frame, lines, words
from pipeline.disk import Location, location
from pipeline.errors import NtkEosError
from pipeline.store import Run, list_runs, stores_of

Root = str | os.PathLike[str]
Facts = list[tuple[str, str]]

# The order in which the settings of a run are told; others follow.
SETTINGS = ("data", "model", "loss", "update", "process", "learning_rate", "seed", "record")
TONES = {
    "passed": "good", "complete": "good", "failed": "bad", "underpowered": "unsure", "diverged": "unsure",
    "interrupted": "unsure", "stale": "unsure", "running": "live",
}  # fmt: skip
# A verdict is a word and a sign, never a colour alone.
SIGNS = {"passed": "✓ ", "failed": "✗ ", "underpowered": "? ", "diverged": "↯ "}

MATCHED = f"""
with {LINES}, matched as (
  select run_id, min(step) as step from alignment where loss <= {{level}} and c1 is not null group by run_id
)
select line, learning_rate, count(*) as runs, count(step) as reached, avg(step) as step, avg(loss) as loss,
       avg(kta) as kta, stddev(kta) as kta_sd, avg(c5) as c5, stddev(c5) as c5_sd,
       avg(ntk_sharpness) as sharpness, stddev(ntk_sharpness) as sharpness_sd
from lines left join matched using (run_id) left join alignment using (run_id, step)
where status <> 'diverged'
group by line, learning_rate
order by line
""".strip()

LAST = """
select run_id, final_loss as loss, arg_max(kta, step) as kta, arg_max(c5, step) as c5,
       arg_max(ntk_sharpness, step) as sharpness
from runs left join alignment using (run_id)
group by run_id, final_loss
""".strip()


def write_report(
    root: Root, out: Root | None = None, progress: Callable[[float, str], None] = lambda fraction, note: None
) -> Location:
    """Write the report of a store, or of the parts of a study; what is derived is brought up to date first.

    Args:
        root: folder of the store, or of the stores of the parts.
        out: the file; <root>/report.html by default.
        progress: told the share done and what comes next.

    Returns:
        Path of the file, which appears when it is whole.

    Raises:
        MissingError: if the root does not exist.
        InputError: if it is not a store, or the file cannot be written.
    """
    stores = stores_of(root)
    sections = []
    for number, store in enumerate(stores):

        def told(share: float, note: str, done: int = number) -> None:
            progress((done + share) / len(stores), note)

        sections.append(_section(store, told))
    path = location(root) / "report.html" if out is None else location(out)
    write(path, _page(sections).encode())
    return path


def _page(sections: Sequence[dict[str, Any]]) -> str:
    environment = Environment(
        loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "python": repr, "shell": shlex.quote}
    papers = {paper["source"]: paper for section in sections for paper in section["papers"]}
    return environment.get_template("report.html.j2").render(
        title=sections[0]["whole" if len(sections) > 1 else "title"],
        sizes=dict.fromkeys(section["size"] for section in sections if section["size"]),
        summary=[(what, sum((section[what] for section in sections), Counter())) for what in ("verdicts", "statuses")],
        sources=dict.fromkeys(source for section in sections for source in section["sources"]),
        papers=papers.values(),
        changes=CHANGES if any(section["claims"] for section in sections) else (),
        sections=sections,
        tones=TONES,
        signs=SIGNS,
    )


def _section(root: Root, progress: Callable[[float, str], None]) -> dict[str, Any]:
    """What the page says of one store."""
    results.analyze(root, progress=lambda share, note: progress(0.2 * share, note))
    catalog.sync(root)
    runs = list_runs(root)
    progress(0.2, "claims")
    claims, claims_missing = _claims(root)
    figures = _figures(root, lambda share, note: progress(0.3 + 0.6 * share, note))
    progress(0.9, "page")
    return {
        "title": either(str(run.attrs.get("title", run.run_id)) for run in runs) or "An empty store",
        "whole": next(
            (str(run.attrs["study_title"]) for run in runs if run.attrs.get("study_title")), "Several stores"
        ),
        "part": next((str(run.attrs["part"]) for run in runs if run.attrs.get("part")), None),
        "size": next((str(run.attrs["size"]) for run in runs if run.attrs.get("size")), None),
        "verdicts": Counter(claim["verdict"] for claim in claims),
        "statuses": Counter(run.status for run in runs),
        "facts": _facts(root, runs),
        "sources": dict.fromkeys(str(run.attrs["study_source"]) for run in runs if run.attrs.get("study_source")),
        "papers": _papers(root),
        "claims": claims,
        "claims_missing": claims_missing,
        "figures": figures,
        "matched": _matched(root, runs),
        "runs": _runs(root, runs),
        "provenance": _provenance(runs),
        "root": os.fspath(root),
        "example": runs[-1].run_id if runs else "RUN",
    }


def _claims(root: Root) -> tuple[list[dict[str, Any]], str]:
    """The verdicts, or why there are none."""
    try:
        claims = [judgement.as_row() for judgement in judge_store(root)]
    except NtkEosError as error:
        return [], f"Not judged: {error}."
    return claims, "" if claims else "The studies of this store make no claims."


def _figures(root: Root, progress: Callable[[float, str], None]) -> list[dict[str, Any]]:
    """Every figure, over each of its axes; one that lacks its inputs says so."""
    try:
        drawings = studies.figures(root)
    except NtkEosError:
        drawings = FIGURES  # of a paper that is not known here, which the claims say
    found = []
    for number, drawing in enumerate(drawings.values()):
        progress(number / len(drawings), f"figure {drawing.name}")
        images, missing = [], ""
        over: dict[str, list[str]] = {}
        try:
            for x in drawing.axes:
                images.append(
                    (f"{drawing.title}, over {x}", base64.b64encode(render(drawing.draw(root, x), "png")).decode())
                )
                over.setdefault(drawing.sql(root, x), []).append(x)
        except NtkEosError as error:
            missing = f"Not drawn: {error}."
        found.append(
            {
                "name": drawing.name,
                "title": drawing.title,
                "caption": drawing.caption,
                "images": images,
                "queries": [(sql, f", over {' and '.join(xs)}" if len(over) > 1 else "") for sql, xs in over.items()],
                "missing": missing,
            }
        )
    return found


def _papers(root: Root) -> list[dict[str, Any]]:
    try:
        modules = studies.papers(root)
    except NtkEosError:
        return []
    return [
        {
            "source": module.SOURCE,
            "about": (module.__doc__ or "").strip().split("\n\n")[1:],
            "choices": [dict(zip(("what", "choice", "whose"), row, strict=True)) for row in module.CHOICES],
        }
        for module in modules
    ]


def _facts(root: Root, runs: Sequence[Run]) -> Facts:
    """What was run. A setting in which the runs differ is listed with all its values."""
    identities = [run.attrs["identity"] for run in runs]
    keys = dict.fromkeys([*SETTINGS, *(key for identity in identities for key in identity)])
    sizes = frame(root, "select distinct n, c, p, k from runs").dropna(axis=1, how="all")
    names = {"n": "probe examples", "c": "outputs", "p": "parameters", "k": "eigenpairs"}
    facts = [
        ("study", either(str(run.attrs.get("study") or run.run_id) for run in runs)),
        *((key.replace("_", " "), either(words(i[key]) for i in identities if key in i)) for key in keys),
        *((names[letter], either(f"{letter} = {value:,}" for value in sizes[letter].dropna())) for letter in sizes),
        ("loss convention", either(str(run.attrs.get("loss_convention", "")) for run in runs)),
        ("stop", either(words(run.attrs["stop"]) for run in runs if "stop" in run.attrs)),
        ("overrides", either(words(run.attrs["overrides"]) for run in runs if run.attrs.get("overrides"))),
        ("why runs ended", _counted(run.attrs.get("stop_reason") or run.status for run in runs)),
    ]
    return [(label, text) for label, text in facts if text]


def _matched(root: Root, runs: Sequence[Run]) -> dict[str, Any]:
    """One row per line of the figures at the smallest loss level that all complete runs reach."""
    try:
        level = shared_level(runs, root)
    except NtkEosError as error:
        return {"missing": f"Not compared: {error}.", "level": None}
    sql = MATCHED.replace("{level}", repr(level))
    labels = lines(root).drop_duplicates("line").set_index("line")["label"]
    rows = [
        {
            "learning rate": labels[row["line"]],
            "runs there": f"{row['reached']} of {row['runs']}",
            "step": row["step"],
            "loss": row["loss"],
            "KTA": _spread(row["kta"], row["kta_sd"]),
            "C(5)": _spread(row["c5"], row["c5_sd"]),
            "sharpness": _spread(row["sharpness"], row["sharpness_sd"]),
            "2/η": 2 / row["learning_rate"],
        }
        for row in frame(root, sql).to_dict("records")
    ]
    return {
        "missing": "" if rows else "No run.",
        "level": level,
        "sql": sql,
        "rows": rows,
        "columns": list(rows[0]) if rows else [],
    }


def _runs(root: Root, runs: Sequence[Run]) -> dict[str, Any]:
    """One row per run: where it stands on the grid, how it ended, what its last row holds."""
    last: dict[Any, dict[Any, Any]] = frame(root, LAST).set_index("run_id").to_dict("index")
    rows = []
    for run in runs:
        axes = {
            name: value for name, value in run.attrs.get("axes", {}).items() if name not in ("learning_rate", "seed")
        }
        numbers = last.get(run.run_id, {})  # of a run created since the catalogue was synced there are none yet
        rate = run.attrs.get("learning_rate")
        rows.append(
            {
                "run": run.run_id,
                "status": run.status,
                "ended by": run.heartbeat.get("error") or run.attrs.get("stop_reason"),
                "learning rate": rate,
                "seed": run.attrs.get("seed"),
                **axes,
                "steps": run.attrs.get("last_step"),
                "loss": numbers.get("loss"),
                "KTA": numbers.get("kta"),
                "C(5)": numbers.get("c5"),
                "sharpness": numbers.get("sharpness"),
                "2/η": 2 / rate if rate else None,
                "head": run.head,
            }
        )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = {"run", "status", "ended by", "head"}
    return {
        "columns": columns,
        "numeric": [c for c in columns if c not in text],
        "rows": [dict.fromkeys(columns) | r for r in rows],
    }


def _provenance(runs: Sequence[Run]) -> Facts:
    """Where the numbers come from; a value that not all runs share says how many do."""
    documents = [run.attrs.get("provenance", {}) for run in runs]
    keys = dict.fromkeys(key for document in documents for key in document)
    changes = [f"{run.run_id}: {change}" for run in runs for change in run.attrs.get("environment_changes", ())]
    return [
        ("created", _counted(str(run.attrs.get("created_at", ""))[:10] for run in runs)),
        *(
            (key.replace("_", " "), _counted(words(document[key]) for document in documents if key in document))
            for key in keys
        ),
        ("changes of the environment", "; ".join(changes) or "none"),
        ("format", _counted(f"{run.attrs['Conventions']}, version {run.attrs['format_version']}" for run in runs)),
    ]


def _counted(values: Iterable[str]) -> str:
    """Each value once, with how often it occurs if there are several."""
    counts = Counter(values)
    return "; ".join(f"{value} ({count} runs)" if len(counts) > 1 else value for value, count in counts.items())


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None or math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if deviation is None or math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _cell(value: Any) -> str:
    """A number short enough to read; what is missing as a dash."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
