"""The sharpness gap, and its bound on two-layer linear networks whose Hessian is taken by finite differences."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_store import mock_store
from mock_sweep import with_values

from analysis import join, open_sweep
from analysis.sharpness import gap_bound, sharpness_gap

shapes = st.fixed_dictionaries({
    "n": st.integers(1, 6), "d": st.integers(1, 3), "m": st.integers(1, 3), "c": st.integers(1, 2),
    "seed": st.integers(0, 2**31),
})  # fmt: skip


def hessian_and_ntk(x, y, w, a, width=1e-4):
    """Of f = X Wᵀ A and L = ‖f - y‖²/(2n): Hessian by central differences of the gradient, NTK from the Jacobian."""
    n, (m, d), c = len(x), w.shape, a.shape[1]

    def jacobian(theta):
        w, a = theta[: m * d].reshape(m, d), theta[m * d :].reshape(m, c)
        by_w = np.einsum("nd,mc->ncmd", x, a).reshape(n * c, m * d)
        by_a = np.einsum("nm,ce->ncme", x @ w.T, np.eye(c)).reshape(n * c, m * c)
        return np.hstack([by_w, by_a]), (x @ w.T @ a - y).reshape(-1)

    def gradient(theta):
        j, r = jacobian(theta)
        return j.T @ r / n

    theta = np.concatenate([w.ravel(), a.ravel()])
    columns = [(gradient(theta + e) - gradient(theta - e)) / (2 * width) for e in width * np.eye(len(theta))]
    hessian = np.stack(columns)
    j, _ = jacobian(theta)
    return (hessian + hessian.T) / 2, j @ j.T


def problem(n, d, m, c, seed):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) for size in ((n, d), (n, c), (m, d), (m, c)))


def bound_of(x, y, f):
    arrays = (xr.DataArray(array, dims=("sample", dim)) for array, dim in ((x, "pixel"), (y, "output"), (f, "output")))
    return gap_bound(*arrays).item()


@settings(deadline=None, max_examples=25)
@given(shapes)
def test_the_gap_of_a_two_layer_linear_network_is_bounded(shape):
    x, y, w, a = problem(**shape)
    hessian, kernel = hessian_and_ntk(x, y, w, a)
    gap = np.linalg.eigvalsh(hessian)[-1] - np.linalg.eigvalsh(kernel)[-1] / len(x)
    f = x @ w.T @ a
    assert bound_of(x, y, f) == pytest.approx(np.linalg.norm(x.T @ (f - y), 2) / len(x), rel=1e-9, abs=1e-12)
    assert abs(gap) <= bound_of(x, y, f) + 1e-6


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_without_weights_the_bound_is_attained(shape):
    """K = 0, and the Hessian is the coupling alone."""
    x, y, w, a = problem(**shape)
    hessian, kernel = hessian_and_ntk(x, y, 0 * w, 0 * a)
    assert not kernel.any()
    assert np.linalg.eigvalsh(hessian)[-1] == pytest.approx(bound_of(x, y, 0 * y), rel=1e-7)


@settings(deadline=None, max_examples=10)
@given(shapes, st.floats(0.1, 10))
def test_the_bound_sees_no_orthogonal_change_and_grows_with_the_inputs(shape, scale):
    x, y, w, a = problem(**shape)
    f, rng = x @ w.T @ a, np.random.default_rng(shape["seed"])
    q, order = np.linalg.qr(rng.standard_normal((shape["d"], shape["d"])))[0], rng.permutation(len(x))
    moved = bound_of(scale * (x @ q)[order], y[order], f[order])
    assert moved == pytest.approx(scale * bound_of(x, y, f), rel=1e-9)


def test_the_bound_of_a_run_has_one_value_per_row(tmp_path):
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0], steps=6, n=5, c=2, k=2)
    ds = open_sweep(tmp_path, "spectra")
    probe = xr.open_zarr(tmp_path / "runs" / "lr-0.1_seed-0.zarr", group="probe")
    found = gap_bound(probe.input, ds.target, ds.prediction)
    assert found.chunks is not None
    assert found.attrs.keys() == {"long_name", "units", "description"}
    x, y, f = (array.values.astype(float) for array in (probe.input, ds.target, ds.prediction))
    np.testing.assert_allclose(found, [np.linalg.norm(x.T @ (f[t] - y[t]), 2) / 5 for t in range(len(f))], rtol=1e-6)
    assert set(found.coords) >= {"step", "run", "status"}


def test_images_are_vectors_of_pixels():
    rng = np.random.default_rng(0)
    image = xr.DataArray(rng.standard_normal((4, 2, 3)), dims=("sample", "row", "column"))
    y = xr.DataArray(rng.standard_normal((4, 2)), dims=("sample", "output"))
    assert gap_bound(image, y, 0 * y).item() == pytest.approx(
        bound_of(image.values.reshape(4, 6), y.values, 0 * y.values)
    )


def test_what_is_not_finite_has_no_bound():
    assert np.isnan(bound_of(np.ones((2, 1)), np.zeros((2, 1)), np.array([[np.nan], [1.0]])))


def test_the_gap_is_the_difference_on_the_rows_that_have_both(tmp_path):
    mock_store(tmp_path, seeds=[0], steps=15, n=5, k=2)
    hessian, scalars = open_sweep(tmp_path, "hessian"), open_sweep(tmp_path, "scalars")
    raised = with_values(hessian, hessian_eigenvalue=hessian.hessian_eigenvalue + 0.5 * hessian.step)
    result = sharpness_gap(join(raised, scalars)).compute()
    np.testing.assert_array_equal(result.step, [0, 10, 15, 0, 10, 15])
    np.testing.assert_allclose(result.sharpness_gap, 0.5 * result.step, atol=1e-12)
    np.testing.assert_array_equal(result.hessian_sharpness, raised.hessian_eigenvalue[:, 0])
