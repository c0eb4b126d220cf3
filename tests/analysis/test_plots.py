"""Figures: what is drawn is what the store holds, seeds are never averaged in silence, and files are reproducible."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from mock_store import mock_run, mock_store

from analysis import catalog, results, studies
from analysis.plots import (
    FIGURES,
    columns,
    draw_edge,
    draw_figures,
    draw_kta,
    draw_modes,
    numbers,
    plot_columns,
    plot_edge,
    plot_kta,
    plot_modes,
    plot_series,
    render,
    save,
    series,
)
from analysis.plots.drawing import SHORTEST, colours, steady
from pipeline import schema
from pipeline.cadence import Cadence
from pipeline.errors import InputError, MissingError
from pipeline.store import Run, list_runs

LEVEL = 0.5  # the mock's loss level that all runs reach
ISSUE_SQL = (
    "select learning_rate, step, avg(kta), stddev(kta), count(*) from alignment join runs using (run_id) "
    "group by 1, 2 order by 1, 2"
)


def derived(root: Path) -> Path:
    results.analyze(root)
    catalog.sync(root)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two learning rates, one of which crosses its line; three seeds, the last of which stops early at 0.1."""
    root = tmp_path_factory.mktemp("plots")
    mock_store(root, learning_rates=(0.1, 1.2), seeds=(0, 1))
    mock_run(root, 0.1, 2, steps=25)
    mock_run(root, 1.2, 2)
    return derived(root)


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory) -> Path:
    """A run that diverged, one that still grows, and a further axis."""
    root = tmp_path_factory.mktemp("odd")
    mock_run(root, 0.1, 0, steps=12)
    mock_run(root, 1.2, 0, steps=12)
    mock_run(root, 1.2, 1, steps=12, end="diverged")
    mock_run(root, 1.2, 2, steps=6, end=None)
    mock_run(root, 1.2, 0, steps=12, axes={"model.width": 4})
    return derived(root)


