"""What is trained on: a registry of datasets, each a function `(options, rng) -> Data`."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError, MissingError
from pipeline.seeds import stream

# What numpy and zipfile raise on a file that is not, or is no longer, an archive of plain arrays.
_UNREADABLE = (OSError, EOFError, MemoryError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Data:
    """Examples and targets of a run.

    Attributes:
        x: (n, *features) float64, as the network sees it.
        y: (n, c) float64, as the loss sees it.
        sample_index: (n,) int64, the row of the dataset that each example came from.
        labels: whether the targets are class labels, so that there is an accuracy.
    """

    x: np.ndarray
    y: np.ndarray
    sample_index: np.ndarray
    labels: bool

    @property
    def digest(self) -> str:
        """blake2b-128 over dtype, shape and little-endian bytes of x, y and sample_index."""
        state = blake2b(digest_size=16)
        for array in (self.x, self.y, self.sample_index):
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            state.update(f"{plain.dtype.str}{plain.shape}".encode())
            state.update(plain.tobytes())
        return state.hexdigest()


def load_data(options: Any, seed: int) -> Data:
    """The data of a run.

    Args:
        options: the study's data table; `options.name` is an entry of `DATASETS`.
        seed: the run's seed; draws come from its stream "data".

    Raises:
        InputError: if the options do not fit the dataset, or a file cannot be used.
        MissingError: if a file is not there.
    """
    return DATASETS[options.name](options, stream(seed, "data"))


def is_labels(y: np.ndarray) -> bool:
    """Whether targets (n, c) are class labels: one output of -1 and +1, or one-hot rows."""
    if y.shape[1] == 1:
        return bool(np.all(np.abs(y) == 1))
    return bool(np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1))


def global_normalise(x: np.ndarray) -> np.ndarray:
    """Centre each feature over the examples, then divide by ONE standard deviation.

    One for all features: a nearly constant pixel divided by its own would become huge.

    Raises:
        InputError: if all examples are equal.
    """
    centred = x - x.mean(axis=0)
    deviation = centred.std()
    if deviation == 0:
        raise InputError(f"the {len(x)} examples are all equal: normalising needs at least 2 different ones")
    return centred / deviation


def _draw(available: int, n: int | None, rng: np.random.Generator) -> np.ndarray:
    """Indices of `n` random examples without replacement, those of a smaller n first; of all in order if n is None."""
    if n is None:
        return np.arange(available, dtype=np.int64)
    if n > available:
        raise InputError(f"data.n = {n}: the dataset has {available} examples, choose at most so many")
    return rng.permutation(available)[:n].astype(np.int64)


# --- digits ----------------------------------------------------------------------------------------------------------

DIGIT_TARGETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "digit<5": lambda digit: digit < 5,
    "parity": lambda digit: digit % 2 == 0,
}


def digits(options: Any, rng: np.random.Generator) -> Data:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as a two-class task.

    Args:
        options: `n`, the number of random examples; `target`, one of `DIGIT_TARGETS`, which is +1 where it holds
            and -1 elsewhere.
        rng: draws the examples.

    Returns:
        x (n, 64), globally normalised over the n examples, and y (n, 1).

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this dataset needs it

    x, digit = load_digits(return_X_y=True)
    chosen = _draw(len(x), options.n, rng)
    y = np.where(DIGIT_TARGETS[options.target](digit[chosen]), 1.0, -1.0)[:, None]
    return Data(global_normalise(x[chosen]), y, chosen, labels=True)


# --- the user's own arrays -------------------------------------------------------------------------------------------


def file(options: Any, rng: np.random.Generator) -> Data:
    """Arrays `x` (n, *features) and `y` (n,) or (n, c) of an .npz file, which is never unpickled.

    Args:
        options: `file`, the path; `n`, a number of random examples, or None for all in order; `normalise`, "none"
            or "global".
        rng: draws the examples.

    Raises:
        MissingError: if there is no such file.
        InputError: if it does not hold two numeric, finite arrays of one length.
    """
    x, y = _read_arrays(Path(options.file))
    chosen = _draw(len(x), options.n, rng)
    x, y = x[chosen], y[chosen]
    return Data(global_normalise(x) if options.normalise == "global" else x, y, chosen, is_labels(y))


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays x (n, *features) and y (n, c) of `path` in float64."""
    if not path.exists():
        raise MissingError(f"data.file = {path}: there is no such file")
    try:
        with path.open("rb") as opened:  # numpy leaves a file open if it is not a zip
            archive = np.load(opened, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"data.file = {path}: a single array; save both with numpy.savez(path, x=x, y=y)")
            absent = [name for name in ("x", "y") if name not in archive]
            if absent:
                raise InputError(f"data.file = {path}: no array {' and '.join(absent)}, only {archive.files}")
            arrays = {name: np.asarray(archive[name]) for name in ("x", "y")}  # bytes if it is no array
    except _UNREADABLE as error:
        raise InputError(f"data.file = {path}: not an .npz file of plain arrays ({error})") from error
    x, y = (_as_numbers(name, array, path) for name, array in arrays.items())
    if x.ndim < 2 or y.ndim not in (1, 2) or len(x) != len(y) or 0 in x.shape + y.shape:
        shapes = f"x {x.shape} and y {y.shape}"
        raise InputError(f"data.file = {path}: {shapes}: must be (n, features...) and (n,) or (n, c), not empty")
    return x, y.reshape(len(y), -1)


def _as_numbers(name: str, array: np.ndarray, path: Path) -> np.ndarray:
    """A numeric array in float64, its values all finite."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"data.file = {path}: {name} has dtype {array.dtype}; it must hold real numbers")
    numbers = array.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(numbers))
    if bad:
        raise InputError(f"data.file = {path}: {name} has {bad} values that are not finite; remove those examples")
    return numbers


DATASETS: dict[str, Callable[[Any, np.random.Generator], Data]] = {"digits": digits, "file": file}
