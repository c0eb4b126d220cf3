"""Signals with a motif: what is in them without noise, and that nothing linear tells them apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Patterns1d
from pipeline.data import load_data


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5), length=st.integers(24, 40), rest=st.booleans())
def test_without_noise_a_signal_is_its_class_s_motif_somewhere(seed, classes, length, rest):
    data = load_data(Patterns1d(n=4, classes=classes, length=length, noise=0.0), seed, rest)
    label = (data.y[:, 0] + 1) / 2 if classes == 2 else data.y.argmax(1)
    width = length // 4
    for signal, one in zip(data.x[:, 0], label, strict=True):
        motif = np.array([np.sqrt(2) * np.cos(np.pi * (one + 1) * (u + 0.5) / width) for u in range(width)])
        assert np.mean(motif**2) == pytest.approx(1)
        assert motif.mean() == pytest.approx(0, abs=1e-12)
        places = [np.pad(motif, (place, length - width - place)) for place in range(length - width + 1)]
        assert min(np.abs(signal - sign * place).max() for place in places for sign in (1, -1)) < 1e-12


def test_classes_signs_places_and_noise_have_their_laws():
    table = Patterns1d(n=20_000, classes=4, noise=0.5)
    data = load_data(table, 0)
    close = 5 / np.sqrt(20_000)
    assert np.abs(data.y.mean(0) - 1 / 4).max() < close
    clean, noisy = load_data(table.model_copy(update={"noise": 0.0}), 0).x, data.x
    assert (noisy - clean).std() == pytest.approx(0.5, rel=close)
    assert np.abs(clean.mean(0)).max() < close * clean.std(0).max()
    first = (clean[:, 0] != 0).argmax(1)
    counts = np.bincount(first, minlength=25)
    assert len(counts) == 25
    assert counts.min() > 0.75 * 20_000 / 25
    assert counts.max() < 1.25 * 20_000 / 25


def test_no_linear_function_tells_the_classes_apart_but_a_quadratic_one_does():
    train, test = (load_data(Patterns1d(n=1000, length=16), 0, rest) for rest in (False, True))

    def accuracy(features):
        weights = np.linalg.lstsq(features(train), train.y)[0]
        return np.mean(np.sign(features(test) @ weights) == test.y)

    products = np.triu_indices(16)
    assert accuracy(lambda data: data.x[:, 0]) < 0.55
    assert accuracy(lambda data: (data.x[:, 0, :, None] * data.x[:, 0, None])[:, *products]) > 0.9