@pytest.fixture(scope="module")
def diverged_store(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("diverged")
    return derived(mock_store(root, seeds=[0], steps=6, diverged=[(0.1, 0), (1.2, 0)]))


def kta(run: Run) -> np.ndarray:
    """KTA of every row of the group scalars, from the stored scalars."""
    y = run.read("probe/target").astype(float)
    return run.read("scalars/target_energy") / (run.read("scalars/frobenius_norm") * np.sum(y**2))


def runs_at(root: Path, rate: float) -> list[Run]:
    return [run for run in list_runs(root) if run.attrs["learning_rate"] == rate]


def line_of(figure: Figure, label: str, axes: int = 0) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in figure.axes[axes].lines if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def legends(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# --- KTA along training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "scale"), [("step", 1), ("time", 1.2)])
def test_a_line_is_the_mean_over_seeds(store, x, scale):
    at, mean = line_of(draw_kta(store, x), "1.2")
    np.testing.assert_allclose(at, np.arange(41) * scale)
    np.testing.assert_allclose(mean, np.mean([kta(run) for run in runs_at(store, 1.2)], axis=0), rtol=1e-6)


def test_the_lines_are_what_the_query_of_the_readme_gives(store):
    table = catalog.query(store, ISSUE_SQL)
    rows = [row for row in table.rows if row[0] == 1.2 and row[4] == 3]
    figure = draw_kta(store, "step")
    at, mean = line_of(figure, "1.2")
    np.testing.assert_array_equal(at, [row[1] for row in rows])
    np.testing.assert_allclose(mean, [row[2] for row in rows], rtol=1e-12)
    upper = np.array([row[2] + row[3] for row in rows])
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(sorted(band[:, 1])[-1], upper.max(), rtol=1e-12)


def test_a_mean_ends_where_its_first_seed_ends_and_a_dot_marks_each_end(store):
    figure = draw_kta(store, "step")
    at, _ = line_of(figure, "0.1")
    assert at[-1] == 25
    assert line_of(figure, "1.2")[0][-1] == 40
    dots = figure.axes[0].collections[-1].get_offsets()
    assert sorted(dots[:, 0]) == [25, 40, 40, 40, 40, 40]
    np.testing.assert_allclose(sorted(dots[:, 1]), sorted(kta(run)[-1] for run in list_runs(store)), rtol=1e-6)


def test_over_loss_every_run_stands_at_its_first_row_at_or_below(store):
    at, mean = line_of(draw_kta(store, "loss"), "1.2")
    runs = runs_at(store, 1.2)
    losses = [run.read("scalars/loss") for run in runs]
    expected = [
        np.mean([kta(run)[np.argmax(loss <= level)] for run, loss in zip(runs, losses, strict=True)]) for level in at
    ]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(np.diff(np.log10(at)), -0.05, rtol=1e-9)
    assert at[0] <= min(loss[0] for loss in losses)
    assert at[-1] >= max(loss.min() for loss in losses), "below that not every seed has got there"
    assert at[-1] * 10**-0.05 < max(loss.min() for loss in losses)


def test_learning_rates_that_never_crossed_are_dashed(store):
    lines = {line.get_label(): line for line in draw_kta(store).axes[0].lines}
    assert lines["0.1"].is_dashed()
    assert not lines["1.2"].is_dashed()
    assert "never passed 2/η" in legends(draw_kta(store))


def test_the_axes_say_what_they_are(store):
    for x, label in (("step", "step"), ("time", "step × learning rate"), ("loss", "training loss")):
        axes = draw_kta(store, x).axes[0]
        assert label in axes.get_xlabel()
        assert "KTA" in axes.get_ylabel()
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    small = axes.get_title(loc="left").replace("\u00a0", " ")
    assert "mock · mlp (depth 1, width 8) · n = 12 · p = 32 · seeds 0, 1, 2" in small


def test_the_legend_names_learning_rates_and_marks(store):
    figure = draw_kta(store)
    assert figure.legends[0].get_title().get_text() == "learning rate η"
    assert legends(figure) == ["0.1", "1.2", "± 1 sd over seeds", "never passed 2/η", "last row of a run"]


def test_a_diverged_run_enters_no_mean_and_is_crossed(odd_store):
    figure = draw_kta(odd_store)
    _, mean = line_of(figure, "1.2, width 8")
    kept = [run for run in runs_at(odd_store, 1.2) if run.run_id in ("lr-1.2_seed-0", "lr-1.2_seed-2")]
    np.testing.assert_allclose(mean, np.mean([kta(run)[:7] for run in kept], axis=0), rtol=1e-6)
    assert "a run diverged" in legends(figure)
    assert len(figure.axes[0].collections[-1].get_offsets()) == 1
    over_loss = draw_kta(odd_store, "loss")
    assert "1 diverged, not shown" in legends(over_loss)
    assert len(over_loss.axes[0].collections[-1].get_offsets()) == 4


def test_runs_that_differ_in_more_than_their_seed_are_never_averaged(odd_store):
    labels = ["0.1, width 8", "1.2, width 4", "1.2, width 8"]
    assert sorted(line.get_label() for line in draw_kta(odd_store).axes[0].lines) == labels
    assert sorted(set(numbers.lines(odd_store)["label"])) == labels


def test_a_single_seed_has_no_band():
    ends = pd.DataFrame({"label": ["0.1"], "status": ["complete"], "crossed": [True], "step": [2], "kta": [0.3]})
    curves = pd.DataFrame({"label": "0.1", "step": [0, 1, 2], "kta": [0.1, 0.2, 0.3], "sd": np.nan})
    figure = plot_kta(curves, ends, "step")
    assert legends(figure) == ["0.1", "last row of a run"]


def test_all_runs_diverged_is_a_picture_too():
    ends = pd.DataFrame({"label": ["9"], "status": ["diverged"], "crossed": [True], "loss": [1e60], "kta": [0.3]})
    curves = pd.DataFrame({"label": [], "loss": [], "kta": [], "sd": []}, dtype=float)
    assert render(plot_kta(curves, ends, "loss"), "png").startswith(b"\x89PNG")


def test_settings_of_the_same_name_keep_their_tables(monkeypatch):
    configs = [f'{{"data": {{"width": {i}}}, "model": {{"width": {i}, "depth": {i}}}}}' for i in (1, 2)]
    runs = pd.DataFrame({"line": [1, 2], "learning_rate": 0.1, "config": configs})
    monkeypatch.setattr(numbers, "frame", lambda root, sql: runs)
    assert list(numbers.lines("anywhere")["label"]) == [
        f"0.1, data.width {i}, model.width {i}, depth {i}" for i in (1, 2)
    ]


@pytest.mark.parametrize("x", ["step", "time", "loss"])
def test_that_all_runs_diverged_is_said_instead_of_drawing_no_line(diverged_store, x):
    with pytest.raises(MissingError, match=r"all 2 run\(s\) of .* with a kernel target alignment diverged"):
        draw_kta(diverged_store, x)


def test_that_all_runs_diverged_is_said_and_not_that_they_lack_scalars(diverged_store, tmp_path):
    with pytest.raises(MissingError, match=r"all 2 run\(s\) of .* with kernel scalars diverged"):
        FIGURES["phases"].draw(diverged_store, "step")
    with pytest.raises(MissingError, match="with a kernel target alignment diverged"):
        draw_figures(diverged_store, folder=tmp_path, formats=["png"])
    assert list(tmp_path.iterdir()) == []
    assert draw_edge(diverged_store, run_id="lr-0.1_seed-0").axes[0].lines


def test_coinciding_lines_below_the_edge_alternate_their_dashes():
    labels = ["1", "2", "3"]
    ends = pd.DataFrame({"label": labels, "status": "complete", "crossed": False, "step": 9, "kta": 0.1})
    curves = pd.DataFrame({"label": np.repeat(labels, 2), "step": [0, 9] * 3, "kta": 0.1, "sd": np.nan})
    offsets, patterns = zip(*(line._dash_pattern for line in plot_kta(curves, ends, "step").axes[0].lines), strict=True)
    on, off = patterns[0]
    assert off == 2 * on
    np.testing.assert_allclose(-np.diff(offsets) % (on + off), on)


def test_of_many_lines_a_dozen_is_drawn_and_the_small_print_says_so():
    labels = [str(i) for i in range(100)]
    ends = pd.DataFrame({"label": labels, "status": "complete", "crossed": True, "step": 9, "kta": 0.1})
    curves = pd.DataFrame({"label": labels, "step": 9, "kta": 0.1, "sd": np.nan})
    axes = plot_kta(curves, ends, "step", "a sweep").axes[0]
    assert [line.get_label() for line in axes.lines] == "0 9 18 27 36 45 54 63 72 81 90 99".split()
    assert len(axes.collections[-1].get_offsets()) == 12
    assert "12 of 100 lines shown" in axes.get_title(loc="left").replace("\u00a0", " ")


@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_colours_are_distinct_and_ordered_from_dark_to_light(count):
    palette = colours(str(i) for i in range(count))
    luminance = [np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) for colour in palette.values()]
    assert len(palette) == count
    assert all(darker < lighter for darker, lighter in pairwise(luminance))


# --- modes ------------------------------------------------------------------------------------------------------------


def shares_of(run: Run, level: float) -> np.ndarray | None:
    """c_i at the run's first snapshot at or below a loss."""
    below = np.flatnonzero(run.read("snapshots/loss") <= level)
    if not len(below):
        return None
    y = run.read("probe/target").astype(float)[:, 0]
    vectors = run.read("snapshots/eigenvector", below[0], below[0] + 1)[0].astype(float)
    return (vectors.T @ y) ** 2 / (y @ y)


def test_bars_and_curves_are_the_shares_at_matched_loss(store):
    figure = draw_modes(store)
    right, *rows = figure.axes
    expected = [[share for run in runs_at(store, rate) if (share := shares_of(run, LEVEL)) is not None]
                for rate in (1.2, 0.1)]  # fmt: skip
    assert all(expected)
    for axes, shares, line in zip(rows, expected, right.lines, strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], np.mean(shares, axis=0), rtol=1e-5)
        np.testing.assert_allclose(line.get_ydata(), np.mean(np.cumsum(shares, axis=1), axis=0), rtol=1e-5)
        assert len(shares) == 3
        assert "seeds" not in line.get_label()
    assert f"at loss {LEVEL:g}" in rows[0].get_title(loc="center")


