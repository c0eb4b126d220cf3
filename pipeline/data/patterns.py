"""Generated signals that differ in a motif, wherever it is."""

from typing import Any

import numpy as np

from pipeline.data.examples import Data, class_targets, generated


def load(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """Noisy signals with one motif each, at a random place and with a random sign; the class is which motif.

        x_i(t) = s_i m_{k_i}(t - p_i) + σ ε_i(t)        m_k(u) = √2 cos(π (k + 1) (2u + 1) / 2w),  0 <= u < w = L/4

    and m_k = 0 outside, with class k_i uniform on 0 ... c-1, sign s_i = ±1, place p_i uniform on 0 ... L-w and ε_i(t)
    ~ N(0, 1), all independent. The motifs are orthogonal, of mean 0 and mean square 1 over their w samples. By the
    sign, the mean of every class is 0, so no linear function of x tells classes apart: what does has to be learned.

    Args:
        options: `n`; `length`, L, at least 4 (c + 1); `classes`, c; `noise`, σ.
        rng: draws k, s, p and ε.
        rest: give n signals that are drawn after these.

    Returns:
        x (n, 1, L), one channel, and y (n, 1) of -1 and +1 for two classes, else one-hot (n, c).
    """
    if rest:
        _signals(options, rng)
    x, label = _signals(options, rng)
    return generated(x, class_targets(label, options.classes), rest, labels=True)


def _signals(options: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Signals (n, 1, L) and their classes (n,)."""
    n, width = options.n, options.length // 4
    label = rng.integers(options.classes, size=n)
    sign = rng.choice([-1.0, 1.0], n)
    u = np.arange(options.length) - rng.integers(options.length - width + 1, size=n)[:, None]
    motif = np.sqrt(2) * np.cos(np.pi * (label[:, None] + 1) * (2 * u + 1) / (2 * width))
    clean = sign[:, None] * np.where((u >= 0) & (u < width), motif, 0)
    return (clean + options.noise * rng.standard_normal(clean.shape))[:, None], label
