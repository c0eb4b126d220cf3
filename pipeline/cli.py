"""The `ntk-eos` command: parses, calls the library, prints. Nothing heavy is imported before a command needs it.

Exit codes: 0 ok (a diverged run is ok), 1 failed or a claim failed, 2 usage or bad input, 3 some runs failed,
4 not found, 5 locked by another writer, 130 and 143 interrupted (what was measured is saved).
"""

import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import console
from pipeline.errors import NtkEosError, line

if TYPE_CHECKING:
    from analysis.judge import Judgement
    from pipeline.config import RunConfig, Study
    from pipeline.disk import Location
    from pipeline.sweep import Outcome

STORES = Path("data/stores")
EXITS = """\b
Exit codes: 0 ok, 1 failed or a claim failed, 2 usage or bad input, 3 some
runs failed, 4 not found, 5 locked by another writer, 130/143 interrupted."""


class Commands(click.Group):
    """A group whose commands report errors of ours as one line with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command named on the command line."""
        try:
            return super().invoke(ctx)
        except NtkEosError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of our output has seen enough; nothing more can be printed, not even by the interpreter.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which one meets them, not by letter."""
        return list(self.commands)


def example(*lines: str) -> str:
    """The end of a help text."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _complete_root(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    stores = [p.name for p in STORES.glob("*") if p.is_dir() and p.name.startswith(incomplete)]
    return [*map(CompletionItem, stores), CompletionItem(incomplete, type="dir")]


