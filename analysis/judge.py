"""Judging: the claims that the studies of a store name, on the numbers of that store."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import catalog
from analysis.claims import Claim, Verdict
from analysis.studies import paper
from pipeline.errors import InputError
from pipeline.store import list_runs


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict on one store.

    Attributes:
        study: the study that names the claim.
        claim: what is claimed.
        verdict: what its rule says here.
        sql: the query whose rows the verdict rests on.
        level: the matched loss at which runs were compared.
    """

    study: str
    claim: Claim
    verdict: Verdict
    sql: str
    level: float

    def as_row(self) -> dict[str, Any]:
        """The row of the catalogue's table `claims`."""
        return {
            "study": self.study,
            "claim": self.claim.name,
            "statement": self.claim.statement,
            "rule": self.claim.rule,
            "changes": "; ".join(self.claim.changes) or None,
            "source": self.claim.source,
            "level": self.level,
            "value": self.verdict.value,
            "verdict": self.verdict.verdict,
            "runs": self.verdict.runs,
            "sql": self.sql,
        }


def matched_level(root: str | os.PathLike[str]) -> float:
    """The loss at which the runs of a store are compared: the smallest loss level that all of them record.

    Raises:
        InputError: if the runs share no loss level.
    """
    recorded = [set(run.attrs["identity"].get("record", {}).get("loss_levels", ())) for run in list_runs(root)]
    common = set.intersection(*recorded) if recorded else set()
    if not common:
        raise InputError(f"the runs of {root} share no loss level; set record.loss_levels in the study to compare them")
    return min(common)


def judge_store(root: str | os.PathLike[str]) -> list[Judgement]:
    """Judge every claim that the studies of a store name, and keep the verdicts in the catalogue.

    Args:
        root: folder of the store, its results computed (`analysis.results.analyze`).

    Raises:
        InputError: if a run names a paper or a claim that is not known here.
    """
    named = dict.fromkeys(
        (run.attrs.get("study") or "", run.attrs["paper"], claim)
        for run in list_runs(root)
        if run.attrs.get("paper")
        for claim in run.attrs.get("claims", ())
    )
    judgements = [judge(root, study, claim) for study, claim in _known(named)]
    catalog.write_claims(root, [judgement.as_row() for judgement in judgements])
    return judgements


def judge(root: str | os.PathLike[str], study: str, claim: Claim) -> Judgement:
    """Judge one claim on the runs of `root`, whose catalogue is up to date."""
    level = matched_level(root)
    sql = claim.sql.replace("{level}", repr(level))
    table = catalog.query(root, sql, sync=False)
    frame = pd.DataFrame(table.rows, columns=table.columns)
    return Judgement(study, claim, claim.judge(frame), sql, level)


def _known(named: Iterable[tuple[str, str, str]]) -> list[tuple[str, Claim]]:
    found = []
    for study, module, name in named:
        claims = paper(module).CLAIMS
        if name not in claims:
            raise InputError(f"study {study}: claim {name!r} is not one of {', '.join(claims)}")
        found.append((study, claims[name]))
    return found
