"""The numbers behind the figures: queries on the catalogue, and the words that say what was trained.

A line of a figure is the runs that differ in nothing but their seed. Runs that diverged enter no mean.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import catalog
from analysis.load import shared_level
from pipeline.errors import MissingError
from pipeline.store import Run, list_runs

Root = str | os.PathLike[str]

LINES = """
lines as (  -- the runs of a line differ in nothing but their seed
  select run_id, learning_rate, seed, status, config,
         dense_rank() over (order by learning_rate, json_merge_patch(config, '{"seed": null}')) as line
  from runs
)""".strip()

ALL_LINES = f"""
with {LINES}
select line, run_id, learning_rate, seed, status, config from lines order by line, seed, run_id
""".strip()

BY_STEP = f"""
with {LINES}
select line, learning_rate, step, step * learning_rate as time, avg(kta) as kta, stddev(kta) as sd, count(*) as seeds
from alignment join lines using (run_id)
where kta is not null and status <> 'diverged'
group by line, learning_rate, step
qualify seeds = max(seeds) over (partition by line)  -- only where every seed of the line has a row
order by line, step
""".strip()

BY_LOSS = f"""
with {LINES}, lows as (  -- rows at which a run's loss is lower than ever before
  select run_id, line, learning_rate, step, loss, kta
  from alignment join lines using (run_id) where kta is not null and status <> 'diverged'
  qualify loss < coalesce(min(loss) over (partition by run_id order by step
                                          rows between unbounded preceding and 1 preceding), 'infinity')
), starts as (
  select run_id, max(loss) as start from lows group by run_id
), levels as (  -- twenty to a factor of ten, from where a run starts on down
  select run_id, 10 ** (-i / 20) as loss from starts, range(-100, 400) as grid(i) where 10 ** (-i / 20) <= start
)
select line, learning_rate, levels.loss, avg(kta) as kta, stddev(kta) as sd, count(*) as seeds
from levels asof join lows on levels.run_id = lows.run_id and levels.loss >= lows.loss
group by line, learning_rate, levels.loss
qualify seeds = max(seeds) over (partition by line)  -- only where every seed of the line has got there
order by line, levels.loss desc
""".strip()

ENDS = """
select run_id, learning_rate, seed, status, max(ntk_sharpness) > 2 / learning_rate as crossed, max(step) as step,
       max(step) * learning_rate as time, arg_max(loss, step) as loss, arg_max(kta, step) as kta
from alignment join runs using (run_id)
where kta is not null
group by run_id, learning_rate, seed, status
order by learning_rate, seed, run_id
""".strip()

MODES = f"""
with {LINES}, modes as (
  select run_id, step, regexp_extract(measure, '[0-9]+$')::int as mode, value as c
  from measures where starts_with(measure, 'mode_alignment_')
), matched as (  -- each run's first row with eigenvectors at or below the level
  select run_id, min(step) as step
  from modes join alignment using (run_id, step) where mode = 1 and loss <= {{level}} group by run_id
), sums as (
  select line, learning_rate, mode, c, sum(c) over (partition by run_id order by mode) as cumulative
  from modes join matched using (run_id, step) join lines using (run_id) where status <> 'diverged'
)
select line, learning_rate, mode, avg(c) as c, stddev(c) as c_sd, avg(cumulative) as cumulative,
       stddev(cumulative) as cumulative_sd, count(*) as seeds
