"""Figures as files: the same bytes for the same figure, each file there when it is whole."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis.plots.drawing import STYLE
from pipeline.disk import Directory
from pipeline.errors import InputError

DPI = 160
METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def render(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a png or svg file: the same for the same figure, without a date.

    Raises:
        InputError: for another format.
    """
    if kind not in METADATA:
        raise InputError(f"format {kind!r}: must be one of {', '.join(METADATA)}")
    buffer = BytesIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": "ntk-eos"}), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; the numbers are none the worse.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def save(
    figure: Figure, folder: str | os.PathLike[str], name: str, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write a figure as `folder`/`name`.png and .svg; each file appears when it is whole.

    Args:
        figure: what to save.
        folder: where; created if absent.
        name: stem of the files.
        formats: png, svg or both.

    Returns:
        Paths of the files.

    Raises:
        InputError: for another format, or a folder that cannot be written.
    """
    rendered = {f"{name}.{kind}": render(figure, kind) for kind in formats}
    target = Directory(folder)
    target.make()
    for file, data in rendered.items():
        target.put(file, data, durable=False)
    return [target.path / file for file in rendered]
