"""Claims: what a study must reproduce, judged from the numbers in the store.

A claim is a query on the catalogue and a rule on its rows. Both are fixed before a study's first full run; a change
of a rule after that is listed with the claim and in the report.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

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
        sql: query on the catalogue; `{study}` stands for the study whose runs are judged, `{level}` for the matched
            loss.
        judge: rows of that query -> verdict.
        unique: columns of which no two rows may agree: what else runs differ in, the claim says nothing about.
        changes: later changes of the rule, each with its date and reason.
    """

    name: str
    statement: str
    rule: str
    source: str
    sql: str
    judge: Callable[[pd.DataFrame], Verdict]
    unique: tuple[str, ...] = ("learning_rate", "seed")
    changes: tuple[str, ...] = ()


def too_few(frame: pd.DataFrame, by: str = "learning_rate") -> str | None:
    """Why the rows cannot carry a verdict, or None: each learning rate needs `MIN_SEEDS` complete runs."""
    if frame.empty:
        return "no complete run can be compared"
    seeds = frame.groupby(by)["seed"].nunique()
    short = seeds[seeds < MIN_SEEDS]
    if short.empty:
        return None
    return f"only {int(short.iloc[0])} complete run(s) at learning rate {short.index[0]:g}, {MIN_SEEDS} needed"


def spread(values: pd.Series) -> str:
    """Mean and standard deviation over seeds, to read."""
    deviation = values.std()
    return f"{values.mean():.3f}" if math.isnan(deviation) else f"{values.mean():.3f} ± {deviation:.3f}"
