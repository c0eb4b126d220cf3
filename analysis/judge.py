"""Judging: the claims that the studies of a store name, on the numbers of that store."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import catalog
from analysis.claims import Claim, Verdict
from analysis.load import shared_level
from analysis.studies import paper
from pipeline.errors import InputError
from pipeline.store import Run, list_runs

# Names that can stand in a query as they are; others never become part of a statement.
NAME = re.compile(r"[A-Za-z0-9_.-]+")

# Changes since the first full run that concern every claim alike; those of a single rule stand with its claim.
CHANGES = (
    "2026-11-24: a claim is judged on the runs of the study that names it; it had been on all runs of the store.",
    "2026-11-24: runs of one learning rate and seed that differ in something else make a claim underpowered; they had "
    "been averaged.",
    "2026-11-24: the matched loss is the smallest level that all complete runs recorded and reached; it had been the "
    "smallest that all runs recorded.",
    "2026-11-25: a study whose complete runs share no such level is underpowered; it had been an error.",
    "None of these changed a verdict on the shipped study.",
)


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict on one store.

    Attributes:
        study: the study that names the claim.
        part: the part of it that this store holds, or None.
        size: smoke, quick or full, or None.
        claim: what is claimed.
        verdict: what its rule says here.
        sql: the query whose rows the verdict rests on.
        level: the matched loss at which runs were compared; None if the claim compares none.
    """

    study: str
    part: str | None
    size: str | None
    claim: Claim
    verdict: Verdict
    sql: str
    level: float | None

    def as_row(self) -> dict[str, Any]:
        """The row of the catalogue's table `claims`."""
        return {
            "study": self.study,
            "part": self.part,
            "size": self.size,
            "claim": self.claim.name,
            "statement": self.claim.statement,
            "rule": self.claim.rule,
            "changes": " ".join(self.claim.changes) or None,
            "source": self.claim.source,
            "level": self.level,
            "value": self.verdict.value,
            "verdict": self.verdict.verdict,
            "runs": self.verdict.runs,
            "sql": self.sql,
        }


def judge_store(root: str | os.PathLike[str]) -> list[Judgement]:
    """Judge every claim that the studies of a store name, and keep the verdicts in the catalogue.

    Args:
        root: folder of the store, its results computed (`analysis.results.analyze`).

    Raises:
        InputError: if a run names a paper or a claim that is not known here, or a study's name cannot stand in a query.
    """
    runs = list_runs(root)
    named = dict.fromkeys(
        (run.attrs.get("study") or "", run.attrs["paper"], claim)
        for run in runs
        if run.attrs.get("paper")
        for claim in run.attrs.get("claims", ())
    )
    judgements = []
    for study, claim in _known(named):
        judgements.append(judge(root, study, claim, [run for run in runs if run.attrs.get("study") == study]))
    catalog.write_claims(root, [judgement.as_row() for judgement in judgements])
    return judgements


def judge(root: str | os.PathLike[str], study: str, claim: Claim, runs: Sequence[Run]) -> Judgement:
    """Judge one claim on the runs of a study in the store `root`, whose catalogue is up to date."""
    if not NAME.fullmatch(study):
        raise InputError(f"study = {study!r}: only letters, digits, '_', '.' and '-' are allowed to judge its claims")
    part, size = (next((run.attrs[key] for run in runs if run.attrs.get(key)), None) for key in ("part", "size"))
    sql, level = claim.sql.replace("{study}", f"'{study}'"), None
    if "{level}" in sql:
        try:
            level = shared_level(runs, root)
        except InputError as error:
            return Judgement(study, part, size, claim, Verdict("underpowered", str(error), 0), sql, None)
        sql = sql.replace("{level}", repr(level))
    table = catalog.query(root, sql, sync=False)
    frame = pd.DataFrame(table.rows, columns=table.columns)
    if frame.duplicated(list(claim.unique)).any():
        # A mean over them would mix settings that the claim says nothing about.
        same = " and ".join(name.replace("_", " ") for name in claim.unique)
        reason = f"runs of one {same} differ in something else; judge them in stores of their own"
        verdict = Verdict("underpowered", reason, len(frame))
    else:
        verdict = claim.judge(frame)
    if size == "smoke":
        verdict = Verdict("underpowered", f"the size smoke only tries the machinery ({verdict.value})", verdict.runs)
    return Judgement(study, part, size, claim, verdict, sql, level)


def _known(named: Iterable[tuple[str, str, str]]) -> list[tuple[str, Claim]]:
    found = []
    for study, module, name in named:
        claims = paper(module).CLAIMS
        if name not in claims:
            raise InputError(f"study {study}: claim {name!r} is not one of {', '.join(claims)}")
        found.append((study, claims[name]))
    return found
