"""Named streams of random numbers from one seed.

Data, initialisation and order each draw from a stream of their own, so that one more draw in one of them changes
nothing in the others.
"""

from hashlib import blake2b

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers of `seed` for the purpose `name`: equal arguments, equal numbers, in every process.

    Args:
        seed: the run's seed, at least 0.
        name: what the numbers are for, such as "data" or "init".
    """
    key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))
