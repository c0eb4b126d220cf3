"""The leading eigenspace against loops, projections and its invariances."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, with_values

from analysis.eigenspace import eigenspace, eigenspace_overlap
from analysis.rows import runs_of

shapes = st.fixed_dictionaries({"n": st.integers(2, 5), "c": st.integers(1, 3), "seed": st.integers(0, 2**31)})


def exact(n, c, seed):
    """All eigenpairs in float64, predictions at random."""
    ds = mock_sweep(n=n, c=c, k=n, seed=seed, dtype=float, steps=(0, 1, 10)).compute()
    return with_values(ds, prediction=np.random.default_rng(seed).standard_normal(ds.prediction.shape))


def held(vectors, function):
    """‖V_kᵀ f‖² / ‖f‖² for every k, by loops."""
    found, total = [], 0.0
    for v in vectors.T:
        for column in function.T:
            total += sum(v[i] * column[i] for i in range(len(v))) ** 2
        found.append(total / sum(value**2 for value in function.ravel()))
    return found


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_what_the_eigenspace_holds_agrees_with_loops(shape):
    ds = exact(**shape)
    result = eigenspace(ds)
    for t in range(ds.sizes["snapshot"]):
        f, y, vectors = (ds[name].values[t] for name in ("prediction", "target", "eigenvector"))
        np.testing.assert_allclose(result.prediction_in_eigenspace[t], held(vectors, f), atol=1e-12)
        np.testing.assert_allclose(result.residual_in_eigenspace[t], held(vectors, f - y), atol=1e-12)
    np.testing.assert_allclose(result.isel(eig=-1).to_dataarray(), 1, rtol=1e-10)


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_overlap_is_the_trace_of_the_product_of_projectors(shape):
    ds = exact(**shape)
    result = eigenspace_overlap(ds)
    vectors = ds.eigenvector.values
    for rows in runs_of(ds).rows:
        for position, t in enumerate(rows):
            others = {"first": rows[0], "last": rows[-1]}
            if position + 1 < len(rows):
                others["following"] = rows[position + 1]
            else:
                assert np.isnan(result.overlap_following[t]).all()
            for name, u in others.items():
                for k in range(1, shape["n"] + 1):
                    one, other = (vectors[row][:, :k] @ vectors[row][:, :k].T for row in (t, u))
                    found = result[f"overlap_{name}"].values[t, k - 1]
                    assert found == pytest.approx(np.trace(one @ other) / k, abs=1e-12)
    assert np.allclose(result.overlap_first.isel(eig=-1), 1)


@settings(deadline=None, max_examples=10)
@given(shapes, st.integers(1, 5), st.floats(0.1, 10))
def test_signs_rotations_scales_and_bases_do_not_matter(shape, k, scale):
    ds, n = exact(**shape), shape["n"]
    k = min(k, n)
    rng = np.random.default_rng(shape["seed"])

    def orthogonal(size):
        return np.linalg.qr(rng.standard_normal((size, size)))[0]

    basis = orthogonal(n)[rng.permutation(n)]
    mixed = np.stack([basis @ np.hstack([v[:, :k] @ orthogonal(k), -v[:, k:]]) for v in ds.eigenvector.values])
    moved = with_values(
        ds,
        eigenvector=mixed,
        prediction=scale * basis @ ds.prediction.values,
        target=scale * basis @ ds.target.values,
    )
    for measure in (eigenspace, eigenspace_overlap):
        beyond = slice(k - 1, None)
        expected, found = (measure(one).isel(eig=beyond) for one in (ds, moved))
        xr.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_a_function_of_two_modes_is_held_by_two():
    ds = exact(5, 1, seed=3)
    f = 0.6 * ds.eigenvector.values[..., :1] + 0.8 * ds.eigenvector.values[..., 1:2]
    shares = eigenspace(with_values(ds, prediction=f)).prediction_in_eigenspace
    np.testing.assert_allclose(shares, np.broadcast_to([0.36, 1, 1, 1, 1], shares.shape), rtol=1e-12)


def test_a_network_that_fits_its_target_has_no_residual_to_hold(exact_sweep):
    ds = exact_sweep.assign(prediction=exact_sweep.target.variable)
    result = eigenspace(ds).compute()
    assert np.isnan(result.residual_in_eigenspace).all()
    assert np.isfinite(result.prediction_in_eigenspace).all()


def test_missing_eigenvectors_stay_missing(exact_sweep):
    ds = exact_sweep.compute()
    ds["eigenvector"][1] = np.nan
    assert np.isnan(eigenspace(ds).prediction_in_eigenspace[1]).all()
    overlap = eigenspace_overlap(ds)
    assert np.isnan(overlap.overlap_following[:2]).all()
    assert np.isfinite(overlap.overlap_first[[0, 2, 3]]).all()