def _complete_run(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    root = ctx.params.get("root")
    if root is None:
        return []
    from pipeline.store import run_paths

    try:
        names = [path.stem for path in run_paths(_existing_root(root))]
    except NtkEosError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def _complete_figure(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from analysis.studies import figures

    root = ctx.params.get("root")
    return [] if root is None else [name for name in figures(_existing_root(root)) if name.startswith(incomplete)]


def _complete_study(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from pipeline.config import shipped

    return [
        *map(CompletionItem, (s for s in shipped() if s.startswith(incomplete))),
        CompletionItem(incomplete, type="file"),
    ]


def _complete_kernel(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from pipeline.config import KERNELS

    return [name for name in KERNELS if name.startswith(incomplete)]


def _complete_probe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    names = [name for name in ("test", "train") if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def _existing_root(root: str) -> str:
    """ROOT is a folder, a URL, or the name of a store or of a part of one where `run` puts it by default."""
    named = STORES / root
    return str(named) if not Path(root).exists() and named.is_dir() else root


def root_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """ROOT: the folder of a store."""
    return click.argument("root", shell_complete=_complete_root, callback=lambda _c, _p, value: _existing_root(value))(
        function
    )


def study_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What changes a study, shared by `plan`, `run` and `study`."""
    for option in (
        click.option("--out", "root", metavar="ROOT", help="Folder of the store [default: data/stores/STUDY-SIZE]."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the study."),
        click.option("--part", "parts", multiple=True, metavar="PART", help="Only this part of the study."),
        click.option("--size", type=click.Choice(["smoke", "quick", "full"]),
                     help="How much of it, where the study has sizes [default: quick]."),
    ):  # fmt: skip
        function = option(function)
    return function


def _bytes(_ctx: click.Context, _param: click.Parameter, text: str | None) -> int | None:
    from analysis.compute import in_bytes

    return in_bytes(text)


workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Runs at a time [default: cores / threads of a run]."
)
scheduler_option = click.option(
    "--scheduler", metavar="ADDRESS", help="Train on the workers of this Dask scheduler, as tcp://host:8786."
)
imports_option = click.option("--allow-imports", is_flag=True, help="Import the model that the study names.")
study_argument = click.argument("name", metavar="STUDY", shell_complete=_complete_study)


def _set_catalog(_ctx: click.Context, _param: click.Parameter, file: str | None) -> None:
    if file is not None:
        os.environ["NTK_EOS_CATALOG"] = file


catalog_option = click.option(
    "--catalog", metavar="FILE", expose_value=False, callback=_set_catalog, type=click.Path(dir_okay=False),
    help="Keep the catalogue in this file [default: in ROOT, or in the user's cache for a URL].",
)  # fmt: skip


def _compute_on(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    if ctx.meta.setdefault("computing", param.name) != param.name:
        raise click.UsageError("--scheduler and --memory: give one; `dask worker --memory-limit` gives a cluster's")
    from analysis import computing

    ctx.with_resource(computing(**{str(param.name): value}))


def compute_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where the analysis computes, shared by the commands that bring it up to date."""
    for option in (
        click.option("--scheduler", metavar="ADDRESS", expose_value=False, callback=_compute_on,
                     help="Compute on this Dask cluster, such as tcp://host:8786."),
        click.option("--memory", metavar="SIZE", expose_value=False, callback=_compute_on,
                     help="Budget of the threads of this machine, such as 2GiB [default: half of what is free]."),
    ):  # fmt: skip
        function = option(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{EXITS}\n\n{example('ntk-eos demo', 'ntk-eos status digits')}",
)
@click.version_option(package_name="ntk-eos", prog_name="ntk-eos")
def main() -> None:
    """Train once, ask anything later: how neural tangent kernels evolve."""


def _check_training() -> None:
    """Say how to install what only training needs, before a worker fails to import it."""
    if any(find_spec(name) is None for name in ("torch", "safetensors", "scipy", "sklearn")):
        raise NtkEosError(
            "training needs packages that are not installed: pip install '.[train]' in the folder of ntk-eos"
        )


def _load(
    name: str, overrides: Sequence[str], root: str | None, size: str | None, wanted: Sequence[str]
) -> list[tuple["Study", str]]:
    """The parts of a study, each with the folder of its store."""
    from pipeline.config import load_parts
    from pipeline.disk import location

    studies = load_parts(name, overrides, size)
    known = [study.part for study in studies if study.part]
    for part in wanted:
        if part not in known:
            from pipeline.errors import StudyError

            there = f"its parts are {', '.join(known)}" if known else "it has none"
            raise StudyError(f"--part {part}: not a part of {studies[0].name}; {there}")
    folder = root or str(STORES / "-".join(filter(None, [studies[0].name, studies[0].size])))
    return [
        (study, str(location(folder) / study.part) if study.part else folder)
        for study in studies
        if not wanted or study.part in wanted
    ]


@main.command(epilog=example("ntk-eos demo", "ntk-eos demo --out /tmp/digits"))
@click.option("--out", "root", metavar="ROOT", help="Folder of the store [default: data/stores/digits].")
@quiet_option
@click.pass_context
def demo(ctx: click.Context, root: str | None, quiet: bool) -> None:
    """Train the digits study, judge its claims and write its report."""
    from pipeline.store import run_path

    ((study, root),) = _load("digits", (), root, None, ())
    code = _train(study, root, Where(), quiet)
    if code:
        ctx.exit(code)
    judgements = _judge(root, quiet)
    _show_claims(judgements, as_json=False)
    path = _write_report(root, None, quiet)
    run = run_path(root, study.runs()[-1].run_id)
    activate = Path(sys.prefix, "bin", "activate")
    first = f"  source {shlex.quote(str(activate))}\n" if not shutil.which("ntk-eos") and activate.exists() else ""
    click.echo(f"""
report: {path}

Next, ask the store (nothing is retrained):

{first}  ntk-eos sql {shlex.quote(root)} "select learning_rate, avg(kta), avg(c5) from alignment \\
    join runs using (run_id) where loss <= 0.001 group by 1 order by 1"
  python -c "import xarray as xr; print(xr.open_datatree('{run}'))"
  python -c "import analysis as a; print(a.alignment(a.at_loss(a.open_sweep('{root}'), 0.001)).kta.to_series())"
""")
    ctx.exit(any(judgement.verdict.verdict == "failed" for judgement in judgements))


@main.command(epilog=example("ntk-eos plan digits", "ntk-eos plan digits --set learning_rate=[0.1,0.2] --json"))
@study_argument
@study_options
@click.option("--workers", type=click.IntRange(1), help="Runs at a time, for the time estimate.")
@json_option
@quiet_option
def plan(
    name: str,
    overrides: Sequence[str],
    root: str | None,
    parts: Sequence[str],
    size: str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what `run` would do: the grid, rows, bytes, and the time it takes at most.

    The seconds of a run are those of its steps; the total adds the start of the worker processes, which share the runs.
    """
    from pipeline.plan import plan_study, total
    from pipeline.store import check_root
    from pipeline.sweep import default_workers

    loaded = _load(name, overrides, root, size, parts)
    _check_training()
    plans, rows = [], []
    for study, folder in loaded:
        check_root(folder)
        with console.Progress("timing a few steps", quiet):
            planned = plan_study(study, folder, workers or default_workers(study.runs()))
        click.echo(f"{study.label}: {planned.summary()}" if study.part else planned.summary(), err=True)
        plans.append(planned)
        rows += [({"part": study.part} if study.part else {}) | row for row in planned.rows()]
    if as_json:
        console.show(rows, as_json=True, total=total(plans))
        return
    for (study, _), planned in zip(loaded, plans, strict=True):  # the axes of parts differ, and with them the columns
        if study.part:
            click.echo(f"\n{study.label}")
        console.show(planned.rows(), as_json=False)


@main.command(
    epilog=example("ntk-eos run digits", "ntk-eos run my_study.toml --out stores/mine --set seed=[0,1] --workers 2")
)
@study_argument
@study_options
@workers_option
@scheduler_option
@imports_option
@catalog_option
@quiet_option
@click.pass_context
def run(
    ctx: click.Context,
    name: str,
    overrides: Sequence[str],
    root: str | None,
    parts: Sequence[str],
    size: str | None,
    workers: int | None,
    scheduler: str | None,
    allow_imports: bool,
    quiet: bool,
) -> None:
    """Train every run of STUDY that is not finished, and record it.

    The same command again resumes what was interrupted and does nothing for what is complete.
    """
    loaded = _load(name, overrides, root, size, parts)
    imports = _allow_imports(name, [study for study, _ in loaded], allow_imports)
    ctx.exit(_train_all(loaded, _where(workers, scheduler, imports), quiet))


@main.command(
    epilog=example(
        "ntk-eos study --list", "ntk-eos study paper_fig1", "ntk-eos study paper_architectures --part cnn --size full"
    )
)
@click.argument("name", metavar="[STUDY]", required=False, shell_complete=_complete_study)
@click.option("--list", "listing", is_flag=True, help="List the shipped studies: source, parts, runs per size, claims.")
@study_options
@workers_option
@scheduler_option
@imports_option
@json_option
@quiet_option
@click.pass_context
def study(
    ctx: click.Context,
    name: str | None,
    listing: bool,
    overrides: Sequence[str],
    root: str | None,
    parts: Sequence[str],
    size: str | None,
    workers: int | None,
    scheduler: str | None,
    allow_imports: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do a whole study: train or resume its runs, analyse them, judge the claims, write the report.

    Exit 1 if a claim failed, 3 if some runs failed. Each part of a study has a store of its own; the report is of all.
    """
    from pipeline.disk import location

    if listing:
        console.show(_shipped_studies(), as_json=as_json)
        return
    if name is None:
        raise click.UsageError("give a STUDY, or --list to see the shipped ones")
    loaded = _load(name, overrides, root, size, parts)
    imports = _allow_imports(name, [study for study, _ in loaded], allow_imports)
    code = _train_all(loaded, _where(workers, scheduler, imports), quiet)
    if code not in (0, 3):
        ctx.exit(code)
    judgements = [judgement for _, folder in loaded for judgement in _judge(folder, quiet)]
    _show_claims(judgements, as_json)
    first, folder = loaded[0]
    path = _write_report(str(location(folder).parent) if first.part else folder, None, quiet)
    click.echo(f"\nreport: {path}", err=as_json)
    ctx.exit(code or any(judgement.verdict.verdict == "failed" for judgement in judgements))


def _shipped_studies() -> list[dict[str, Any]]:
    """One row per shipped study: where it comes from, its parts, its runs by size, its claims."""
    from analysis.studies import paper
    from pipeline.config import load_parts, shipped, sizes_of

    rows = []
    for name in shipped():
        by_size = {size: load_parts(name, (), size) for size in sizes_of(name) or (None,)}
        loaded = next(iter(by_size.values()))
        counts = {size: sum(len(study.runs()) for study in studies) for size, studies in by_size.items()}
        rows.append(
            {
                "study": name,
                "title": loaded[0].title,
                "parts": ", ".join(study.part for study in loaded if study.part) or None,
                "runs": ", ".join(f"{size} {count}" if size else str(count) for size, count in counts.items()),
                "claims": sum(len(study.claims) for study in loaded),
                "source": paper(loaded[0].paper).SOURCE if loaded[0].paper else None,
            }
        )
    return rows


def _allow_imports(name: str, studies: Sequence["Study"], allowed: bool) -> Sequence[str]:
    """The folders in which a user's own model is looked for, here from now on."""
    from pipeline.config import check_imports_allowed

    for study in studies:
        check_imports_allowed(study, allowed)
    folders = [str(Path(name).absolute().parent), str(Path.cwd())] if allowed else []
    sys.path += folders  # behind everything else, so that no module of the user's hides one of ours
    return folders


@dataclass(frozen=True)
class Where:
    """Where runs are trained: here, by default as many at a time as fit, or on the workers of a scheduler.

    Attributes:
        workers: runs at a time here.
        scheduler: address of a Dask scheduler.
        imports: folders in which its workers look for a user's own model.
    """

    workers: int | None = None
    scheduler: str | None = None
    imports: Sequence[str] = ()


def _where(workers: int | None, scheduler: str | None, imports: Sequence[str]) -> Where:
    if workers is not None and scheduler is not None:
        raise click.UsageError("--workers and --scheduler: give one of them; a scheduler has workers of its own")
    return Where(workers, scheduler, imports)


def _train_all(loaded: Sequence[tuple["Study", str]], where: Where, quiet: bool) -> int:
    """Train the parts of a study one after the other; returns the exit code of the worst."""
    codes = []
    for study, root in loaded:
        codes.append(_train(study, root, where, quiet))
        if codes[-1] >= 128:  # interrupted
            return codes[-1]
    return max(codes)


def _train(study: "Study", root: str, where: Where, quiet: bool) -> int:
    """Train what is unfinished; returns the exit code."""
    from pipeline.plan import check_start, check_start_here, plan_runs
    from pipeline.store import FINAL, check_root, is_run, read_run, relabel, run_path

    _check_training()
    # Planning first refuses data that cannot be used, before anything is written.
    planned = plan_runs(study.runs(), root)
    check_root(root)
    attrs = {
        "title": study.title,
        "study_title": study.whole,
        "study": study.name,
        "part": study.part,
        "size": study.size,
        "study_source": study.source,
        "overrides": list(study.overrides),
        "paper": study.paper,
        "claims": list(study.claims),
        "figures": study.figures,
    }
    for done in (one.config for one in planned if one.state == "done"):
        relabel(read_run(run_path(root, done.run_id)), {**attrs, "stop": done.stop.model_dump(exclude_none=True)})
    left = [one for one in planned if one.state != "done"]
    runs = [one.config for one in left]
    if not runs:
        click.echo(f"nothing to do: all {len(planned)} runs of {study.label} in {root} are done", err=True)
        return 0
    if where.scheduler is None:
        from pipeline.sweep import sweep

        check_start_here(left, root)
        started = partial(sweep, runs, root, workers=where.workers)
    else:
        from pipeline.remote import sweep_on

        check_start(left)
        started = partial(sweep_on, where.scheduler, runs, root, imports=where.imports)
    outcomes: list[Outcome] = []
    said: set[str] = set()
    with _Signals() as signals, console.Progress(f"training {len(runs)} runs of {study.label}", quiet) as progress:
        watch = _Watch(runs, root, progress)

        def poll() -> bool:
            watch.update()
            return signals.caught is not None

        for outcome in started(attrs=attrs, on_poll=poll):
            outcomes.append(outcome)
            watch.ended(outcome.run_id)
            for warning in set(outcome.warnings) - said:
                said.add(warning)
                progress.warn(f"warning: {warning}")
            if outcome.error and outcome.error not in said:
                said.add(outcome.error)
                of = "" if outcome.run_id in outcome.error else f"{outcome.run_id}: "
                progress.warn(f"error: {of}{outcome.error}")
                if outcome.detail:
                    progress.warn(outcome.detail)
        progress.end(_endings(outcomes, root))
    if signals.caught is not None:
        saved = f"what was measured is saved in {root}, the same command goes on from there"
        measured = any(is_run(run_path(root, run.run_id)) for run in runs)
        click.echo(f"interrupted; {saved if measured else 'nothing was measured yet'}", err=True)
        return 128 + signals.caught
    failed = [outcome for outcome in outcomes if outcome.status not in FINAL]
    if not failed:
        return 0
    return 3 if len(failed) < len(planned) else failed[0].exit_code or 1


def _endings(outcomes: Sequence["Outcome"], root: str) -> str:
    """How the runs of a sweep ended: `2 complete, 1 diverged (loss at step 14 is inf)`."""
    from pipeline.store import read_run, run_path

    parts = []
    # In the order of the letters, complete first: runs end in another order every time.
    for status, count in sorted(Counter(outcome.status for outcome in outcomes).items()):
        reasons: list[str] = []
        if status == "diverged":
            runs = [read_run(run_path(root, outcome.run_id)) for outcome in outcomes if outcome.status == status]
            reasons = list(dict.fromkeys(run.attrs["stop_reason"] for run in runs))
            reasons[3:] = ["..."] if len(reasons) > 3 else []
        parts.append(f"{count} {status}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return ", ".join(parts)


class _Signals:
    """While open, the first SIGINT or SIGTERM is remembered; a second one acts as it did before."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        signal.signal(number, self._before[number])
        self.caught = number


class _Watch:
    """How far a sweep is, from the heartbeats of its runs."""

    def __init__(self, runs: Sequence["RunConfig"], root: str, progress: console.Progress) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._root, self._progress = root, progress
        self._done: set[str] = set()
        self._looked = -math.inf

    def ended(self, run_id: str) -> None:
        """Count a run as done."""
        self._done.add(run_id)

    def update(self) -> None:
        """Show the share of the work done, and the newest step of a run that is under way."""
        from pipeline.disk import door
        from pipeline.errors import UnreachableStore
        from pipeline.store import heartbeat, run_path

        now = time.monotonic()
        if now - self._looked < door(self._root).beat_seconds / 2:
            return
        self._looked = now
        share, note = float(len(self._done)), ""
        for run_id in self._runs.keys() - self._done:
            try:
                beat = heartbeat(run_path(self._root, run_id))
            except UnreachableStore:
                continue  # this is only to show; if it matters, the run itself fails
            if beat.get("status") == "running":
                share += self._share(self._runs[run_id], beat)
                note = f"{run_id} at step {beat['last_step']}" + (
                    f", loss {beat['loss']:.2g}" if "loss" in beat else ""
                )
        self._progress.update(share / len(self._runs), f"{len(self._done)}/{len(self._runs)} runs done, {note}")

    @staticmethod
    def _share(run: "RunConfig", beat: dict[str, Any]) -> float:
        """Steps made of those planned, or the way of log L to the goal, whichever is further."""
        by_steps = (beat.get("last_step") or 0) / run.stop.steps
        if run.stop.loss is None or not 0 < beat.get("loss", 0) < 1:
            return by_steps
        return min(0.99, max(by_steps, math.log(beat["loss"]) / math.log(min(run.stop.loss, 0.5))))


@main.command(epilog=example("ntk-eos status digits", "ntk-eos status data/stores/digits --watch"))
@root_argument
@click.option("--watch", is_flag=True, help="Show it again every two seconds until nothing is running.")
@json_option
def status(root: str, watch: bool, as_json: bool) -> None:
    """List the runs of a store, or of the parts of a study, and how each stands.

    Seconds are the wall time of the last process that wrote the run. --json also has the heads of the digest chains.
    """
    from pipeline.store import run_paths, stores_of

    while True:
        stores = stores_of(root)
        rows = [
            ({"part": store.name} if len(stores) > 1 else {}) | _status_row(path)
            for store in stores
            for path in run_paths(store)
        ]
        hidden = (
            set()
            if as_json
            else {"head", "traceback"} | ({"error"} if not any(row["error"] for row in rows) else set())
        )
        shown = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
        console.show(shown, as_json=as_json, empty=f"{root} has no runs")
        if not watch or not any(row["status"] == "running" for row in rows):
            return
        time.sleep(2)
        click.echo()


def _status_row(path: "Location") -> dict[str, Any]:
    from pipeline.schema import GROUPS
    from pipeline.store import read_run

    row = dict.fromkeys(["run", "status", "step", *(f"{group}_rows" for group in GROUPS), "commits", "seconds"])
    try:
        run = read_run(path)
    except NtkEosError as error:
        return row | {"run": path.stem, "status": "unreadable", "error": str(error), "traceback": None, "head": None}
    beat = run.heartbeat
    return row | {
        "run": run.run_id,
        "status": run.status,
        "step": run.attrs["last_step"],
        **{f"{group}_rows": rows for group, rows in run.lengths.items()},
        "commits": run.attrs["commits"],
        "seconds": beat.get("elapsed"),
        "error": beat.get("error"),
        "traceback": beat.get("traceback"),
        "head": run.head,
    }


@main.command(epilog=example("ntk-eos analyze digits", "ntk-eos analyze stores/mine --json"))
@root_argument
@json_option
@compute_options
@catalog_option
@quiet_option
@click.pass_context
def analyze(ctx: click.Context, root: str, as_json: bool, quiet: bool) -> None:
    """Compute what is derived from the runs and is not up to date, and sync the catalogue.

    A run of which bytes are damaged is named and keeps nothing else back; the exit code is 1 then.
    """
    from pipeline.store import stores_of

    summary = [row for store in stores_of(root) for row in _analyze(str(store), quiet)]
    console.show(summary, as_json=as_json, empty=f"{root} has no rows to analyse")
    ctx.exit(any(row["state"] == "damaged" for row in summary))


def _analyze(root: str, quiet: bool) -> list[dict[str, Any]]:
    from analysis import catalog, compute, results

    with console.Progress(f"analysing {root}", quiet) as progress:
        if (link := compute.dashboard()) is not None:
            progress.say(f"dashboard: {link}")
        summary = results.analyze(root, progress=progress.update)
        catalog.sync(root)
        if all(row["state"] == "fresh" for row in summary):
            progress.end("")
    return summary


@main.command(epilog=example('ntk-eos sql digits "select learning_rate, count(*) from runs group by 1"'))
@root_argument
@click.argument("query")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@compute_options
@catalog_option
@quiet_option
def sql(root: str, query: str, as_csv: bool, as_json: bool, quiet: bool) -> None:
    """Query the catalogue of a store, read-only; docs/catalogue.md lists tables and columns."""
    from analysis import catalog

    if as_csv and as_json:
        raise click.UsageError("--csv and --json: give one of them")
    if catalog.derived(query):
        _analyze(root, quiet)
    table = catalog.query(root, query)
    if as_csv:
        import csv

        writer = csv.writer(sys.stdout)
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    else:
        console.show([dict(zip(table.columns, row, strict=True)) for row in table.rows], as_json=as_json)


@main.command(epilog=example("ntk-eos plot digits kta --x time", "ntk-eos plot digits --out figures --format svg"))
@root_argument
@click.argument("figures", nargs=-1, shell_complete=_complete_figure)
@click.option("--x", type=click.Choice(["step", "time", "loss"]), default="step", show_default=True,
              help="Horizontal axis; time is step times learning rate.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False), help="Folder [default: ROOT/figures].")
@click.option("--format", "formats", multiple=True, type=click.Choice(["png", "svg"]), default=("png", "svg"),
              show_default=True)  # fmt: skip
@json_option
@compute_options
@catalog_option
@quiet_option
def plot(
    root: str, figures: Sequence[str], x: str, out: str | None, formats: Sequence[str], as_json: bool, quiet: bool
) -> None:
    """Draw the figures of a study (all of them by default) and print their paths."""
    from analysis import plots, studies
    from pipeline.disk import location

    _analyze(root, quiet)
    known = studies.figures(root)
    folder = out or location(root) / "figures"
    paths = plots.draw_figures(root, figures, x=x, folder=folder, formats=formats, figures=known)
    _show_paths(paths, as_json)


@main.command(epilog=example("ntk-eos report digits", "ntk-eos report digits --out digits.html"))
@root_argument
@click.option("--out", type=click.Path(dir_okay=False), help="File [default: ROOT/report.html].")
@compute_options
@quiet_option
def report(root: str, out: str | None, quiet: bool) -> None:
    """Write one self-contained HTML page with figures, claims, runs and provenance; print its path."""
    click.echo(_write_report(root, out, quiet))


def _write_report(root: str, out: str | None, quiet: bool) -> "Location":
    from analysis.report import write_report

    with console.Progress("writing the report", quiet) as progress:
        return write_report(root, out, progress=progress.update)


@main.command(epilog=example("ntk-eos claims digits", "ntk-eos claims digits --json"))
@root_argument
@json_option
@compute_options
@catalog_option
@quiet_option
@click.pass_context
def claims(ctx: click.Context, root: str, as_json: bool, quiet: bool) -> None:
    """Judge the claims of a study on its store; exit 1 if one failed."""
    from pipeline.store import stores_of

    judgements = [judgement for store in stores_of(root) for judgement in _judge(str(store), quiet)]
    _show_claims(judgements, as_json)
    ctx.exit(any(judgement.verdict.verdict == "failed" for judgement in judgements))


def _judge(root: str, quiet: bool) -> list["Judgement"]:
    from analysis.judge import judge_store

    _analyze(root, quiet)
    return judge_store(root)


def _show_claims(judgements: Sequence["Judgement"], as_json: bool) -> None:
    from analysis.judge import CHANGES

    if as_json:
        console.show([judgement.as_row() for judgement in judgements], as_json=True)
        return
    several = any(judgement.part for judgement in judgements)
    table = [
        {
            **({"part": judgement.part} if several else {}),
            "claim": judgement.claim.name,
            "verdict": judgement.verdict.verdict,
            "runs": judgement.verdict.runs,
            "measured": textwrap.shorten(judgement.verdict.value, 60, placeholder=" ..."),
        }
        for judgement in judgements
    ]
    console.show(table, as_json=False, empty="the studies of this store make no claims")
    colour = console.coloured(sys.stdout)
    for judgement in judgements:
        click.echo()
        verdict = judgement.verdict.verdict
        click.echo(
            click.style(verdict.ljust(13), fg=console.COLOURS[verdict], bold=True)
            + (f"{judgement.part}: " if judgement.part else "")
            + judgement.claim.name,
            color=colour,
        )
        click.echo(f"             {judgement.claim.statement}")
        click.echo(f"             measured: {judgement.verdict.value} ({judgement.verdict.runs} runs)")
        click.echo(f"             rule: {judgement.claim.rule}")
        for change in judgement.claim.changes:
            click.echo(f"             rule changed: {change}")
    if judgements:
        click.echo("\nchanges since the first full run that concern every claim:")
        for change in CHANGES:
            click.echo(f"             {change}")


@main.command(
    epilog=example(
        "ntk-eos kernel digits --probe test",
        "ntk-eos kernel digits lr-0.4_seed-0 --probe test --at all --layers",
        "ntk-eos kernel data/stores/digits/runs/RUN.zarr --probe new.npz --kernel conjugate",
        "ntk-eos kernel digits --probe large.npz --workers 2 --memory 2GiB --plan",
    )
)
@click.argument(
    "root", metavar="RUN", shell_complete=_complete_root, callback=lambda _c, _p, value: _existing_root(value)
)
@click.argument("run_ids", nargs=-1, metavar="[RUN_ID]...", shell_complete=_complete_run)
@click.option("--probe", required=True, metavar="test|train|FILE.npz", shell_complete=_complete_probe,
              help="Examples: those that the run did not choose, its own, or x and y of a file.")  # fmt: skip
@click.option("--kernel", "name", default="ntk", show_default=True, shell_complete=_complete_kernel,
              help="Name, or TOML with options: '{name=\"nngp\", depth=2}'.")  # fmt: skip
@click.option("--layers", is_flag=True, help="Also the part of the NTK of each trained tensor.")
@click.option("--at", default="final", show_default=True, metavar="final|all|STEP,...", help="Snapshots to take.")
@click.option("--matrix-free", is_flag=True,
              help="Never form the NTK: eigenpairs by products with it, and its norm with an error bar.")  # fmt: skip
@click.option("--tolerance", type=float, help="Relative residual of matrix-free eigenpairs [default: 1e-8].")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True,
              help="Processes that compute tiles, and threads that multiply them.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS",
              help="Compute the tiles on the workers of this Dask scheduler, as tcp://host:8786.")  # fmt: skip
@click.option("--memory", metavar="BYTES", callback=_bytes,
              help="Refuse what takes more, such as 1GiB [default: what is available].")  # fmt: skip
@click.option("--plan", "planning", is_flag=True, help="Only say what it would take: tiles, bytes, memory, seconds.")
@click.option("--allow-imports", is_flag=True, help="Import the model that the run's study names.")
@json_option
@quiet_option
@click.pass_context
def kernel(
    ctx: click.Context,
    root: str,
    run_ids: Sequence[str],
    probe: str,
    name: str,
    layers: bool,
    at: str,
    matrix_free: bool,
    tolerance: float | None,
    workers: int,
    scheduler: str | None,
    memory: int | None,
    planning: bool,
    allow_imports: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute a kernel of recorded runs from their stored parameters, also on new examples.

    RUN is the folder of a run, or a store with names of its runs: all of them by default. Nothing is trained. Prints
    where each result lies, a run of a store under ROOT/analysis/kernel/, and the alignment of its last snapshot.
    From 10,000 examples on the kernel is computed in tiles straight into the store; a killed command goes on at the
    next one.
    """
    from pipeline.config import kernel_table
    from pipeline.errors import InputError

    _check_training()
    paths = _paths_of_runs(root, run_ids)
    if tolerance is not None and not matrix_free:
        raise InputError("--tolerance: of --matrix-free only")
    if planning and scheduler:
        raise InputError("--plan: says what it would take on this machine; leave --scheduler out")
    options = {
        "kernel": kernel_table(name), "probe": probe, "layers": layers, "at": _steps(at), "workers": workers,
        "memory": memory, "matrix_free": (tolerance or 1e-8) if matrix_free else None, "allow_imports": allow_imports,
    }  # fmt: skip
    if allow_imports:
        sys.path.append(str(Path.cwd()))
    rows, failed = [], []
    with console.Progress(f"{'planning ' if planning else ''}{name} of {len(paths)} runs", quiet) as progress:
        for number, path in enumerate(paths):
            share = _Share(progress, number, len(paths), path.stem)
            try:
                rows.append(_forecast(path, options) if planning else _replayed(path, options, scheduler, share.update))
            except NtkEosError as error:
                if len(paths) == 1:
                    raise
                failed.append(error)
                progress.warn(f"error: {path.stem}: {error}")
    console.show(rows, as_json=as_json, empty="no kernel was computed")
    if failed:
        ctx.exit(3 if rows else failed[0].exit_code)


def _paths_of_runs(root: str, run_ids: Sequence[str]) -> "list[Location]":
    from pipeline.disk import location
    from pipeline.errors import MissingError
    from pipeline.store import find_path, is_run, run_paths

    if is_run(root):
        return [location(root)]
    paths = [find_path(root, run_id) for run_id in run_ids] or run_paths(root)
    if not paths:
        raise MissingError(f"{root} has no runs")
    return paths


def _steps(at: str) -> str | list[int]:
    from pipeline.errors import InputError

    if at in ("final", "all"):
        return at
    try:
        return [int(step) for step in at.split(",")]
    except ValueError:
        raise InputError(f"--at {at}: must be final, all or steps, such as 0,100") from None


def _forecast(path: "Location", options: dict[str, Any]) -> dict[str, Any]:
    """What the kernel of one run would take."""
    from pipeline.forecast import forecast

    found = vars(forecast(path, **options))
    return {"bytes" if name == "nbytes" else name: value for name, value in found.items()}


def _replayed(
    path: "Location", options: dict[str, Any], scheduler: str | None, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """Compute a kernel of one run; where it lies, and the alignment of its last row."""
    from analysis import alignment, open_run
    from pipeline.replay import replay

    found = replay(path, **options, scheduler=scheduler, progress=progress)
    # One block at a time: the memory is for the kernel.
    last = alignment(open_run(found).isel(snapshot=[-1])).compute(scheduler="sync")
    alignments = {name: float(last[name].item()) if name in last else None for name in ("kta", "kta_centred")}
    return {"run": path.stem, "step": int(last["step"].item()), **alignments, "path": str(found)}


class _Share:
    """The progress of one run among several."""

    def __init__(self, progress: console.Progress, done: int, count: int, name: str) -> None:
        self._progress, self._done, self._count, self._name = progress, done, count, name

    def update(self, fraction: float, note: str) -> None:
        """Show the share of all runs."""
        self._progress.update((self._done + fraction) / self._count, f"{self._name}, {note}")


@main.command(epilog=example("ntk-eos verify digits --deep", "ntk-eos verify digits lr-0.1_seed-0 --json"))
@root_argument
@click.argument("run_ids", nargs=-1, shell_complete=_complete_run)
@click.option("--deep", is_flag=True, help="Recompute every digest from the bytes on disk.")
@json_option
@catalog_option
@quiet_option
@click.pass_context
def verify(ctx: click.Context, root: str, run_ids: Sequence[str], deep: bool, as_json: bool, quiet: bool) -> None:
    """Check that a store holds what was committed; exit 1 if anything is damaged."""
    from analysis import catalog
    from pipeline.verify import Problem, verify_root

    with console.Progress(f"verifying {root}", quiet) as progress:
        problems = verify_root(root, run_ids, deep=deep, progress=progress.update)
    mend = (
        "put the newest copy back, or run its study again, which records the rest with the same numbers; to settle for "
        "the older one, delete the catalogue"
    )
    problems += [Problem(run_id, what, mend) for run_id, what in catalog.behind(root, run_ids).items()]
    if as_json:
        console.show([vars(problem) for problem in problems], as_json=True)
    else:
        for problem in problems:
            click.echo(line(f"{'damaged' if problem.damage else 'note   '}  {problem.where}: {problem.what}"))
            click.echo(line(f"         {problem.mend}"))
        if not problems:
            click.echo(f"{root}: nothing wrong was found")
    ctx.exit(any(problem.damage for problem in problems))


@main.command(epilog=example("ntk-eos repair digits", "ntk-eos repair digits --apply"))
@root_argument
@click.argument("run_ids", nargs=-1, shell_complete=_complete_run)
@click.option("--apply", is_flag=True, help="Remove it; without this nothing is changed.")
@json_option
def repair(root: str, run_ids: Sequence[str], apply: bool, as_json: bool) -> None:
    """Show what killed writers left in a store, or remove it. Nothing that was committed is ever touched."""
    from pipeline.repair import repair_root

    found = repair_root(root, run_ids, apply=apply)
    if as_json:
        console.show([{**vars(debris), "path": str(debris.path)} for debris in found], as_json=True)
        return
    for debris in found:
        size = "" if debris.size is None else f", {console.bytes_text(debris.size)}"
        click.echo(line(f"{debris.path}: {debris.what}{size}"))
    sizes = [debris.size for debris in found if debris.size is not None]
    total = f"{len(sizes)} file(s) or folder(s) of {console.bytes_text(sum(sizes))}"
    done = "removed" if apply else "would be removed; add --apply"
    click.echo(f"{root}: {f'{total} {done}' if sizes else 'nothing to remove'}", err=True)


@main.command(
    epilog=example("ntk-eos export digits --format csv --out tables", "ntk-eos export digits --format netcdf --out nc")
)
@root_argument
@click.option("--format", "kind", type=click.Choice(["netcdf", "parquet", "csv"]), required=True,
              help="netcdf: one file per run; parquet, csv: one file per table of the catalogue.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder; created if absent.")
@json_option
@quiet_option
def export(root: str, kind: str, out: str, as_json: bool, quiet: bool) -> None:
    """Copy a store into files for other tools and print their paths."""
    from analysis.export import export_store

    _analyze(root, quiet)
    with console.Progress(f"exporting {root}", quiet) as progress:
        _show_paths(list(export_store(root, kind, out, progress=progress.update)), as_json)


def _show_paths(paths: "Sequence[Location]", as_json: bool) -> None:
    if as_json:
        console.show([{"path": str(path)} for path in paths], as_json=True)
    else:
        for path in paths:
            click.echo(path)
