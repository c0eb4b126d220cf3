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
from pipeline.seeds import stream

__all__ = ["DATASETS", "Data", "is_labels", "load_data", "needs_download", "read_arrays"]


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
