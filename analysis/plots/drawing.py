"""Pure drawing: frames of numbers in, matplotlib figures out; no store, no global state of pyplot."""

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8, "legend.title_fontsize": 8,
    "figure.facecolor": "white", "figure.constrained_layout.use": True, "axes.titlesize": 8,
    "axes.titlelocation": "left", "axes.titlecolor": "0.35", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9",
    "grid.linewidth": 0.6, "lines.linewidth": 1.3, "legend.frameon": False,
}  # fmt: skip
X_LABELS = {
    "step": "step",
    "time": "time  (step × learning rate)",
    "loss": "training loss  (each run at its first row at or below it)",
}
# Okabe and Ito (2008): told apart with any colour vision.
BLUE, VERMILION, GREY, SHADE = "#0072B2", "#D55E00", "0.35", "0.82"
MARKERS = "os^Dv<p>"
BAND = 0.14  # opacity of a band of one standard deviation
EM = 0.5  # mean width of a character of such text, in font sizes
LABEL_WIDTH = 28  # characters of a line of a label
PATTERNS = 3  # of dashes
MOST_LINES = 12  # more can neither be told apart nor named beside the axes

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), "-.")
NAMES = {
    "kta": "training", "kta_closed_form": "closed form at the measured s", "squared_length": "measured",
    "kta_measured": "measured",
    "squared_length_predicted": "root of S(s) = 2/η", "kta_test": "held out", "c5": "training", "c5_test": "held out",
    "test_error_rate": "network", "regression_error_rate": "regression with the kernel", "sharpness": "measured",
    "line": "2/η",
}  # fmt: skip

# `plot_edge` shades stretches of falling sharpness of at least so many rows, and bridges gaps shorter than that.
SHORTEST = 3
# It ends, a quarter of its length later, where the sharpness last left this distance from its line, relative to it.
SETTLED = 0.02


@contextmanager
def odd_glyphs() -> Iterator[None]:
    """A name in a script that the font lacks shows as boxes, without a warning; the numbers are none the worse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour per label along viridis, dark for the first; its pale end is left out."""
    ordered = list(dict.fromkeys(labels))
    return {
        label: to_hex(mpl.colormaps["viridis"](0.85 * i / max(len(ordered) - 1, 1))) for i, label in enumerate(ordered)
    }


@mpl.rc_context(STYLE)
def plot_kta(curves: pd.DataFrame, ends: pd.DataFrame, x: str, setting: str = "") -> Figure:
    """KTA along training, one line per learning rate: mean over seeds, band of one standard deviation.

    Args:
        curves: columns label, `x`, kta (mean over seeds), sd (NaN for a single seed), in order of `x`.
        ends: one row per run in the order of the legend: label, status, crossed (whether its sharpness passed 2/η),
            `x` and kta of its last row.
        x: step, time or loss.
        setting: what was trained, for the small print above the axes.
    """
    figure = Figure(figsize=(7.6, 4.2))
    axes = figure.add_subplot()
    palette, setting = _chosen(ends["label"], setting)
    ends = ends[ends["label"].isin(palette)]
    crossed = ends.groupby("label")["crossed"].any()
    dashes = _dashes([label for label in palette if not crossed[label]])
    for label, colour in palette.items():
        line = curves[curves["label"] == label]
        axes.plot(line[x], line["kta"], color=colour, linestyle=dashes.get(label, "-"), label=label, zorder=3)
        _band(axes, line[x], line["kta"], line["sd"], colour)
    notes: list[Any] = []
    if curves["sd"].notna().any():
        notes.append(Patch(color=GREY, alpha=BAND, linewidth=0, label="± 1 sd over seeds"))
    if dashes:
        notes.append(Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="never passed 2/η"))
    diverged = ends["status"] == "diverged"
    _ends(axes, ends[~diverged], x, palette, notes, "o", "last row of a run")
    if x != "loss":
        _ends(axes, ends[diverged], x, palette, notes, "x", "a run diverged")
    elif diverged.any():
        # The last loss of a run that diverged may be anything up to the largest number: it would stretch the axis.
        notes.append(Line2D([], [], linestyle="", label=f"{diverged.sum()} diverged, not shown"))
    if x == "loss" and len(curves):
        axes.set_xscale("log")
        _label_losses(axes)
        axes.invert_xaxis()
    elif x == "step":
        # Runs differ tenfold in length; step 0 has no logarithm, so the first step is drawn linearly.
        axes.set_xscale("symlog", linthresh=1, linscale=0.25)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=0)
    axes.set(xlabel=X_LABELS[x], ylabel="KTA = yᵀKy / (‖K‖ ‖y‖²)")
    _legend(figure, "upper", title="learning rate η", handlelength=3.2)
    _legend(figure, "lower", handles=notes)
    _head(figure, axes, "Kernel target alignment along training", setting)
    return figure


