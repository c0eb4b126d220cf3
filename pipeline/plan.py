"""What `run` would do: how each run of a study stands, the rows and bytes it gets, and the time it takes at most."""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, RunPlan, Study, needs_import, plan
from pipeline.console import bytes_text, seconds_text
from pipeline.store import RECORD, Run, read_run, run_path

TIMED_STEPS = 40


@dataclass(frozen=True)
class Planned:
    """One run of a plan.

    Attributes:
        config: the run.
        sizes: its rows and bytes.
        state: new, resume (unfinished), continue (finished, and the study asks for more), done or running.
    """

    config: RunConfig
    sizes: RunPlan
    state: str

    def as_row(self) -> dict[str, Any]:
        """For printing: the axes, the state, and the rows at most."""
        rows = {f"{group}_rows": count for group, count in self.sizes.rows.items()}
        return {"run": self.config.run_id, **self.config.axes, "state": self.state, **rows, "bytes": self.sizes.nbytes}


@dataclass(frozen=True)
class StudyPlan:
    """The runs of a study and what is left of them.

    Attributes:
        runs: in the order of the grid.
        seconds: at most, for what is left; None where only running a user's own model could tell.
    """

    runs: tuple[Planned, ...]
    seconds: float | None

    @property
    def left(self) -> list[Planned]:
        """Runs that are not done."""
        return [run for run in self.runs if run.state != "done"]

    def summary(self) -> str:
        """A line to read."""
        nbytes = sum(run.sizes.nbytes for run in self.left)
        known = all(run.sizes.parameters is not None for run in self.runs)
        size = f"at most {bytes_text(nbytes)} uncompressed" + (
            "" if known else ", the imported model's parameters apart"
        )
        time = (
            "time unknown: the study imports its model"
            if self.seconds is None
            else f"at most {seconds_text(self.seconds)}"
        )
        return f"{len(self.left)} of {len(self.runs)} runs to do, {size}, {time}"


def plan_study(study: Study, root: str, workers: int | None = None) -> StudyPlan:
    """Plan a study for a store that may exist already; nothing is written to it.

    The time is that of a few steps, measured here, times the steps left: runs that reach their loss end earlier.

    Raises:
        MissingError: if a data file does not exist.
        InputError: if a data file cannot be used.
    """
    configs = study.runs()
    runs = tuple(
        Planned(config, sizes, _state(config, root)) for config, sizes in zip(configs, plan(configs).runs, strict=True)
    )
    left = [run.config for run in runs if run.state != "done"]
    if not left:
        return StudyPlan(runs, 0.0)
    if needs_import(study):
        return StudyPlan(runs, None)
    cores = max(1, (os.cpu_count() or 1) // max(run.compute.threads for run in left))
    steps = sum(run.stop.steps for run in left)
    return StudyPlan(runs, steps * _seconds_per_step(left[0]) / min(workers or cores, len(left)))


def plan_runs(runs: Iterable[RunConfig]) -> None:
    """Refuse what could not be trained: data that are missing or too small. Opens only the headers of files."""
    plan(runs)


def _state(config: RunConfig, root: str) -> str:
    path = run_path(root, config.run_id)
    if not Path(path, RECORD).exists():
        return "new"
    run = read_run(path)
    if run.status in ("running", "diverged"):
        return {"running": "running", "diverged": "done"}[run.status]
    if run.status != "complete":
        return "resume"
    return "continue" if wants_more(config, run) else "done"


def wants_more(config: RunConfig, run: Run) -> bool:
    """Whether a complete run is short of what its study asks for by now: a smaller loss, or more steps."""
    last = run.attrs["last_step"]
    losses = run.read("train/loss")
    return last < config.stop.steps and (config.stop.loss is None or losses.min() >= config.stop.loss)


def _seconds_per_step(config: RunConfig) -> float:
    """Median over a few steps of a throw-away run with the cadences of the study."""
    import numpy as np

    from pipeline.train import train

    short = config.model_copy(update={"stop": config.stop.model_copy(update={"steps": TIMED_STEPS, "loss": None})})
    with tempfile.TemporaryDirectory() as folder:
        train(short, folder)
        times = read_run(run_path(folder, short.run_id)).read("train/wall_time")
    return float(np.diff(times)[TIMED_STEPS // 2 :].mean())
