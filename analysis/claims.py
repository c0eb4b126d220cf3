"""Claims: what a study must reproduce, judged from the numbers in the store.

A claim is a query on the catalogue and a rule on its rows. Both are fixed before a study's first full run; a change
of a rule after that is listed with the claim and in the report.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np
import pandas as pd

MIN_SEEDS = 3
DRAWS = 10_000  # of a bootstrap or a permutation test, from a fixed seed: the same store gives the same verdict


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


def interval(values: pd.Series) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean: percentiles of the means of samples drawn with replacement.

    Of few values it is narrow: with three, no draw leaves their range.

    Source: Efron 1979.
    """
    draws = np.random.default_rng(0).choice(values.to_numpy(), (DRAWS, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def gains(frame: pd.DataFrame, column: str) -> pd.Series:
    """Per seed, the value at the largest learning rate minus that at the smallest; seeds that lack one are left out."""
    table = frame.pivot(index="seed", columns="learning_rate", values=column).sort_index(axis=1)
    return (table.iloc[:, -1] - table.iloc[:, 0]).dropna()


def trend(frame: pd.DataFrame, column: str) -> tuple[float, float]:
    """Kendall's τ of a column with the learning rate, meaned over seeds, and how often chance gives as much.

    The p value is the share of ways to deal the values of each seed out to its learning rates whose mean τ is at
    least the measured one: all of them if there are at most `DRAWS`, else so many at random and the measured one.

    Args:
        frame: learning_rate, seed and the column; one row for each pair.
        column: whose trend it is.

    Source: Kendall 1938.
    """
    seeds = [rows.sort_values("learning_rate")[column].to_numpy() for _, rows in frame.groupby("seed")]
    pairs = [np.sign(values[None, :] - values[:, None]) for values in seeds]  # (i, j): whether the j-th is larger

    def taus(signs: np.ndarray, orders: np.ndarray) -> np.ndarray:
        first, second = np.triu_indices(len(signs), 1)
        return signs[orders[:, first], orders[:, second]].mean(axis=1)

    measured = float(np.mean([taus(signs, np.arange(len(signs))[None])[0] for signs in pairs]))
    if math.prod(math.factorial(len(signs)) for signs in pairs) <= DRAWS:
        dealt = [taus(signs, np.array(list(permutations(range(len(signs)))))) for signs in pairs]
        by_chance = np.array([np.mean(one) for one in product(*dealt)])
    else:
        rng = np.random.default_rng(0)
        drawn = [[rng.permutation(len(signs)) for signs in pairs] for _ in range(DRAWS)]
        orders = [np.array(of_seed) for of_seed in zip(*drawn, strict=True)]
        chance = np.mean([taus(signs, order) for signs, order in zip(pairs, orders, strict=True)], axis=0)
        by_chance = np.array([measured, *chance])
    return measured, float(np.mean(by_chance >= measured - 1e-12))
