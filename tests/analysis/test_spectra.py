"""Effective rank and normalised eigenvalues against closed forms."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep

from analysis.spectra import effective_rank, normalised_eigenvalue, top_mass, trace_ratio


def kernels(*matrices):
    return xr.DataArray(np.stack(matrices), dims=("snapshot", "sample", "sample2"))


def rotated(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return q @ np.diag(values) @ q.T


@pytest.mark.parametrize("modes", [1, 2, 5])
def test_equal_modes_count_as_themselves(modes):
    values = np.zeros(5)
    values[:modes] = 3.0
    assert float(effective_rank(kernels(rotated(values)))[0]) == pytest.approx(modes, rel=1e-10)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 8), seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
def test_effective_rank_is_the_exponential_of_the_entropy(n, seed, scale):
    values = np.random.default_rng(seed).exponential(size=n)
    entropy = 0.0
    for value in values:
        entropy -= value / sum(values) * np.log(value / sum(values))
    matrix = rotated(values, seed)
    rank = effective_rank(kernels(matrix, scale * matrix))
    np.testing.assert_allclose(rank, np.exp(entropy), rtol=1e-9)
    assert (1 - 1e-9 <= rank).all()
    assert (rank <= n * (1 + 1e-9)).all()


def test_negative_eigenvalues_from_rounding_count_as_zero():
    assert float(effective_rank(kernels(rotated([2.0, 2.0, -1e-7])))[0]) == pytest.approx(2, rel=1e-10)


def test_a_kernel_of_zeros_and_one_that_is_not_finite_have_no_effective_rank():
    rank = effective_rank(kernels(np.zeros((2, 2)), np.full((2, 2), np.nan), np.eye(2)))
    np.testing.assert_allclose(rank, [np.nan, np.nan, 2.0], rtol=1e-12)


def test_normalised_eigenvalues_have_unit_length_over_all_modes():
    values = np.array([[4.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    normalised = normalised_eigenvalue(
        xr.DataArray(values, dims=("snapshot", "eig")), xr.DataArray(np.linalg.norm(values, axis=1), dims="snapshot")
    )
    np.testing.assert_allclose(normalised[0], values[0] / np.sqrt(21))
    assert (normalised[0] ** 2).sum() == pytest.approx(1)
    assert np.isnan(normalised[1]).all()


def test_both_stay_lazy(no_compute):
    kernel = kernels(np.eye(3), np.eye(3)).chunk(snapshot=1)
    assert effective_rank(kernel).chunks == ((1, 1),)
    assert normalised_eigenvalue(kernel[:, 0].rename(sample2="eig"), kernel[:, 0, 0]).chunks is not None


@settings(deadline=None, max_examples=10)
@given(n=st.integers(2, 5), seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
def test_shares_of_the_leading_modes_are_those_of_the_kernel(n, seed, scale):
    ds = mock_sweep(n=n, k=n, seed=seed, dtype=float, steps=(0, 1)).compute()
    scaled = ds.assign({name: scale * ds[name].variable for name in ("eigenvalue", "trace", "frobenius_norm")})
    ratios, masses = trace_ratio(scaled), top_mass(scaled)
    for t, kernel in enumerate(ds.ntk.values):
        values = sorted(np.linalg.eigvals(kernel).real, reverse=True)
        for k in range(1, n + 1):
            assert ratios.values[t, k - 1] == pytest.approx(sum(values[:k]) / sum(values), rel=1e-9)
            squares = [value**2 for value in values]
            assert masses.values[t, k - 1] == pytest.approx(sum(squares[:k]) / sum(squares), rel=1e-9)
    np.testing.assert_allclose(ratios[:, -1], 1, rtol=1e-10)
    np.testing.assert_allclose(masses[:, -1], 1, rtol=1e-10)


def test_shares_of_missing_and_zero_spectra_are_missing(exact_sweep):
    ds = exact_sweep.compute()
    ds["eigenvalue"][1] = np.nan
    ds["trace"][2] = ds["frobenius_norm"][2] = 0
    for share in (trace_ratio(ds), top_mass(ds)):
        assert np.isnan(share[[1, 2]]).all()
        assert np.isfinite(share[[0, 3]]).all()
