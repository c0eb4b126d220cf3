"""The page of verdicts: what the studies of a paper claim, how it was judged and what came out.

`python -m analysis.verdicts ROOT...` prints docs/claims.md from the stores of studies; `make studies` makes both.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from analysis import catalog, results
from analysis.judge import CHANGES, Judgement, judge_store
from analysis.plots import numbers
from pipeline.store import Run, list_runs, stores_of

HEAD = """# Claims and their verdicts

Written by `make studies` from what its stores hold; every line follows from a query that the report of the study shows.
A verdict is passed, failed, or underpowered where there are too few runs to tell. Rules and thresholds were committed
before the first run of that size; what changed later stands below the table. {counts}.

A claim that failed is a finding, not a mistake in the page: see [what came out](findings.md).
"""


def page(roots: Iterable[str | os.PathLike[str]]) -> str:
    """The page, of the stores of studies in the order given.

    Raises:
        MissingError: if a root does not exist.
        InputError: if it is not a store, or names a claim that is not known.
    """
    sections, judged = [], []
    for root in roots:
        stores = [(store, list_runs(store)) for store in stores_of(root)]
        judgements = []
        for store, _ in stores:
            results.analyze(store)
            catalog.sync(store)
            judgements.append(judge_store(store))
        sections.append(_section([runs for _, runs in stores], judgements))
        judged += [judgement for part in judgements for judgement in part]
    verdicts = Counter(judgement.verdict.verdict for judgement in judged)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return "\n".join([HEAD.format(counts=counts.capitalize() or "None"), *sections, _changes(judged)])


def _section(parts: Sequence[Sequence[Run]], judgements: Sequence[Sequence[Judgement]]) -> str:
    first = parts[0][0].attrs
    size = f", size {first['size']}" if first.get("size") else ""
    lines = [f"## {first.get('study') or 'runs'}{size}", ""]
    for runs in parts:
        part = runs[0].attrs.get("part")
        statuses = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).items())
        rates = ", ".join(f"{rate:g}" for rate in sorted({run.attrs["learning_rate"] for run in runs}))
        about = f"{numbers.setting(runs)} · learning rates {rates} · {statuses}"
        lines.append(f"- {f'**{part}**: ' if part else ''}{about}")
    lines += ["", "| part | claim | verdict | measured | runs | matched loss | rule |", "|---|---|---|---|---|---|---|"]
    for judgement in (one for part in judgements for one in part):
        claim, verdict = judgement.claim, judgement.verdict
        cells = [
            judgement.part or "", f"{claim.statement} (`{claim.name}`)", f"**{verdict.verdict}**", verdict.value,
            str(verdict.runs), "" if judgement.level is None else f"{judgement.level:g}", claim.rule,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _changes(judgements: Sequence[Judgement]) -> str:
    """What changed since the first run."""
    own = dict.fromkeys(
        f"`{judgement.claim.name}`, {change}" for judgement in judgements for change in judgement.claim.changes
    )
    return "\n".join(
        ["## Changes of rules since the first run", "", *(f"- {change}" for change in (*CHANGES, *own)), ""]
    )


if __name__ == "__main__":
    print(page(sys.argv[1:]))
