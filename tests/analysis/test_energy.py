"""The energy of a target against loops, eigenvectors and its invariances."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, with_values

from analysis.energy import energy
from pipeline.errors import InputError


@settings(deadline=None, max_examples=10)
@given(n=st.integers(2, 6), c=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_it_agrees_with_loops_on_either_input(n, c, seed):
    ds = mock_sweep(n=n, c=c, k=1, seed=seed, dtype=float, steps=(0, 1)).compute()
    from_scalars, from_kernel = energy(ds.drop_vars("ntk")), energy(ds.drop_vars("target_energy"))
    for t in range(ds.sizes["snapshot"]):
        kernel, y = ds.ntk.values[t], ds.target.values[t]
        form = sum(y[i, a] * kernel[i, j] * y[j, a] for a in range(c) for i in range(n) for j in range(n))
        expected = form / sum(value**2 for value in y.ravel())
        assert from_scalars.values[t] == pytest.approx(expected, rel=1e-10)
        assert from_kernel.values[t] == pytest.approx(expected, rel=1e-10)


def test_an_eigenvector_has_the_energy_of_its_eigenvalue(exact_sweep):
    for i in range(6):
        found = energy(exact_sweep, exact_sweep.eigenvector.isel(eig=[i]).rename(eig="output"))
        np.testing.assert_allclose(found, exact_sweep.eigenvalue[:, i], rtol=1e-10)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), target_scale=st.floats(1e-3, 1e3))
def test_it_grows_with_the_kernel_alone_and_lies_within_the_spectrum(seed, scale, target_scale):
    ds = mock_sweep(n=5, c=2, k=5, seed=seed, dtype=float, steps=(0, 1)).compute().drop_vars("target_energy")
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((5, 5)))[0][rng.permutation(5)]
    moved = with_values(ds, ntk=scale * q @ ds.ntk.values @ q.T, target=-target_scale * q @ ds.target.values)
    np.testing.assert_allclose(energy(moved), scale * energy(ds), rtol=1e-9)
    assert (energy(ds) <= ds.eigenvalue[:, 0] * (1 + 1e-12)).all()
    assert (energy(ds) >= ds.eigenvalue[:, -1] * (1 - 1e-12)).all()


def test_a_target_of_zeros_has_none(exact_sweep):
    assert np.isnan(energy(exact_sweep, xr.zeros_like(exact_sweep.target))).all()


def test_another_function_needs_the_kernel(sweep):
    with pytest.raises(InputError, match=r"energy of another function needs `ntk`.* with snapshots"):
        energy(sweep.drop_vars("ntk"), sweep.target)
