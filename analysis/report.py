"""The report of a store: one HTML page that needs nothing else, neither network nor the store it was made from.

Everything on it is read from the store: what was run, verdicts, figures, tables, provenance, and behind each number
the query that gives it. Whatever comes from a store is text and is escaped; the page allows no scripts.
"""

import base64
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import catalog, results, studies
from analysis.judge import judge_store, matched_level
from analysis.plots import render
from analysis.plots.numbers import either, frame, setting, words
from pipeline.disk import Directory
from pipeline.errors import NtkEosError
from pipeline.store import Run, list_runs

Root = str | os.PathLike[str]
Facts = list[tuple[str, str]]

TONES = {
    "passed": "good", "complete": "good", "failed": "bad", "underpowered": "unsure", "diverged": "unsure",
    "interrupted": "unsure", "stale": "unsure", "running": "live",
}  # fmt: skip
# A verdict is a word and a sign, never a colour alone.
SIGNS = {"passed": "✓ ", "failed": "✗ ", "underpowered": "? ", "diverged": "↯ "}

MATCHED = """
with matched as (
  select run_id, min(step) as step from alignment where loss <= {level} and c5 is not null group by run_id
)
select learning_rate, count(step) as reached, count(*) as runs, avg(step) as step, avg(kta) as kta,
       stddev(kta) as kta_sd, avg(c5) as c5, stddev(c5) as c5_sd, avg(ntk_sharpness) as ntk_sharpness,
       2 / learning_rate as line
from runs left join matched using (run_id) left join alignment using (run_id, step)
where status <> 'diverged'
group by learning_rate
order by learning_rate
""".strip()

LAST = """
select run_id, arg_max(kta, step) as kta, arg_max(c5, step) as c5, arg_max(ntk_sharpness, step) as ntk_sharpness
from alignment group by run_id
""".strip()


def write_report(
    root: Root, out: Root | None = None, progress: Callable[[float, str], None] = lambda fraction, note: None
) -> Path:
    """Write the report of a store; what is derived from the runs is brought up to date first.

    Args:
        root: folder of the store.
        out: the file; <root>/report.html by default.
        progress: told the share done and what comes next.

    Returns:
        Path of the file, which appears when it is whole.

    Raises:
        MissingError: if the root does not exist.
        InputError: if it is not a store, or the file cannot be written.
    """
    progress(0.0, "results")
    results.analyze(root)
    catalog.sync(root)
    page = _page(root, progress)
    path = Path(root, "report.html") if out is None else Path(out)
    folder = Directory(path.parent)
    folder.make()
    folder.put(path.name, page.encode(), durable=False)
    return path


def _page(root: Root, progress: Callable[[float, str], None]) -> str:
    runs = list_runs(root)
    progress(0.2, "claims")
    claims, claims_missing = _claims(root)
    figures = _figures(root, lambda share, note: progress(0.3 + 0.6 * share, note))
    progress(0.9, "page")
    statuses = _counted(run.status for run in runs)
    verdicts = _counted(claim["verdict"] for claim in claims)
    environment = Environment(
        loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    return environment.get_template("report.html.j2").render(
        title=either(str(run.attrs.get("title", run.run_id)) for run in runs) or "An empty store",
        summary=" · ".join(part for part in (f"claims: {verdicts}" if claims else "", f"runs: {statuses}") if part),
        facts=_facts(runs),
        papers=_papers(root),
        claims=claims,
        claims_missing=claims_missing,
        figures=figures,
        matched=_matched(root),
        runs=_runs(root, runs),
        provenance=_provenance(runs),
        snippets=_snippets(root, runs),
        tones=TONES,
        signs=SIGNS,
    )


def _facts(runs: Sequence[Run]) -> Facts:
    """What was run, from the identities of the runs; a setting in which they differ is listed with all its values."""
