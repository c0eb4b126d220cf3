"""Polynomials and linear maps against closed forms, and one line of numbers that a learning-rate sweep must give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Chebyshev, OneOutlier, WhitenedLinear
from pipeline.data import load_data

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, n=st.integers(2, 60), degree=st.integers(0, 30), rest=st.booleans())
def test_chebyshev_is_a_cosine(seed, n, degree, rest):
    data = load_data(Chebyshev(n=n, degree=degree), seed, rest)
    np.testing.assert_allclose(data.y, np.cos(degree * np.arccos(data.x)), atol=1e-10)
    if rest:
        assert np.abs(data.x).max() < 1
    else:
        np.testing.assert_allclose(data.x[:, 0], [-1 + 2 * i / (n - 1) for i in range(n)], atol=1e-14)


@given(seed=seeds, d=st.integers(1, 12), more=st.integers(0, 12))
def test_whitened_inputs_have_the_identity_as_second_moment_and_one_map_for_both(seed, d, more):
    table = WhitenedLinear(n=d + more + 1, d=d)
    chosen, rest = load_data(table, seed), load_data(table, seed, rest=True)
    for data in (chosen, rest):
        np.testing.assert_allclose(data.x.T @ data.x / len(data.x), np.eye(d), atol=1e-10)
    mapping = np.linalg.lstsq(chosen.x, chosen.y)[0]
    np.testing.assert_allclose(rest.x @ mapping, rest.y, atol=1e-8)


def test_the_random_map_has_independent_normal_entries():
    data = load_data(WhitenedLinear(n=60, d=60), 0)
    mapping = data.x.T @ data.y / 60
    assert mapping.mean() == pytest.approx(0, abs=4 / 60)
    assert mapping.var() == pytest.approx(1, abs=4 * np.sqrt(2) / 60)


@given(seed=seeds, d=st.integers(2, 12), more=st.integers(0, 12), outlier=st.floats(0.1, 9), overlap=st.floats(-5, 5))
def test_one_outlier_has_its_spectrum_and_its_overlap(seed, d, more, outlier, overlap):
    n = d + more
    table = OneOutlier(n=n, d=d, outlier=outlier, overlap=overlap)
    chosen, rest = load_data(table, seed), load_data(table, seed, rest=True)
    expected = np.sort(np.append(np.linspace(1, 0.5, d - 1), outlier) ** 2)
    for data in (chosen, rest):
        np.testing.assert_allclose(np.linalg.eigvalsh(data.x.T @ data.x / n), expected, rtol=1e-9)
        assert data.y.T @ data.y == pytest.approx(n)
    beta = np.linalg.lstsq(chosen.x, chosen.y)[0]
    np.testing.assert_allclose(rest.x @ beta, rest.y, atol=1e-6)


def test_the_overlap_is_that_before_normalising():
    values, vectors = np.linalg.eigh((data := load_data(OneOutlier(data_seed=1), 0)).x @ data.x.T)
    along = vectors[:, -20:].T @ data.y[:, 0] / 10  # h, but for signs
    assert values[-1] == pytest.approx(900)
    draws = np.random.default_rng(1)
    draws.standard_normal(100 * 20 + 20 * 20)
    z = draws.standard_normal(19)
    assert abs(along[-1]) == pytest.approx(0.3 / np.sqrt(0.09 + z @ z))
    np.testing.assert_allclose(np.sort(np.abs(along[:-1])), np.sort(np.abs(z)) / np.sqrt(0.09 + z @ z))


def test_its_own_seed_takes_the_place_of_the_run_s():
    drawn = [load_data(OneOutlier(data_seed=seed), run).digest for seed, run in [(1, 0), (1, 5), (2, 0)]]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_two_layer_linear_network_on_it_ends_where_it_is_known_to():
    """Gradient descent by hand at η = 0.3: numbers of the same sweep, computed before this dataset was here."""
    data = load_data(OneOutlier(data_seed=1), 0)
    x, y, n, rate = data.x, data.y[:, 0], 100, 0.3
    gram = x @ x.T
    assert y @ gram @ y / n == pytest.approx(61.63, abs=0.005)
    assert np.linalg.norm(gram) == pytest.approx(940.8, abs=0.05)
    assert np.linalg.norm(np.linalg.lstsq(x, y)[0]) == pytest.approx(1.4393, abs=5e-5)
    draws = np.random.default_rng(3)
    a, w = (0.05 / np.sqrt(50) * draws.standard_normal(shape) for shape in (50, (50, 20)))
    for _ in range(20_000):
        residual = x @ (w.T @ a) - y
        if residual @ residual / (2 * n) < 1e-6:
            break
        back = x.T @ residual
        a, w = a - rate / n * w @ back, w - rate / n * np.outer(a, back)
    kernel = a @ a * gram + x @ w.T @ w @ x.T
    values, vectors = np.linalg.eigh(kernel)
    energy = np.cumsum((vectors[:, ::-1].T @ y) ** 2) / n
    assert values[-1] / n == pytest.approx(6.552, rel=0.01)
    assert a @ a == pytest.approx(0.7266, rel=0.01)
    assert y @ kernel @ y / (np.linalg.norm(kernel) * n) == pytest.approx(0.2582, rel=0.01)
    np.testing.assert_allclose(energy[[0, 2, 4]], [0.011, 0.985, 0.989], atol=0.001)