def test_modes_have_one_row_of_bars_per_learning_rate_on_one_scale():
    shares = pd.DataFrame(
        {
            "label": np.repeat([f"0.{i}" for i in range(1, 8)], 20), "mode": list(range(1, 21)) * 7, "c": 0.05,
            "c_sd": 0.01, "cumulative": np.tile(np.linspace(0.05, 1, 20), 7), "cumulative_sd": 0.01,
        }
    )  # fmt: skip
    figure = plot_modes(shares, 0.01)
    right, *rows = figure.axes
    assert len(rows) == 7
    assert len({axes.get_ylim() for axes in rows}) == 1
    assert rows[0].get_ylim() == pytest.approx((0, 1.05 * 0.06))
    assert list(right.get_xticks()) == [1, 5, 10, 15, 20]
    assert legends(figure)[:7] == [f"0.{i}" for i in range(7, 0, -1)]


def test_a_run_that_is_not_there_yet_is_counted(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=4)
    mock_run(tmp_path, 0.1, 2, steps=3, end=None)
    assert draw_modes(derived(tmp_path)).axes[0].get_legend_handles_labels()[1] == ["0.1 (1 of 2 seeds)"]


def test_no_run_at_the_level_is_said_in_a_sentence(tmp_path):
    mock_run(tmp_path, 0.1, 2, steps=1)
    with pytest.raises(InputError, match="share no loss level that they reached"):
        draw_modes(derived(tmp_path))


