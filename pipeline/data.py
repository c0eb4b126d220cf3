"""What is trained on: a registry of datasets, each a function `(options, rng, rest) -> Data`.

With `rest` a dataset gives the examples that it would not choose, seen as the network sees those that it would.
"""

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

    def arrays(self, dtype: str) -> dict[str, np.ndarray]:
        """What a store keeps of them in its group `probe`, in the dtype of the model."""
        return {"sample_index": self.sample_index, "input": self.x.astype(dtype), "target": self.y.astype(dtype)}

    @property
    def digest(self) -> str:
        """blake2b-128 over dtype, shape and little-endian bytes of x, y and sample_index."""
        state = blake2b(digest_size=16)
        for array in (self.x, self.y, self.sample_index):
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            state.update(f"{plain.dtype.str}{plain.shape}".encode())
            state.update(plain.tobytes())
        return state.hexdigest()


def load_data(options: Any, seed: int, rest: bool = False) -> Data:
    """The data of a run.

    Args:
        options: the study's data table; `options.name` is an entry of `DATASETS`.
        seed: the run's seed; draws come from its stream "data".
        rest: the examples that were not chosen, in the order of the dataset and normalised as those that were.

    Raises:
        InputError: if the options do not fit the dataset, a file cannot be used, or no example is left as the rest.
        MissingError: if a file is not there.
    """
    return DATASETS[options.name](options, stream(seed, "data"), rest)


def load_test(options: Any, seed: int, count: int) -> Data:
    """The held-out examples of a run: the first `count` of those that were not chosen.

    Args:
        options: the study's data table.
        seed: the run's seed.
        count: m.

    Raises:
        InputError: if so many are not left.
    """
    rest = load_data(options, seed, rest=True)
    if count > len(rest.x):
        raise InputError(
            f"record.test = {count}: only {len(rest.x)} examples are not trained on; hold out at most so many, or "
            "choose a smaller data.n"
        )
    return Data(rest.x[:count], rest.y[:count], rest.sample_index[:count], rest.labels)


def is_labels(y: np.ndarray) -> bool:
    """Whether targets (n, c) are class labels: one output of -1 and +1, or one-hot rows."""
    if y.shape[1] == 1:
        return bool(np.all(np.abs(y) == 1))
    return bool(np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1))


def global_normalise(x: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    """Centre each feature over the examples, then divide by ONE standard deviation.

    One for all features: a nearly constant pixel divided by its own would become huge.

    Args:
        x: (n, *features).
        by: the examples whose mean and deviation are taken; x itself by default.

    Raises:
        InputError: if all examples are equal.
    """
    known = x if by is None else by
    mean = known.mean(axis=0)
    deviation = (known - mean).std()
    if deviation == 0:
        raise InputError(f"the {len(known)} examples are all equal: normalising needs at least 2 different ones")
    return (x - mean) / deviation


def _draw(available: int, n: int | None, rng: np.random.Generator) -> np.ndarray:
    """Indices of `n` random examples without replacement, those of a smaller n first; of all in order if n is None."""
    if n is None:
        return np.arange(available, dtype=np.int64)
    if n > available:
        raise InputError(f"data.n = {n}: the dataset has {available} examples, choose at most so many")
    return rng.permutation(available)[:n].astype(np.int64)


def _rest(available: int, chosen: np.ndarray) -> np.ndarray:
    """Indices of the examples that were not chosen."""
    left = np.setdiff1d(np.arange(available, dtype=np.int64), chosen)
    if not len(left):
        raise InputError(
            f"all {available} examples were chosen, so none is left: give others in a file, or choose a smaller data.n"
        )
    return left


# --- digits ----------------------------------------------------------------------------------------------------------

DIGIT_TARGETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "digit<5": lambda digit: digit < 5,
    "parity": lambda digit: digit % 2 == 0,
}


def digits(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as a two-class task.

    Args:
        options: `n`, the number of random examples; `target`, one of `DIGIT_TARGETS`, which is +1 where it holds
            and -1 elsewhere.
        rng: draws the examples.
        rest: give those that were not chosen.

    Returns:
        x (n, 64), globally normalised over the chosen examples, and y (n, 1).

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this dataset needs it

    x, digit = load_digits(return_X_y=True)
    chosen = _draw(len(x), options.n, rng)
    taken = _rest(len(x), chosen) if rest else chosen
    y = np.where(DIGIT_TARGETS[options.target](digit[taken]), 1.0, -1.0)[:, None]
    return Data(global_normalise(x[taken], x[chosen]), y, taken, labels=True)


# --- the user's own arrays -------------------------------------------------------------------------------------------


def file(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
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
    chosen = _draw(len(x), options.n, rng)
    taken = _rest(len(x), chosen) if rest else chosen
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


DATASETS: dict[str, Callable[[Any, np.random.Generator, bool], Data]] = {"digits": digits, "file": file}
