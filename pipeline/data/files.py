"""The user's own arrays."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.examples import Data, draw, global_normalise, is_labels, remaining
from pipeline.errors import InputError, MissingError

# What numpy and zipfile raise on a file that is not, or is no longer, an archive of plain arrays.
_UNREADABLE = (OSError, EOFError, MemoryError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def load(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """Arrays `x` (n, *features) and `y` (n,) or (n, c) of an .npz file, which is never unpickled.

    Args:
        options: `file`, the path; `n`, a number of random examples, or None for all in order; `normalise`, "none"
            or "global".
        rng: draws the examples.
        rest: give those that were not chosen.

    Raises:
        MissingError: if there is no such file.
        InputError: if it does not hold two numeric, finite arrays of one length.
    """
    arrays = read_arrays(Path(options.file), "data.file", ("x", "y"))
    x, y = arrays["x"], arrays["y"]
    chosen = draw(len(x), options.n, rng)
    taken = remaining(len(x), chosen) if rest else chosen
    seen = global_normalise(x[taken], x[chosen]) if options.normalise == "global" else x[taken]
    return Data(seen, y[taken], taken, is_labels(y[taken]))


def read_arrays(path: Path, what: str, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `x` (n, *features) and, where there is one, `y` (n, c) of an .npz file, in float64.

    Args:
        path: the file, which is never unpickled.
        what: the option that names it, for messages.
        needed: arrays that must be there, of x and y.

    Raises:
        MissingError: if there is no such file.
        InputError: if what is needed is not there, or not numeric, finite and of one length.
    """
    if not path.exists():
        raise MissingError(f"{what} = {path}: there is no such file")
    try:
        with path.open("rb") as opened:  # numpy leaves a file open if it is not a zip
            archive = np.load(opened, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{what} = {path}: a single array; save both with numpy.savez(path, x=x, y=y)")
            absent = [name for name in needed if name not in archive]
            if absent:
                raise InputError(f"{what} = {path}: no array {' and '.join(absent)}, only {archive.files}")
            found = [name for name in ("x", "y") if name in archive]
            arrays = {name: np.asarray(archive[name]) for name in found}  # bytes if it is no array
    except _UNREADABLE as error:
        raise InputError(f"{what} = {path}: not an .npz file of plain arrays ({error})") from error
    arrays = {name: _as_numbers(name, array, f"{what} = {path}") for name, array in arrays.items()}
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or 0 in x.shape or (y is not None and (y.ndim not in (1, 2) or len(x) != len(y) or 0 in y.shape)):
        shapes = " and ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InputError(f"{what} = {path}: {shapes}: must be (n, features...) and (n,) or (n, c), not empty")
    return {name: array if name == "x" else array.reshape(len(x), -1) for name, array in arrays.items()}


def _as_numbers(name: str, array: np.ndarray, where: str) -> np.ndarray:
    """A numeric array in float64, its values all finite."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{where}: {name} has dtype {array.dtype}; it must hold real numbers")
    numbers = array.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(numbers))
    if bad:
        raise InputError(f"{where}: {name} has {bad} values that are not finite; remove those examples")
    return numbers
