"""Claims: what a study must reproduce, judged from the numbers in the store.

A claim is a query on the catalogue and a rule on its rows. Both are fixed before a study's first full run; a change
of a rule after that is listed with the claim and in the report.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from analysis import catalog
from pipeline.errors import InputError
from pipeline.store import list_runs

MIN_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """What a rule says of the rows it was given.

    Attributes:
        verdict: passed, failed, or underpowered where there are too few runs to tell.
        value: the measured numbers the verdict rests on, for people.
        runs: how many runs went into it.
    """

    verdict: Literal["passed", "failed", "underpowered"]
    value: str
    runs: int


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, and how it is judged.

    Attributes:
        name: key in study files.
        statement: what is claimed, in words.
        rule: what has to hold, with its thresholds, in words.
        source: where the statement comes from.
        sql: query on the catalogue; `{level}` stands for the matched loss.
        judge: rows of that query -> verdict.
        changes: later changes of the rule, each with its date and reason.
    """

    name: str
    statement: str
    rule: str
    source: str
    sql: str
    judge: Callable[[pd.DataFrame], Verdict]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict on one store."""

    claim: Claim
    verdict: Verdict
    sql: str
    level: float


def matched_level(root: str | os.PathLike[str]) -> float:
    """The loss at which the runs of a store are compared: the smallest loss level that all of them recorded.

    Raises:
        InputError: if the runs share no loss level.
    """
    recorded = [set(run.attrs["identity"].get("record", {}).get("loss_levels", ())) for run in list_runs(root)]
    common = set.intersection(*recorded) if recorded else set()
    if not common:
        raise InputError(f"runs of {root} share no loss level; set record.loss_levels in the study to compare them")
    return min(common)


def judge(root: str | os.PathLike[str], claims: Iterable[Claim]) -> list[Judgement]:
    """Judge claims on the numbers of a store.

    Args:
        root: folder of the store; its catalogue is brought up to date first.
        claims: what to judge.
    """
    chosen = list(claims)
    if not chosen:
        return []
    level = matched_level(root)
    catalog.sync(root)
    judgements = []
    for claim in chosen:
        sql = claim.sql.replace("{level}", repr(level))
        table = catalog.query(root, sql, sync=False)
        frame = pd.DataFrame(table.rows, columns=table.columns)
        judgements.append(Judgement(claim, claim.judge(frame), sql, level))
    return judgements


def too_few(frame: pd.DataFrame, by: str = "learning_rate") -> str | None:
    """Why the rows cannot carry a verdict, or None: each learning rate needs `MIN_SEEDS` complete runs."""
    if frame.empty:
        return "no run reached the matched loss"
    seeds = frame.groupby(by)["seed"].nunique()
    short = seeds[seeds < MIN_SEEDS]
    if short.empty:
        return None
    return f"only {int(short.iloc[0])} complete run(s) at learning rate {short.index[0]:g}, {MIN_SEEDS} needed"


def spread(values: pd.Series) -> str:
    """Mean and standard deviation over seeds, to read."""
    deviation = values.std()
    return f"{values.mean():.3f}" if math.isnan(deviation) else f"{values.mean():.3f} ± {deviation:.3f}"