# --- the edge ---------------------------------------------------------------------------------------------------------


def edge_rows(phase: list[str], sharpness=10.0) -> pd.DataFrame:
    steps = np.arange(len(phase))
    return pd.DataFrame({"step": steps, "line": 10.0, "sharpness_mean": sharpness, "kta_mean": 0.1, "phase": phase})


def shaded(figure: Figure, axes: int = 0) -> list[tuple[float, float]]:
    spans = [patch for patch in figure.axes[axes].patches]
    return [(span.get_x(), span.get_x() + span.get_width()) for span in spans]


def test_the_edge_shows_the_two_step_means_of_its_run(store):
    figure = draw_edge(store, run_id="lr-1.2_seed-1")
    run = next(run for run in list_runs(store) if run.run_id == "lr-1.2_seed-1")
    upper, lower = figure.axes
    sharpness = run.read("scalars/ntk_sharpness")
    shown = len(upper.lines[0].get_xdata())
    np.testing.assert_allclose(upper.lines[0].get_ydata(), ((sharpness[:-1] + sharpness[1:]) / 2)[:shown], rtol=1e-6)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), ((kta(run)[:-1] + kta(run)[1:]) / 2)[:shown], rtol=1e-6)
    np.testing.assert_allclose(upper.lines[1].get_ydata(), 2 / 1.2)
    assert "learning rate 1.2" in upper.get_title(loc="center")
    assert "seed 1" in upper.get_title(loc="left").replace("\u00a0", " ")
    assert f"2/η = {2 / 1.2:.4g}" in legends(figure)


def test_falling_stretches_are_shaded_in_both_panels_without_flicker():
    phase = ["eos_rising"] * 4 + ["eos_falling"] * 5 + ["eos_rising"] * 2 + ["eos_falling"] * 4
    phase += ["eos_rising"] * 5 + ["eos_falling"] * 2 + ["eos_rising"] * 3
    figure = plot_edge(edge_rows(phase, 12.0), "a run")
    assert shaded(figure, 0) == shaded(figure, 1) == [(4, 14)]
    assert "sharpness falls" in legends(figure)


def test_falling_before_the_crossing_is_not_shaded():
    figure = plot_edge(edge_rows(["stable"] * 20), "a run")
    assert shaded(figure) == []
    assert "sharpness falls" not in legends(figure)


def test_the_axis_ends_when_the_sharpness_has_settled_and_says_so():
    sharpness = np.where(np.arange(1000) < 100, 15.0, 10.1)
    figure = plot_edge(edge_rows(["eos_rising"] * 1000, sharpness), "a run")
    assert len(figure.axes[0].lines[0].get_xdata()) == 126
    assert figure.axes[1].get_xlabel() == "step  (up to 125 of 999)"
    whole = plot_edge(edge_rows(["eos_rising"] * 1000, 15.0), "a run")
    assert whole.axes[1].get_xlabel() == "step"