@mpl.rc_context(STYLE)
def plot_modes(shares: pd.DataFrame, level: float, setting: str = "") -> Figure:
    """Where the target sits among the leading eigenvectors at matched loss: c_i beside C(k) = c_1 + ... + c_k.

    Args:
        shares: columns label, mode (1, 2, ...), c, c_sd, cumulative, cumulative_sd: mean and standard deviation over
            seeds, by label in the order of the legend.
        level: the matched loss.
        setting: what was trained, for the small print above the axes.
    """
    palette, setting = _chosen(shares["label"], setting)
    shares = shares[shares["label"].isin(palette)]
    figure = Figure(figsize=(9.6, max(4.2, 0.7 * len(palette) + 1)))
    grid = figure.add_gridspec(len(palette), 2)
    right = figure.add_subplot(grid[:, 1])
    rows = [figure.add_subplot(grid[i, 0]) for i in range(len(palette))]
    top = (shares["c"] + shares["c_sd"].fillna(0)).max()
    last = int(shares["mode"].max())
    ticks = [1, *range(5, last + 1, 5)]
    # The largest learning rate comes first, as its curve is on top in the panel beside.
    for i, (axes, (label, colour)) in enumerate(zip(rows, reversed(palette.items()), strict=True)):
        chosen = shares[shares["label"] == label]
        axes.bar(chosen["mode"], chosen["c"], yerr=chosen["c_sd"].fillna(0), color=colour, ecolor=GREY,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
        axes.set(xlim=(0.3, last + 0.7), ylim=(0, 1.05 * top), xticks=ticks)
        axes.tick_params(labelbottom=i == len(rows) - 1)
        axes.grid(visible=False, axis="x")
        # Open marks of different shape: curves that coincide show both.
        right.plot(
            chosen["mode"], chosen["cumulative"], color=colour, linewidth=1, marker=MARKERS[i % len(MARKERS)],
            markersize=4.5, markerfacecolor="none", label=label,
        )  # fmt: skip
        _band(right, chosen["mode"], chosen["cumulative"], chosen["cumulative_sd"], colour)
    rows[len(rows) // 2].set_ylabel("cᵢ = (vᵢᵀy)² / ‖y‖²", y=0.5 if len(rows) % 2 else 1.1)
    rows[-1].set_xlabel("mode i, by eigenvalue")
    right.set(xlabel="leading modes k", ylabel="C(k) = c₁ + … + cₖ", xticks=ticks, ylim=(0, 1))
    _legend(figure, "upper", title="learning rate η")
    if shares["c_sd"].notna().any():
        notes = [
            Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="", label="± 1 sd (bars)"),
            Patch(color=GREY, alpha=BAND, linewidth=0, label="± 1 sd (curves)"),
        ]
        _legend(figure, "lower", title="over seeds", handles=notes)
    _head(figure, rows[0], f"Share of the target in each NTK eigenvector, at loss {level:g}", setting, right)
    return figure


@mpl.rc_context(STYLE)
def plot_edge(rows: pd.DataFrame, title: str, setting: str = "") -> Figure:
    """One run at the Edge of Stability: its sharpness with the line 2/η above, its KTA below, on one step axis.

    Args:
        rows: per recorded step, in order: step, line (2/η), sharpness_mean and kta_mean (two-step means), phase.
        title: which run.
        setting: what was trained, for the small print above the axes.
    """
    figure = Figure(figsize=(7.6, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True)
    shown = rows.iloc[: _window(rows)]
    falling = steady((shown["phase"] == "eos_falling").to_numpy(), SHORTEST)
    line = rows["line"].iloc[0]
    upper.plot(shown["step"], shown["sharpness_mean"], color=BLUE)
    upper.axhline(line, color="black", linewidth=1, linestyle=(0, (5, 2)))
    lower.plot(shown["step"], shown["kta_mean"], color=VERMILION)
    for start, stop in falling:
        for axes in (upper, lower):
            axes.axvspan(shown["step"].iloc[start], shown["step"].iloc[stop - 1], color=SHADE, linewidth=0, zorder=0)
    cut = "" if len(shown) == len(rows) else f"  (up to {shown['step'].iloc[-1]:,} of {rows['step'].iloc[-1]:,})"
    upper.set(ylabel="NTK sharpness λ₁/n")
    lower.set(ylabel="KTA", xlabel=f"step{cut}")
    handles: list[Any] = [
        Line2D([], [], color=BLUE, label="sharpness"),
        Line2D([], [], color="black", linewidth=1, linestyle=(0, (5, 2)), label=f"2/η = {line:.4g}"),
        Line2D([], [], color=VERMILION, label="KTA"),
    ]
    if falling:
        handles.append(Patch(color=SHADE, label="sharpness falls"))
    _legend(figure, "upper", handles=handles)
    _head(figure, upper, title, setting)
    return figure


@mpl.rc_context(STYLE)
def plot_columns(rows: pd.DataFrame, panels: Mapping[str, Sequence[str]], title: str, setting: str = "") -> Figure:
    """Numbers of runs over the learning rate, one panel for each: a mark per run, a line through the means over seeds.

    Args:
        rows: one per run: learning_rate and the columns of the panels.
        panels: label of the vertical axis -> columns to draw there, the first in colour, further ones in grey; the
            legend names them.
        title: what is shown.
        setting: what was trained, for the small print above the axes.
    """
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.9 * lines + 0.6))
    figure.set_layout_engine("constrained", wspace=0.06)
    grid = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    several = any(len(names) > 1 for names in panels.values())
    for axes, (label, names) in zip(grid, panels.items(), strict=False):
        for i, name in enumerate(names):
            colour = (BLUE, VERMILION, GREY)[i % 3]
            known = rows.dropna(subset=name)
            mean = known.groupby("learning_rate")[name].mean()
            axes.plot(mean.index, mean, color=colour, linestyle="--" if i else "-", label=NAMES.get(name, name))
            axes.plot(
                known["learning_rate"], known[name], "ox+"[i % 3], color=colour, markersize=5, markerfacecolor="none",
            )  # fmt: skip
        axes.set_xscale("log")
        rates = sorted(rows["learning_rate"].unique())
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 4 else 0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set(xlabel="learning rate η", ylabel=label)
        if several and len(names) > 1:
            axes.legend()
    _head(figure, grid[0], title, setting, grid[min(columns, len(panels)) - 1])
    return figure


