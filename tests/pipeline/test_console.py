"""Tables, JSON and progress, on a terminal and without one."""

import io
import json
import re
import sys

import pytest

from pipeline import console
from pipeline.console import Progress, bytes_text, seconds_text, show


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


ROWS = [{"run": "a", "loss": 0.123456789, "verdict": "passed"}, {"run": "bb", "loss": None, "verdict": "failed"}]


def test_a_table_is_aligned_numbers_to_the_right(capsys):
    show(ROWS, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "run      loss  verdict",
        "a    0.123457  passed",
        "bb          -  failed",
    ]


def test_json_has_a_schema_and_no_nan(capsys):
    show([{"a": float("nan"), "b": [1, float("inf")], "c": {"d": float("nan")}}], as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"schema": 1, "rows": [{"a": None, "b": [1, None], "c": {"d": None}}]}
    assert "NaN" not in printed
    show([], as_json=True, total={"seconds": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "rows": [], "total": {"seconds": None}}


def test_nothing_to_show_is_said_on_stderr(capsys):
    show([], as_json=False, empty="no runs")
    assert capsys.readouterr() == ("", "no runs\n")


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
def test_colours_go_to_terminals_that_want_them(monkeypatch, variables, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show(ROWS, as_json=False)
    assert ("\x1b[32m" in terminal.getvalue()) == coloured


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (9000, "2 h 30 min")]
)
def test_durations_are_readable(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB")])
def test_sizes_are_readable(count, text):
    assert bytes_text(count) == text


def test_progress_without_a_terminal_is_a_line_every_ten_seconds_with_the_time_left(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with Progress("training") as progress:
        for step in range(1, 41):
            clock[0] = float(step)
            progress.update(step / 40, f"step {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 28%, 29 s left, step 11"
    assert lines[-1] == "training: done in 40 s"
    assert len(lines) == 4


def test_progress_on_a_terminal_is_a_bar_that_leaves_nothing_but_the_last_line(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("training") as progress:
        progress.update(0.5, "half")
        progress.say("a line above the bar")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "50%" in shown
    assert "a line above the bar" in shown
    assert shown.rstrip().endswith("training: done in 0 s")


def test_work_that_failed_is_not_called_done(capsys):
    with pytest.raises(KeyboardInterrupt), Progress("training"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("ending", "said"), [("2 complete, 1 failed", "training: 2 complete, 1 failed in 0 s\n"), ("", "")]
)
def test_the_last_line_says_how_it_ended(capsys, ending, said):
    with Progress("training") as progress:
        progress.end(ending)
    assert capsys.readouterr().err == said


def test_quiet_progress_says_nothing_but_warnings(capsys):
    with Progress("training", quiet=True) as progress:
        progress.update(0.5)
        progress.say("news")
        progress.warn("error: broken")
    assert capsys.readouterr().err == "error: broken\n"