@given(st.lists(st.booleans(), max_size=60))
def test_steady_stretches_are_long_apart_and_mostly_true(flags):
    stretches = steady(np.array(flags, dtype=bool), SHORTEST)
    for start, stop in stretches:
        assert all(flags[start : start + SHORTEST])
        assert all(flags[stop - SHORTEST : stop])
        text = "".join("x" if flag else "." for flag in flags[start:stop])
        assert all(len(gap) < SHORTEST for gap in "".join(text).replace("x", " ").split())
    assert all(one[1] + SHORTEST <= other[0] for one, other in pairwise(stretches))
    covered = {i for start, stop in stretches for i in range(start, stop)}
    for i in range(len(flags) - SHORTEST + 1):
        if all(flags[i : i + SHORTEST]):
            assert set(range(i, i + SHORTEST)) <= covered


@pytest.mark.parametrize(
    ("crossed", "expected"),
    [
        ({0.1: "nn", 0.2: "yy", 0.3: "yy", 0.4: "yy"}, "0.3-0"),
        ({0.1: "yy", 0.2: "yy", 0.3: "yy", 0.4: "yy"}, "0.2-0"),
        ({0.1: "nn", 0.2: "ny", 0.3: "yy"}, "0.3-0"),
        ({0.1: "nn", 0.2: "ny", 0.3: "nn"}, "0.2-1"),
        ({0.1: "nn", 0.2: "nn", 0.3: "nn"}, "0.2-0"),
    ],
    ids=["middle", "lower_of_two", "every_seed", "some_seed", "none"],
)
def test_the_run_shown_is_a_middle_one_above_the_edge(monkeypatch, crossed, expected):
    rows = [
        {"run_id": f"{rate}-{seed}", "learning_rate": rate, "seed": seed, "crossed": letter == "y"}
        for rate, letters in crossed.items()
        for seed, letter in enumerate(letters)
    ]
    monkeypatch.setattr(numbers, "frame", lambda root, sql: pd.DataFrame(rows))
    assert numbers.edge_run("anywhere") == expected


def test_the_query_behind_the_edge_gives_its_numbers(store):
    figure = FIGURES["phases"]
    table = catalog.query(store, figure.sql(store, "step"))
    rows = [row for row in table.rows if row[0] == numbers.edge_run(store)]
    drawn = figure.draw(store, "step").axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, [row[3] for row in rows][: len(drawn)])


# --- stores that lack something ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_store(tmp_path_factory) -> Path:
    """Runs that recorded what every training loop records, and nothing of a kernel."""
    root = tmp_path_factory.mktemp("bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "GROUPS", {"train": schema.TRAIN})
        mock_run(root, 0.1, 0, steps=4, cadences={})
    return derived(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kta", "has a kernel target alignment"),
        ("modes", "no run of .* has eigenvectors at the matched loss"),
        ("phases", "no run of .* has kernel scalars"),
    ],
)
def test_a_missing_input_is_said_in_a_sentence(bare_store, name, message):
    with pytest.raises(MissingError, match=message):
        FIGURES[name].draw(bare_store, FIGURES[name].axes[0])
    with pytest.raises(MissingError, match=message):
        draw_figures(bare_store, [name], folder=bare_store / "figures")


