"""Scikit-learn's handwritten digits."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.data.examples import Data, class_targets, draw, global_normalise, remaining

TWO_CLASSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "digit<5": lambda digit: digit < 5,
    "parity": lambda digit: digit % 2 == 0,
}


def load(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

    Args:
        options: `n`, the number of random examples; `target`, what is to be told: one of `TWO_CLASSES`, +1 where it
            holds and -1 elsewhere; "ten", one-hot; or a pair such as "3 vs 8", +1 for the first and -1 for the
            second, of which alone the examples are then; `layout`, "image" or None.
        rng: draws the examples.
        rest: give those that were not chosen.

    Returns:
        x (n, 64), or (n, 1, 8, 8) as images, globally normalised over the chosen examples, and y (n, 1) or (n, 10).

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this dataset needs it

    x, digit = load_digits(return_X_y=True)
    if options.target == "ten":
        y, known = class_targets(digit, 10), np.arange(len(x))
    elif options.target in TWO_CLASSES:
        y, known = class_targets(TWO_CLASSES[options.target](digit), 2), np.arange(len(x))
    else:
        first, second = map(int, options.target.split(" vs "))
        y, known = class_targets(digit == first, 2), np.flatnonzero((digit == first) | (digit == second))
    chosen = draw(len(known), options.n, rng)
    taken = known[remaining(len(known), chosen) if rest else chosen]
    seen = global_normalise(x[taken], x[known[chosen]])
    return Data(seen.reshape(-1, 1, 8, 8) if options.layout == "image" else seen, y[taken], taken, labels=True)
