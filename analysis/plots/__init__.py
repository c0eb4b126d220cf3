"""Figures of a store: how the kernel aligns with the target, in which modes, and what happens at the edge.

`draw_figures` writes the figures of a store to files; `FIGURES` are those that every store can have drawn. `plot_kta`,
`plot_modes` and `plot_edge` are pure functions of frames, for numbers from elsewhere.
"""

from analysis.plots.drawing import plot_columns, plot_edge, plot_kta, plot_modes, plot_series
from analysis.plots.figures import FIGURES, Drawing, columns, draw_edge, draw_figures, draw_kta, draw_modes, series
from analysis.plots.files import render, save

__all__ = [
    "FIGURES", "Drawing", "columns", "draw_edge", "draw_figures", "draw_kta", "draw_modes", "plot_columns", "plot_edge",
    "plot_kta", "plot_modes", "plot_series", "render", "save", "series",
]  # fmt: skip