from sums
group by line, learning_rate, mode
order by line, mode
""".strip()

CROSSINGS = """
select run_id, learning_rate, seed, crossed
from phase_changes join runs using (run_id)
where status <> 'diverged'
order by learning_rate, seed, run_id
""".strip()

EDGE = """
select run_id, step, line, sharpness_mean, kta_mean, phase
from phases join runs using (run_id)
where learning_rate = {rate} and seed = {seed} and sharpness_mean is not null
order by run_id, step
""".strip()


def frame(root: Root, sql: str) -> pd.DataFrame:
    """Rows of a query on the catalogue as it is."""
    table = catalog.query(root, sql, sync=False)
    return pd.DataFrame(table.rows, columns=table.columns)


def of_store(root: Root, sql: str) -> str:
    """The query of a claim for all runs of a store, at the loss level that they share where it asks for one."""
    sql = sql.replace("study = {study}", "true")
    return sql.replace("{level}", repr(shared_level(list_runs(root), root))) if "{level}" in sql else sql


def lines(root: Root) -> pd.DataFrame:
    """One row per run, in the order of the legend: line, run_id, learning_rate, seed, status, label.

    A label is the learning rate, and whatever else differs between the lines of this store, by the last part of its key
    where that is enough.
    """
    runs = frame(root, ALL_LINES)
    settings = {line: dict(_flat(json.loads(text))) for line, text in zip(runs["line"], runs["config"], strict=True)}
    keys = dict.fromkeys(key for entries in settings.values() for key in entries)
    differing = [
        key
        for key in keys
        if key not in ("learning_rate", "seed") and len({repr(entries.get(key)) for entries in settings.values()}) > 1
    ]
    ends = Counter(key.rpartition(".")[2] for key in differing)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in differing}
    details = {
        line: "".join(f", {short[key]} {entries[key]}" for key in differing if key in entries)
        for line, entries in settings.items()
    }
    runs["label"] = [f"{rate:g}{details[line]}" for rate, line in zip(runs["learning_rate"], runs["line"], strict=True)]
    return runs.drop(columns="config")


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def edge_sql(root: Root, run_id: str) -> str:
    """The query for one run. It names the run by numbers: text from a store does not become part of a statement."""
    runs = lines(root).set_index("run_id")
    rate, seed = runs.loc[run_id, "learning_rate"], runs.loc[run_id, "seed"]
    return EDGE.replace("{rate}", repr(float(rate))).replace("{seed}", str(int(seed)))


def edge_run(root: Root) -> str:
    """The run to show the edge with, by name.

    From the learning rates whose every run crossed 2/η the middle one (the lower of two), there the first seed. In a
    store without such a learning rate, from those of which some run crossed; failing that, from all.

    Raises:
        MissingError: if no run has kernel scalars, or all that have diverged.
    """
    runs = frame(root, CROSSINGS)
    if runs.empty:
        if diverged := len(frame(root, "select run_id from phase_changes")):
            raise MissingError(
                f"all {diverged} run(s) of {root} with kernel scalars diverged: `draw_edge` shows one by name"
            )
        raise MissingError(f"no run of {root} has kernel scalars: set record.scalars in the study")
    by_rate = runs.groupby("learning_rate")["crossed"]
    above, some = by_rate.transform("all"), by_rate.transform("any")
    chosen = runs[above if above.any() else some] if some.any() else runs
    rates = sorted(chosen["learning_rate"].unique())
    chosen = chosen[chosen["learning_rate"] == rates[(len(rates) - 1) // 2]]
    return str(chosen.sort_values("crossed", ascending=False, kind="stable")["run_id"].iloc[0])


# --- words ------------------------------------------------------------------------------------------------------------


def setting(runs: Sequence[Run]) -> str:
    """What was trained, in one line: data, model, sizes, seeds, loss."""
    parts = []
    for table in ("data", "model"):
        parts.append(_few(words(run.attrs["identity"].get(table), without=("n",)) for run in runs))
    parts.append("n = " + _few(f"{run.node('probe/target')['shape'][0]:,}" for run in runs))
    parameters = [node for run in runs if (node := run.arrays("snapshots").get("parameter"))]
    if parameters:
        parts.append("p = " + _few(f"{node['shape'][1]:,}" for node in parameters))
    seeds = sorted({run.attrs["seed"] for run in runs if "seed" in run.attrs})
    if seeds:
        parts.append(f"{len(seeds)} seeds" if len(seeds) > 6 else f"seed{'s' * (len(seeds) > 1)} {words(seeds)}")
    parts.append(either(run.attrs.get("loss_convention", "").partition(";")[0].rstrip(".") for run in runs))
    return " · ".join(part for part in parts if part)


def _few(texts: Iterable[str]) -> str:
    """Each text once; of many the first, and how many others there are."""
    distinct = list(dict.fromkeys(texts))
    return either(distinct) if len(distinct) <= 3 else f"{distinct[0]} and {len(distinct) - 1} others"


def words(table: Any, without: Sequence[str] = ()) -> str:
    """A table of a study in words: `mlp (width 64, depth 2)` for {"name": "mlp", "width": 64, "depth": 2}."""
    if isinstance(table, bool):
        return "yes" if table else "no"
    if isinstance(table, list | tuple):
        return ", ".join(map(words, table))
    if not isinstance(table, Mapping):
        return "" if table is None else str(table)
    details = ", ".join(f"{key} {words(value)}" for key, value in table.items() if key not in ("name", *without))
    name = str(table.get("name", ""))
    return f"{name} ({details})" if name and details else name or details


def either(texts: Iterable[str]) -> str:
    """Each text once, in order."""
    distinct = dict.fromkeys(texts)
    return (" | " if any("," in text for text in distinct) else ", ").join(distinct)