def test_figures_without_inputs_are_left_out_unless_all_are(tmp_path, bare_store):
    with pytest.raises(MissingError, match="has a kernel target alignment"):
        draw_figures(bare_store, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    root = tmp_path / "scalars"
    mock_run(root, 0.1, 0, steps=3, cadences={"scalars": Cadence(every=1)})
    paths = draw_figures(root, folder=tmp_path / "out", formats=["png"])
    assert {path.name for path in paths} >= {"kta.png", "phases.png"}


# --- files ------------------------------------------------------------------------------------------------------------


def test_draw_figures_writes_them_all(store, tmp_path):
    paths = draw_figures(store, folder=tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_draw_figures_over_another_axis(store, tmp_path):
    paths = draw_figures(store, ["kta", "modes"], x="time", folder=tmp_path, formats=["svg"])
    assert [path.name for path in paths] == ["kta_time.svg", "modes.svg"]
    with pytest.raises(InputError, match=r"figure 'ktaa': must be one of kta, modes, phases"):
        draw_figures(store, ["ktaa"], folder=tmp_path)


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("name", FIGURES)
def test_the_same_store_gives_the_same_bytes(store, name, kind):
    one, other = (render(FIGURES[name].draw(store, FIGURES[name].axes[0]), kind) for _ in range(2))
    assert one == other
    assert b"<dc:date>" not in one


def test_a_png_is_sharp_enough_to_print(store, tmp_path):
    (path,) = save(draw_kta(store), tmp_path, "kta", ["png"])
    data = path.read_bytes()
    start = data.index(b"pHYs") + 4
    assert int.from_bytes(data[start : start + 4], "big") >= 150 / 0.0254 - 1
    assert b"Software" not in data


def test_unknown_formats_and_folders_that_cannot_be_written_are_refused(store, tmp_path):
    figure = draw_kta(store)
    with pytest.raises(InputError, match=r"format 'gif': must be one of png, svg"):
        save(figure, tmp_path, "kta", ["png", "gif"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create"):
        save(figure, tmp_path / "file" / "folder", "kta", ["png"])
    (tmp_path / "kta.png").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        save(figure, tmp_path, "kta", ["png"])


def test_names_from_a_store_are_drawn_as_they_are():
    hostile = "$\\frac{$ <script> & 数"
    ends = pd.DataFrame({"label": [hostile], "status": ["complete"], "crossed": [True], "step": [1], "kta": [0.3]})
    curves = pd.DataFrame({"label": hostile, "step": [0, 1], "kta": [0.1, 0.2], "sd": np.nan})
    figure = plot_kta(curves, ends, "step", hostile)
    assert b"<script" not in render(figure, "svg")
    assert hostile in legends(figure)
    assert b"<script" not in render(plot_edge(edge_rows(["stable"] * 3), hostile, hostile), "svg")


@pytest.mark.parametrize(("name", "x"), [(name, x) for name, figure in FIGURES.items() for x in figure.axes])
def test_no_text_overlaps_a_neighbour(store, name, x):
    figure = FIGURES[name].draw(store, x)
    figure.draw_without_rendering()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [axes.get_tightbbox(for_layout_only=True) for axes in figure.axes]
    for i, one in enumerate(boxes):
        assert not any(one.padded(-1).overlaps(other) for other in boxes[i + 1 :])


LONG = " · ".join(["digits (target digit<5)", *(f"mlp (depth {i}, width 64)" for i in range(12)), "n = 300"])


@pytest.mark.parametrize("setting", [LONG, LONG.replace(" · mlp", " | mlp")], ids=["facts", "models"])
def test_the_small_print_is_no_wider_than_the_axes(setting):
    labels = [f"0.{i}, data.target digit<{i}, model.width {64 * i}, model.activation tanh" for i in range(1, 7)]
    ends = pd.DataFrame({"label": labels, "status": "complete", "crossed": True, "step": 9, "kta": 0.1})
    curves = pd.DataFrame({"label": np.repeat(labels, 2), "step": [0, 9] * 6, "kta": 0.1, "sd": np.nan})
    shares = pd.DataFrame(
        {"label": labels, "mode": 1, "c": 0.1, "c_sd": np.nan, "cumulative": 0.1, "cumulative_sd": 0.1}
    )
    for figure in (
        plot_kta(curves, ends, "step", setting),
        plot_modes(shares, 0.1, setting),
        plot_edge(edge_rows(["stable"] * 5), "a run", setting),
    ):
        figure.draw_without_rendering()
        top = next(axes for axes in figure.axes if axes.get_title(loc="left"))
        (text,) = [text for text in top.findobj(Text) if text.get_text() == top.get_title(loc="left")]
        assert text.get_text().count("\n") in (1, 2)
        assert text.get_window_extent().x1 <= max(axes.get_window_extent().x1 for axes in figure.axes)


@pytest.mark.parametrize("lowest", [0.41, 0.2, 0.04, 0.006, 1e-5])
def test_labels_of_losses_do_not_overlap_and_are_several(lowest):
    ends = pd.DataFrame({"label": ["1"], "status": "complete", "crossed": True, "loss": lowest, "kta": 0.1})
    curves = pd.DataFrame({"label": "1", "loss": [0.5, lowest], "kta": 0.1, "sd": np.nan})
    figure = plot_kta(curves, ends, "loss")
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    labels = [label for which in ("major", "minor") for label in axis.get_ticklabels(which=which) if label.get_text()]
    low, high = sorted(figure.axes[0].get_xlim())
    boxes = [label.get_window_extent() for label in labels if low <= label.get_position()[0] <= high]
    assert len(boxes) >= 2
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_figures_need_no_display_and_leave_pyplot_alone():
    code = "import sys, analysis.plots; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES.keys())
def test_a_figure_says_how_to_read_it(store, figure):
    assert figure.caption.endswith(".")
    for x in figure.axes:
        assert catalog.query(store, figure.sql(store, x)).rows


def test_a_store_of_no_paper_has_the_general_figures(store):
    assert studies.figures(store) == FIGURES


# --- figures of a paper, from the queries of its claims ---------------------------------------------------------------


def test_columns_stand_over_the_learning_rate_with_a_line_through_the_means():
    rows = pd.DataFrame({
        "learning_rate": [0.1, 0.1, 0.4, 0.4], "seed": [0, 1, 0, 1], "kta": [1.0, 3.0, 4.0, 6.0],
        "kta_closed_form": [1.0, 3.0, np.nan, 5.0], "c5": [0.1, 0.2, 0.3, 0.4],
    })  # fmt: skip
    figure = plot_columns(rows, {"KTA": ("kta", "kta_closed_form"), "C(5)": ("c5",)}, "A title", "what was trained")
    first, second = figure.axes
    mean, marks, predicted, crosses = first.get_lines()
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0.1, 0.4], [2, 5])
    assert list(marks.get_ydata()) == [1, 3, 4, 6]
    assert list(predicted.get_ydata()) == [2, 5], "a missing value is left out, not drawn as zero"
    assert list(crosses.get_ydata()) == [1, 3, 5]
    assert mean.get_color() != predicted.get_color()
    assert [axes.get_ylabel() for axes in (first, second)] == ["KTA", "C(5)"]
    assert first.get_legend() is not None
    assert second.get_legend() is None
    assert "A title" in first.get_title(loc="center")


def test_series_have_a_line_per_label_in_every_panel_that_it_has_values_for():
    rows = pd.DataFrame({
        "label": ["one"] * 3 + ["two"] * 3, "step": [0, 1, 2] * 2, "kta": [1.0, 2.0, 3.0, 3.0, 2.0, 1.0],
        "loss_log": [1.0, 0.1, 0.01] * 2, "oscillation": [np.nan] * 3 + [0.0, 1.0, 2.0],
    })  # fmt: skip
    panels = {"KTA": "kta", "loss": "loss_log", "oscillation": "oscillation"}
    figure = plot_series(rows, panels, "A title")
    assert [[line.get_label() for line in axes.get_lines()] for axes in figure.axes] == 3 * [["one", "two"]]
    assert [len(line.get_xdata()) for line in figure.axes[2].get_lines()] == [0, 3]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_a_figure_of_a_paper_takes_the_query_of_a_claim_on_the_whole_store(store):
    sql = (
        "select learning_rate, seed, arg_min(kta, step) as kta from alignment join runs using (run_id) "
        "where loss <= {level} and study = {study} group by all"
    )
    drawing = columns("mine", "title", "caption", sql, {"KTA": ("kta",)})
    assert "loss <= 0.5 and true" in drawing.sql(store, "learning rate")
    (axes,) = drawing.draw(store, "learning rate").axes
    assert len(axes.get_lines()[1].get_xdata()) == 6
    empty = series("none", "title", "caption", "select 1 as label, 2 as step, 3 as kta where 1 = 0", {"KTA": "kta"})
    with pytest.raises(MissingError, match="no run has the numbers that it shows"):
        empty.draw(store, "step")


def test_a_study_chooses_its_figures(tmp_path):
    attrs = {"paper": "jiang2025", "figures": ["flow", "kta"]}
    mock_run(tmp_path, 0.1, 0, steps=3, attrs=attrs)
    assert list(studies.figures(tmp_path)) == ["flow", "kta"]
    mock_run(tmp_path, 0.1, 1, steps=3, attrs={**attrs, "figures": ["no_such"]})
    with pytest.raises(InputError, match="figure 'no_such': not one of kta, modes, phases, "):
        studies.figures(tmp_path)
