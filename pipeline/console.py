"""What the command shows: tables and JSON on stdout, progress on stderr."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import click

from pipeline.errors import line

PLAIN_SECONDS = 10.0
COLOURS = {
    "passed": "green", "complete": "green", "failed": "red", "underpowered": "yellow", "diverged": "yellow",
    "stale": "yellow", "interrupted": "yellow", "running": "cyan",
}  # fmt: skip


def coloured(stream: Any) -> bool:
    """Whether to colour what goes to `stream`: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def show(
    rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str = "nothing to show", **further: Mapping[str, Any]
) -> None:
    """Print rows as an aligned table, or as one JSON object {"schema": 1, "rows": [...]} (NaN becomes null).

    Args:
        rows: what to print, all with the same keys.
        as_json: as JSON.
        empty: what to say on stderr where there are no rows.
        **further: entries of the JSON object beside the rows.
    """
    if as_json:
        click.echo(json.dumps(_plain({"schema": 1, "rows": list(rows), **further}), default=str))
        return
    if not rows:
        click.echo(empty, err=True)
        return
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    numeric = [all(isinstance(row[column], int | float | None) for row in rows) for column in columns]
    widths = [max(len(text) for text in (column, *(row[i] for row in cells))) for i, column in enumerate(columns)]
    colour = coloured(sys.stdout)
    for number, row in enumerate([columns, *cells]):
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        if colour and number == 0:
            padded = [click.style(text, bold=True) for text in padded]
        elif colour:
            padded = [click.style(text, fg=COLOURS.get(text.strip())) for text in padded]
        click.echo("  ".join(padded).rstrip(), color=colour)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else line(str(value))


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def bytes_text(count: float) -> str:
    """A number of bytes, to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A duration, to read."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Progress of long work on stderr: a bar on a terminal, a plain line every ten seconds elsewhere.

    Args:
        label: what is being done.
        quiet: show nothing.
    """

    def __init__(self, label: str, quiet: bool = False) -> None:
        self._label, self._quiet = label, quiet
        self._ending = "done"
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and coloured(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=1.0, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._ending:
            self.say(f"{self._label}: {self._ending} in {seconds_text(time.monotonic() - self._started)}")

    def end(self, ending: str) -> None:
        """What the last line says instead of `done`; nothing is said where it is empty, or after an error."""
        self._ending = ending

    def update(self, fraction: float, note: str = "") -> None:
        """Show that `fraction` of the work is done, with the time left estimated from the time it took."""
        now = time.monotonic()
        elapsed = now - self._started
        left = f"{seconds_text(elapsed * (1 - fraction) / fraction)} left" if fraction > 0.02 else "estimating"
        note = ", ".join(part for part in (left, note) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, note=note)
        elif now - self._said > PLAIN_SECONDS:
            self.say(f"{self._label}: {fraction:.0%}, {note}")
            self._said = now

    def say(self, line: str) -> None:
        """One line on stderr, above the bar if there is one."""
        if not self._quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """As `say`, also when quiet."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=True)