@mpl.rc_context(STYLE)
def plot_series(rows: pd.DataFrame, panels: Mapping[str, str], title: str, setting: str = "") -> Figure:
    """Numbers of a few runs over the steps, one panel for each below one another, a line per run.

    Args:
        rows: label (of the line), step, and the columns of the panels, in order of step; NaN where a line has none.
        panels: label of the vertical axis -> column; a column that ends in `_log` is drawn on a logarithmic axis.
        title: what is shown.
        setting: what was trained, for the small print above the axes.
    """
    figure = Figure(figsize=(8.4, 1.9 * len(panels) + 0.8))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
    order = list(dict.fromkeys(rows["label"]))
    palette = dict(zip(order, (BLUE, VERMILION, "#009E73", "#CC79A7", GREY), strict=False))
    for axes, (label, name) in zip(grid, panels.items(), strict=True):
        for line, colour in palette.items():
            own = rows[rows["label"] == line].dropna(subset=name)
            dash = DASHES[order.index(line) % len(DASHES)]
            axes.plot(own["step"], own[name], color=colour, linewidth=1.1, linestyle=dash, label=line)
        if name.endswith("_log"):
            axes.set_yscale("log")
        axes.set(ylabel=label)
    grid[-1].set(xlabel="step")
    _legend(figure, "upper", handles=grid[0].get_lines())
    _head(figure, grid[0], title, setting)
    return figure


