"""What every dataset gives, and the steps that several of them share."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from pipeline.errors import InputError


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


def draw(available: int, n: int | None, rng: np.random.Generator) -> np.ndarray:
    """Indices of `n` random examples without replacement, those of a smaller n first; of all in order if n is None."""
    if n is None:
        return np.arange(available, dtype=np.int64)
    if n > available:
        raise InputError(f"data.n = {n}: the dataset has {available} examples, choose at most so many")
    return rng.permutation(available)[:n].astype(np.int64)


def remaining(available: int, chosen: np.ndarray) -> np.ndarray:
    """Indices of the examples that were not chosen."""
    left = np.setdiff1d(np.arange(available, dtype=np.int64), chosen)
    if not len(left):
        raise InputError(
            f"all {available} examples were chosen, so none is left: give others in a file, or choose a smaller data.n"
        )
    return left


def class_targets(label: np.ndarray, classes: int) -> np.ndarray:
    """Targets of whole-number labels (n,) from 0 on: 2 label - 1 (n, 1) for two classes, else one-hot rows (n, c)."""
    return 2.0 * label[:, None] - 1 if classes == 2 else np.eye(classes)[label]


def generated(x: np.ndarray, y: np.ndarray, rest: bool, labels: bool) -> Data:
    """Examples of a law rather than of a table: numbered 0 to n-1, and the fresh ones of the rest n to 2n-1."""
    return Data(x, y, np.arange(len(x), dtype=np.int64) + rest * len(x), labels)
