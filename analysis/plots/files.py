"""Figures as files: the same bytes for the same figure, each file there when it is whole."""

import os
from collections.abc import Sequence
from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis.plots.drawing import STYLE, odd_glyphs
from pipeline.disk import Location, door, location
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
    with mpl.rc_context({**STYLE, "svg.hashsalt": "ntk-eos"}), odd_glyphs():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def save(
    figure: Figure, folder: str | os.PathLike[str], name: str, formats: Sequence[str] = ("png", "svg")
) -> list[Location]:
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
    rendered = {location(folder) / f"{name}.{kind}": render(figure, kind) for kind in formats}
    for path, data in rendered.items():
        write(path, data)
    return list(rendered)


def write(path: Location, data: bytes) -> None:
    """Put a whole file in its place at once, folders included.

    Raises:
        InputError: if the file system refuses.
    """
    folder = door(path.parent)
    folder.make()
    try:
        folder.put(path.name, data, durable=False)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a file that you may write") from error
