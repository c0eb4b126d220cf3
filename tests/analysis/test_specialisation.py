"""Specialisation against loops, a closed form and its invariances."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.specialisation import specialisation

shapes = st.fixed_dictionaries({"n": st.integers(2, 5), "c": st.integers(2, 3), "seed": st.integers(0, 2**31)})


def outputs(n, c, seed, rows=2):
    """Positive semidefinite kernels of all pairs of outputs, and targets."""
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((rows, n, c, 2 * n * c))
    return dataset(np.einsum("sicp,sjdp->sicjd", j, j), rng.standard_normal((rows, n, c)))


def dataset(kernels, targets):
    return xr.Dataset({
        "ntk_full": (("snapshot", "sample", "output", "sample2", "output2"), kernels),
        "target": (("snapshot", "sample", "output"), targets),
    })  # fmt: skip


def aligned(kernel, y):
    """A_cc' by loops."""
    n, c = y.shape
    found = np.zeros((c, c))
    for a in range(c):
        norm = np.sqrt(sum(kernel[i, a, j, a] ** 2 for i in range(n) for j in range(n)))
        for b in range(c):
            power = sum(y[i, b] * kernel[i, a, j, a] * y[j, b] for i in range(n) for j in range(n))
            found[a, b] = power / norm / sum(y[i, b] ** 2 for i in range(n))
    return found


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_it_agrees_with_loops(shape):
    ds = outputs(**shape)
    result = specialisation(ds)
    for t in range(2):
        expected = aligned(ds.ntk_full.values[t], ds.target.values[t])
        np.testing.assert_allclose(result.class_alignment[t], expected, rtol=1e-11)
        for a in range(shape["c"]):
            others = [expected[a, b] for b in range(shape["c"]) if b != a]
            assert result.specialisation.values[t, a] == pytest.approx(expected[a, a] / np.mean(others))


def test_kernels_made_of_their_own_target_are_specialised():
    """K_cc = y_c y_cᵀ + ε I, orthogonal targets of length 2: A_cc = (4 + ε)/‖K_cc‖, A_cc' = ε/‖K_cc‖."""
    y = 2 * np.eye(4)[:, :3]
    kernel = np.zeros((4, 3, 4, 3))
    for a in range(3):
        kernel[:, a, :, a] = np.outer(y[:, a], y[:, a]) + 0.5 * np.eye(4)
    result = specialisation(dataset(kernel[None], y[None]))
    np.testing.assert_allclose(result.specialisation, 9, rtol=1e-12)
    np.testing.assert_allclose(result.class_alignment[0].values.diagonal(), 4.5 / np.sqrt(4.5**2 + 3 * 0.5**2))


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_scales_of_outputs_and_the_order_of_examples_do_not_matter(shape):
    ds = outputs(**shape)
    rng = np.random.default_rng(shape["seed"])
    order = rng.permutation(shape["n"])
    j, y = rng.uniform(0.1, 10, (2, shape["c"]))
    moved = ds.isel(sample=order, sample2=order)
    kernel = moved.ntk_full * xr.DataArray(j, dims="output") * xr.DataArray(j, dims="output2")
    moved = moved.assign(ntk_full=kernel, target=moved.target * xr.DataArray(y, dims="output"))
    xr.testing.assert_allclose(specialisation(moved), specialisation(ds), rtol=1e-10)


def test_a_single_output_has_nobody_to_differ_from():
    result = specialisation(outputs(4, 1, seed=0))
    assert np.isfinite(result.class_alignment).all()
    assert np.isnan(result.specialisation).all()


@pytest.mark.parametrize("lazy", [False, True], ids=["numpy", "dask"])
def test_zeros_are_missing_values_not_warnings(lazy):
    ds = outputs(3, 2, seed=0)
    ds["ntk_full"][0, :, 0, :, 0] = 0
    ds["target"][1, :, 1] = 0
    result = specialisation(ds.chunk(snapshot=1) if lazy else ds).compute()
    np.testing.assert_array_equal(np.isnan(result.class_alignment[0]), [[True, True], [False, False]])
    np.testing.assert_array_equal(np.isnan(result.class_alignment[1]), [[False, True], [False, True]])
    np.testing.assert_array_equal(np.isnan(result.specialisation), [[True, False], [True, True]])