def steady(flags: NDArray[np.bool_], shortest: int) -> list[tuple[int, int]]:
    """[start, stop) of the stretches of True without flicker.

    Stretches of fewer than `shortest` rows are dropped, then gaps of fewer rows than that are bridged.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))).reshape(-1, 2)
    found: list[tuple[int, int]] = []
    for start, stop in edges[edges[:, 1] - edges[:, 0] >= shortest].tolist():
        if found and start - found[-1][1] < shortest:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _window(rows: pd.DataFrame) -> int:
    """How many rows of a run are worth showing: until the sharpness has settled on its line, and a quarter more."""
    away = np.flatnonzero(np.abs(rows["sharpness_mean"] / rows["line"] - 1) > SETTLED)
    return min(len(rows), int(1.25 * (away[-1] + 1)) + 1) if len(away) else len(rows)


def _head(figure: Figure, axes: Axes, title: str, setting: str, last: Axes | None = None) -> None:
    """Above the axes: a title, and in small print what was trained. Names from a store are never read as formulas.

    The small print is as wide as the axes, or reaches to the end of `last`: the legends must be there already.
    """
    with odd_glyphs():
        figure.draw_without_rendering()  # lays the axes out
    points = 72 / figure.dpi * ((last or axes).get_window_extent().x1 - axes.get_window_extent().x0)
    # Lines break between facts, not within one: textwrap leaves no-break spaces alone.
    facts = setting.replace(" ", "\u00a0").replace("\u00a0·\u00a0", " · ").replace("\u00a0|\u00a0", "\u00a0| ")
    width = int(points / (EM * STYLE["axes.titlesize"]))
    small = [line.strip(" ·") for line in textwrap.wrap(facts, width, max_lines=3)] or [""]
    axes.set_title("\n".join(small), loc="left", parse_math=False)
    # Empty lines leave room for the small print; titles, unlike other text, do not widen the margins.
    axes.set_title(
        title + "\n" * len(small), loc="center", x=0, ha="left", fontsize=11, fontweight="bold", color="black",
        parse_math=False,
    )  # fmt: skip


def _chosen(labels: Iterable[str], setting: str) -> tuple[dict[str, str], str]:
    """The lines to draw with their colours: both ends and as many between as fit; the small print says so."""
    ordered = list(dict.fromkeys(labels))
    if len(ordered) <= MOST_LINES:
        return colours(ordered), setting
    kept = [ordered[i] for i in np.linspace(0, len(ordered) - 1, MOST_LINES).round().astype(int)]
    return colours(kept), f"{setting} · {MOST_LINES} of {len(ordered)} lines shown"


def _ends(
    axes: Axes, ends: pd.DataFrame, x: str, palette: dict[str, str], notes: list[Any], marker: str, note: str
) -> None:
    """Mark where runs end, and say so in the notes if there are any."""
    if len(ends):
        fill = [palette[label] for label in ends["label"]]
        axes.scatter(ends[x], ends["kta"], c=fill, marker=marker, s=18, linewidths=marker == "x", zorder=4)
        notes.append(Line2D([], [], color=GREY, marker=marker, markersize=4.5, linestyle="", label=note))


def _dashes(labels: Sequence[str]) -> dict[str, tuple[float, tuple[float, float]]]:
    """A dash pattern per label; where lines coincide, as they should below the edge, the dashes alternate."""
    gap = 4 * max(min(len(labels), PATTERNS) - 1, 0.5)
    return {label: (-4 * (i % PATTERNS), (4, gap)) for i, label in enumerate(labels)}


def _label_losses(axes: Axes) -> None:
    """On an axis of less than two decades label 1, 2 and 5 of each; the usual labels would be few or overlap."""
    low, high = sorted(axes.get_xlim())
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _band(axes: Axes, x: pd.Series, mean: pd.Series, deviation: pd.Series, colour: str) -> None:
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=BAND, linewidth=0)


def _legend(figure: Figure, place: str, **options: Any) -> None:
    """A legend beside the axes, in the upper or lower corner."""
    options |= {"loc": f"outside right {place}", "alignment": "left"}
    legend = figure.legend(**options)
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_text(textwrap.fill(text.get_text(), LABEL_WIDTH))
