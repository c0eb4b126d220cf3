"""What is trained on: a registry of datasets, each a function `(options, rng, rest) -> Data`.

With `rest` a dataset gives examples that a run is not trained on, seen as the network sees those that it is: those that
were not chosen, the official test set, or as many fresh ones of the same law.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.data import cifar10, digits, files, patterns, regression
from pipeline.data.examples import Data, is_labels
from pipeline.data.files import read_arrays
from pipeline.errors import InputError
from pipeline.seeds import stream

__all__ = ["DATASETS", "Data", "is_labels", "load_data", "load_test", "needs_download", "read_arrays"]


def load_data(options: Any, seed: int, rest: bool = False) -> Data:
    """The data of a run.

    Args:
        options: the study's data table; `options.name` is an entry of `DATASETS`.
        seed: the run's seed; draws come from its stream "data".
        rest: the examples that the run is not trained on, normalised as those that it is.

    Raises:
        InputError: if the options do not fit the dataset, a file cannot be used, or no example is left as the rest.
        MissingError: if a file is not there.
    """
    return DATASETS[options.name](options, stream(seed, "data"), rest)


def load_test(options: Any, seed: int, count: int) -> Data:
    """The held-out examples of a run: the first `count` of those that it is not trained on.

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


def needs_download(options: Any) -> bool:
    """Whether `load_data` would first fetch a file from the network."""
    return options.name == "cifar10" and not cifar10.is_here()


DATASETS: dict[str, Callable[[Any, np.random.Generator, bool], Data]] = {
    "digits": digits.load,
    "cifar10": cifar10.load,
    "chebyshev": regression.chebyshev,
    "whitened_linear": regression.whitened_linear,
    "one_outlier": regression.one_outlier,
    "patterns1d": patterns.load,
    "file": files.load,
}
