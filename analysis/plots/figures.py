"""The figures that every store can have drawn, and the way from a store to their files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis import catalog, results
from analysis.load import shared_level
from analysis.plots import numbers
from analysis.plots.drawing import SETTLED, SHORTEST, plot_columns, plot_edge, plot_kta, plot_modes, plot_series
from analysis.plots.files import save
from analysis.plots.numbers import Root
from pipeline.disk import Location
from pipeline.errors import InputError, MissingError, NtkEosError
from pipeline.store import find_run, list_runs


@dataclass(frozen=True)
class Drawing:
    """A figure that a store can have drawn.

    Attributes:
        name: as the command takes it, and the stem of its file.
        title: a few words.
        caption: how to read it.
        axes: what it can stand over: step, time, loss or mode; the first is the usual one.
        sql: (root, x) -> the query that gives the numbers drawn.
        draw: (root, x) -> the figure.
    """

    name: str
    title: str
    caption: str
    axes: tuple[str, ...]
    sql: Callable[[Root, str], str]
    draw: Callable[[Root, str], Figure]


def draw_kta(root: Root, x: str = "step") -> Figure:
    """KTA along training of the runs of a store, one line per learning rate.

    Args:
        root: folder of the store, its catalogue up to date.
        x: step, time (step times learning rate) or loss.

    Raises:
        MissingError: if no run has a KTA, or all that have one diverged.
    """
    ends, lines = numbers.frame(root, numbers.ENDS), numbers.lines(root)
    if ends.empty:
        raise MissingError(f"no run of {root} has a kernel target alignment: record kernel scalars or snapshots")
    if (ends["status"] == "diverged").all():
        raise MissingError(f"all {len(ends)} run(s) of {root} with a kernel target alignment diverged")
    ends["label"] = ends["run_id"].map(lines.set_index("run_id")["label"])
    # A run whose sharpness was not recorded is not said to have stayed below.
    ends["crossed"] = ends["crossed"].astype("boolean").fillna(True).astype(bool)
    # Without a row the columns have no type that could be drawn: so it is where no loss is common to the seeds.
    curves = numbers.frame(root, kta_sql(root, x)).astype({x: float, "kta": float, "sd": float})
    curves["label"] = curves["line"].map(lines.drop_duplicates("line").set_index("line")["label"])
    return plot_kta(curves, ends, x, numbers.setting(list_runs(root)))


def kta_sql(root: Root, x: str) -> str:
    """The query behind `draw_kta`."""
    return numbers.BY_LOSS if x == "loss" else numbers.BY_STEP


def draw_modes(root: Root, x: str = "mode") -> Figure:
    """Where the target sits among the leading eigenvectors, at the smallest loss level that all complete runs reach.

    Args:
        root: folder of the store, its catalogue up to date.
        x: mode.

    Raises:
        InputError: if the complete runs share no loss level that they reached.
        MissingError: if no run has eigenvectors at or below that loss.
    """
    level = shared_level(list_runs(root), root)
    shares = numbers.frame(root, modes_sql(root, x)).astype({"c_sd": float, "cumulative_sd": float})
    if shares.empty:
        raise MissingError(f"no run of {root} has eigenvectors at the matched loss {level:g}")
    lines = numbers.lines(root)
    started = lines[lines["status"] != "diverged"].groupby("line").agg(label=("label", "first"), of=("label", "size"))
    shares = shares.join(started, on="line")
    counts = " (" + shares["seeds"].astype(str) + " of " + shares["of"].astype(str) + " seeds)"
    shares["label"] += counts.where(shares["seeds"] < shares["of"], "")
    return plot_modes(shares, level, numbers.setting(list_runs(root)))


def modes_sql(root: Root, x: str) -> str:
    """The query behind `draw_modes`."""
    return numbers.of_store(root, numbers.MODES)


def draw_edge(root: Root, x: str = "step", run_id: str | None = None) -> Figure:
    """Sharpness and KTA of one run, the phases of falling sharpness shaded.

    Args:
        root: folder of the store, its catalogue up to date.
        x: step.
        run_id: which run, by name or a beginning of it; `numbers.edge_run` chooses by default.

    Raises:
        MissingError: if no run that did not diverge has kernel scalars, or there is no such run.
    """
    run = find_run(root, run_id or numbers.edge_run(root))
    rows = numbers.frame(root, numbers.edge_sql(root, run.run_id))
    rows = rows[rows["run_id"] == run.run_id]
    if rows.empty:
        raise MissingError(
            f"run {run.run_id} has fewer than two rows of kernel scalars: see record.scalars in the study"
        )
    rate = 2 / rows["line"].iloc[0]
    return plot_edge(rows, f"Sharpness and KTA of one run, learning rate {rate:g}", numbers.setting([run]))


def edge_sql(root: Root, x: str) -> str:
    """The query behind `draw_edge`."""
    return numbers.edge_sql(root, numbers.edge_run(root))


def columns(name: str, title: str, caption: str, sql: str, panels: Mapping[str, Sequence[str]]) -> Drawing:
    """A figure of numbers of runs over the learning rate, from a query of a claim.

    Args:
        name: as the command takes it.
        title: a few words.
        caption: how to read it.
        sql: as in `analysis.claims.Claim`: one row per run.
        panels: label of the vertical axis -> columns, as `plot_columns` takes them.
    """
    return _of_claim(name, title, caption, sql, "learning rate", lambda *args: plot_columns(args[0], panels, *args[1:]))


def series(name: str, title: str, caption: str, sql: str, panels: Mapping[str, str]) -> Drawing:
    """A figure of numbers over the steps, a line per `label` of the query, else as `columns`."""
    return _of_claim(name, title, caption, sql, "step", lambda *args: plot_series(args[0], panels, *args[1:]))


def _of_claim(
    name: str, title: str, caption: str, sql: str, over: str, plot: Callable[[pd.DataFrame, str, str], Figure]
) -> Drawing:
    """A figure from a query of a claim, asked of all runs of a store."""

    def draw(root: Root, x: str) -> Figure:
        rows = numbers.frame(root, numbers.of_store(root, sql))
        if rows.empty:
            raise MissingError("no run has the numbers that it shows")
        return plot(rows, title, numbers.setting(list_runs(root)))

    return Drawing(name, title, caption, (over,), lambda root, x: numbers.of_store(root, sql), draw)


FIGURES = {
    figure.name: figure
    for figure in (
        Drawing(
            "kta",
            "Kernel target alignment along training",
            "One line per learning rate η: the mean of KTA over seeds, drawn only where every seed has a row, in a "
            "band of one standard deviation. A dot is the last row of a run, a cross that of a run that diverged; "
            "those enter no mean. Dashed: no run of this learning rate ever had its NTK sharpness above 2/η. Over "
            "time, step times learning rate, runs that follow the same flow coincide. Over loss, each run stands at "
            "its first recorded row at or below it, so that equal progress is compared.",
            ("step", "time", "loss"),
            kta_sql,
            draw_kta,
        ),
        Drawing(
            "modes",
            "Share of the target in the leading eigenvectors at matched loss",
            "Left: c_i, the share of the target's energy in the i-th eigenvector of the NTK, mean and standard "
            "deviation over seeds, one row of bars per learning rate in the order of the legend. Right: its sum C(k) "
            "over the k leading eigenvectors. Each run stands at its first snapshot at or below the loss. A curve "
            "that rises earlier has the target in fewer and larger modes.",
            ("mode",),
            modes_sql,
            draw_modes,
        ),
        Drawing(
            "phases",
            "Sharpness and alignment of one run",
            "Two-step means, (q_t + q_{t+1}) / 2, which take out the oscillation of period two. Above: the NTK "
            "sharpness and its line 2/η. Below: KTA. Shaded: from the first crossing of the line on, the stretches "
            f"on which the mean sharpness falls; stretches of fewer than {SHORTEST} rows are left out and gaps of "
            f"fewer than {SHORTEST} rows bridged. The axis ends a quarter later than the sharpness last was more than "
            f"{SETTLED:.0%} away from its line. The run is the first seed of the middle one (the lower of two) of the "
            "learning rates whose every run crossed its line.",
            ("step",),
            edge_sql,
            draw_edge,
        ),
    )
}


def draw_figures(
    root: Root,
    names: Sequence[str] = (),
    *,
    folder: Root,
    x: str = "step",
    formats: Sequence[str] = ("png", "svg"),
    figures: Mapping[str, Drawing] = FIGURES,
) -> list[Location]:
    """Draw figures of a store and write them; what is derived from the runs is brought up to date first.

    Args:
        root: folder of the store.
        names: which figures; all that can be drawn by default.
        folder: where the files go.
        x: what a figure that allows it stands over: step, time or loss. Its file is then called, say, kta_time.png.
        formats: png, svg or both.
        figures: what there is to choose from.

    Returns:
        Paths of the files.

    Raises:
        InputError: for an unknown figure.
        NtkEosError: if the store lacks what a figure asked for by name needs, or what every figure needs.
    """
    for name in names:
        if name not in figures:
            raise InputError(f"figure {name!r}: must be one of {', '.join(figures)}")
    results.analyze(root)
    catalog.sync(root)
    paths: list[Location] = []
    problems: list[NtkEosError] = []
    for name in names or figures:
        figure = figures[name]
        over = x if x in figure.axes else figure.axes[0]
        try:
            drawn = figure.draw(root, over)
        except NtkEosError as error:
            if names:
                raise
            problems.append(error)
            continue
        paths += save(drawn, folder, name if over == figure.axes[0] else f"{name}_{over}", formats)
    if problems and not paths:
        raise problems[0]
    return paths
