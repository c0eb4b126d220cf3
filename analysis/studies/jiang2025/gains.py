"""Whether a number at matched loss rises with the learning rate: as a trend, and from the smallest to the largest."""

import math
from collections.abc import Callable

import pandas as pd

from analysis.claims import MIN_SEEDS, Verdict, gains, interval, spread, too_few, trend

CHANCE = 0.05


def by_rate(frame: pd.DataFrame, column: str) -> str:
    """Mean and spread over seeds at each learning rate, to read."""
    return ", ".join(f"{rate:g}: {spread(group[column])}" for rate, group in frame.groupby("learning_rate"))


def above(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the learning rates above the edge: the sharpness crossed 2/η in every seed."""
    return frame[frame.groupby("learning_rate")["crossed"].transform("all")]


def from_the_edge_on(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the learning rates above the edge, and of the largest one below it, where no seed crossed."""
    never = ~frame.groupby("learning_rate")["crossed"].transform("any")
    control = frame["learning_rate"] == frame.loc[never, "learning_rate"].max()
    return frame[frame.groupby("learning_rate")["crossed"].transform("all") | control]


def trends(column: str, name: str, everywhere: bool = False) -> Callable[[pd.DataFrame], Verdict]:
    """A rule: over the seeds the column rises with the learning rate, more than chance would have it.

    Args:
        column: what has to rise.
        name: for people.
        everywhere: over all learning rates; else from the edge on.
    """

    def judge(frame: pd.DataFrame) -> Verdict:
        rows = frame if everywhere else from_the_edge_on(frame)
        complete = rows.groupby("seed")["learning_rate"].transform("nunique") == rows["learning_rate"].nunique()
        rows = rows[complete & rows[column].notna()]
        if rows["learning_rate"].nunique() < 2:
            return Verdict("underpowered", "fewer than two learning rates to compare", len(rows))
        if reason := too_few(rows):
            return Verdict("underpowered", reason, len(rows))
        rates, seeds = rows["learning_rate"].nunique(), rows["seed"].nunique()
        if (least := math.factorial(rates) ** -seeds) > CHANCE:
            reason = f"{rates} learning rates of {seeds} seeds: even if all rose, p would be {least:.3g}"
            return Verdict("underpowered", reason, len(rows))
        tau, chance = trend(rows, column)
        value = f"Kendall's τ {tau:.2f}, p = {chance:.3g} by permutation; mean {name} at {by_rate(rows, column)}"
        return Verdict("passed" if tau > 0 and chance <= CHANCE else "failed", value, len(rows))

    return judge


def gain_in(*columns: str) -> Callable[[pd.DataFrame], Verdict]:
    """A rule: the first column gains from the smallest to the largest learning rate; the others are told beside it."""

    def judge(frame: pd.DataFrame) -> Verdict:
        if frame["learning_rate"].nunique() < 2:
            return Verdict("underpowered", "fewer than two learning rates got there", len(frame))
        rates = sorted(frame["learning_rate"].unique())
        gained = {column: gains(frame, column) for column in columns}
        gain = gained[columns[0]]
        if len(gain) < MIN_SEEDS:
            reason = f"only {len(gain)} seed(s) at both ends, {MIN_SEEDS} needed"
            return Verdict("underpowered", reason, 2 * len(gain))
        told = []
        for column, values in gained.items():
            low, high = interval(values)
            told.append(f"{LABELS[column]} by {spread(values)}, 95 % interval of the mean {low:.3f} to {high:.3f}")
        value = f"from {rates[0]:g} to {rates[-1]:g} change " + "; ".join(told)
        return Verdict("passed" if interval(gain)[0] > 0 else "failed", value, 2 * len(gain))

    return judge


LABELS = {
    "kta": "KTA", "c5": "C(5)", "c20": "C(20)", "kta_full": "KTA of all pairs of outputs", "kta_test": "held-out KTA",
    "c5_test": "held-out C(5)", "kta_centred": "centred KTA",
}  # fmt: skip
TREND = (
    "Kendall's τ of {what} with the learning rate, meaned over seeds, is positive with p ≤ {chance:g} when the values "
    "of each seed are dealt out to its learning rates at random. Rows: the first with loss <= level, at {where}."
)
FROM_THE_EDGE = "the learning rates whose sharpness crossed 2/η in every seed, and the largest one that crossed in none"
GAIN = (
    "At the first row with loss <= level, {what} at the largest learning rate minus {what} at the smallest: the 95 % "
    "bootstrap interval of its mean over at least {seeds} seeds lies above 0."
)


def trend_rule(what: str, where: str = FROM_THE_EDGE) -> str:
    """The rule of `trends` in words."""
    return TREND.format(what=what, chance=CHANCE, where=where)


def gain_rule(what: str) -> str:
    """The rule of `gain_in` in words."""
    return GAIN.format(what=what, seeds=MIN_SEEDS)
