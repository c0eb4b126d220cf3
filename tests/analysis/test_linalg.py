"""Stacked linear algebra against loops and closed forms."""

import tracemalloc

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import linalg

shapes = st.fixed_dictionaries({
    "s": st.integers(1, 4), "n": st.integers(1, 7), "c": st.integers(1, 3), "seed": st.integers(0, 2**31),
})  # fmt: skip


def stacks(s, n, c, seed, dtype=np.float64):
    """Symmetric kernels (s, n, n) and targets (s, n, c)."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((s, n, n))
    kernel = xr.DataArray((a + a.swapaxes(1, 2)).astype(dtype), dims=("snapshot", "sample", "sample2"))
    return kernel, xr.DataArray(rng.standard_normal((s, n, c)).astype(dtype), dims=("snapshot", "sample", "output"))


def products_by_loops(kernel, y):
    """Σ_c Σ_ij y_ic K_ij y_jc per row."""
    out = []
    for matrix, columns in zip(kernel.values.astype(float), y.values.astype(float), strict=True):
        total = 0.0
        for i in range(len(matrix)):
            for j in range(len(matrix)):
                for c in range(columns.shape[1]):
                    total += columns[i, c] * matrix[i, j] * columns[j, c]
        out.append(total)
    return out


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_frobenius_product_is_the_trace_of_the_transposed_product(shape):
    a, _ = stacks(**shape)
    b, _ = stacks(**shape | {"seed": shape["seed"] + 1})
    expected = [np.trace(x.T @ y) for x, y in zip(a.values, b.values, strict=True)]
    np.testing.assert_allclose(linalg.frobenius_product(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(linalg.frobenius_norm(a), [np.linalg.norm(x) for x in a.values], rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_centring_is_the_projection_on_both_sides(shape):
    kernel, _ = stacks(**shape)
    n = shape["n"]
    p = np.eye(n) - np.ones((n, n)) / n
    np.testing.assert_allclose(linalg.centre(kernel), [p @ k @ p for k in kernel.values], atol=1e-12)


def test_centring_leaves_its_input_alone():
    kernel, _ = stacks(2, 3, 1, seed=0)
    before = kernel.copy(deep=True)
    linalg.centre(kernel)
    xr.testing.assert_identical(kernel, before)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_quadratic_form_sums_over_outputs(shape):
    kernel, y = stacks(**shape)
    np.testing.assert_allclose(linalg.quadratic_form(kernel, y), products_by_loops(kernel, y), atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_norms_of_targets(shape):
    _, y = stacks(**shape)
    np.testing.assert_allclose(linalg.squared_norm(y), [np.linalg.norm(row) ** 2 for row in y.values], rtol=1e-12)
    np.testing.assert_allclose(linalg.outer_norm(y), [np.linalg.norm(row @ row.T) for row in y.values], rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_squared_projections_sum_over_outputs(shape):
    kernel, y = stacks(**shape)
    vectors = kernel.rename(sample2="eig")
    expected = [
        [sum((v @ columns[:, c]) ** 2 for c in range(shape["c"])) for v in matrix.T]
        for matrix, columns in zip(vectors.values, y.values, strict=True)
    ]
    projected = linalg.squared_projections(vectors, y)
    assert projected.dims == ("snapshot", "eig")
    np.testing.assert_allclose(projected, expected, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_eigenvalues_descend_and_are_those_of_the_matrix(shape):
    kernel, _ = stacks(**shape)
    values = linalg.eigenvalues(kernel)
    assert values.dims == ("snapshot", "mode")
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(
        values, [np.sort(np.linalg.eigvals(k).real)[::-1] for k in kernel.values], atol=1e-8 * np.abs(kernel).max()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_eigenvalues_of_a_kernel_that_is_not_finite_are_missing_and_alone(bad, monkeypatch):
    kernel, _ = stacks(3, 4, 1, seed=0)
    whole = linalg.eigenvalues(kernel)
    kernel[1, 2, 3] = bad
    solver = np.linalg.eigvalsh

    def finite_only(matrix):
        assert np.isfinite(matrix).all()
        return solver(matrix)

    monkeypatch.setattr(np.linalg, "eigvalsh", finite_only)
    values = linalg.eigenvalues(kernel)
    assert np.isnan(values[1]).all()
    np.testing.assert_array_equal(values[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize(
    ("chunks", "rounding"),
    [({"snapshot": 1}, 0), ({"snapshot": 2, "sample": 2}, 1e-13), ({"sample": 3, "sample2": 2}, 1e-13)],
    ids=str,
)
def test_chunks_of_rows_change_no_bit_and_nothing_is_computed_early(chunks, rounding, no_compute):
    kernel, y = stacks(4, 5, 2, seed=3, dtype=np.float32)
    lazy_kernel, lazy_y = kernel.chunk(chunks), y.chunk({"snapshot": 4, "sample": 2})
    lazy = {
        "norm": linalg.frobenius_norm(lazy_kernel),
        "centre": linalg.centre(lazy_kernel),
        "form": linalg.quadratic_form(lazy_kernel, lazy_y),
        "projections": linalg.squared_projections(lazy_kernel.rename(sample2="eig"), lazy_y),
        "outer": linalg.outer_norm(lazy_y),
        "energy": linalg.squared_norm(lazy_y),
        "eigenvalues": linalg.eigenvalues(lazy_kernel),
    }
    eager = {
        "norm": linalg.frobenius_norm(kernel),
        "centre": linalg.centre(kernel),
        "form": linalg.quadratic_form(kernel, y),
        "projections": linalg.squared_projections(kernel.rename(sample2="eig"), y),
        "outer": linalg.outer_norm(y),
        "energy": linalg.squared_norm(y),
        "eigenvalues": linalg.eigenvalues(kernel),
    }
    for name, array in lazy.items():
        assert array.chunks is not None, name
        assert eager[name].chunks is None, name
        assert array.dtype == eager[name].dtype == np.float64, name
        np.testing.assert_allclose(array.compute(scheduler="sync"), eager[name], rtol=rounding, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(1, 8), st.integers(1, 8))
def test_kernels_in_several_blocks_have_the_sums_of_whole_ones(shape, rows, columns):
    kernel, y = stacks(**shape)
    blocks = kernel.chunk(snapshot=1, sample=rows, sample2=columns)
    for measured, expected in (
        (linalg.frobenius_product(blocks, blocks + 1), linalg.frobenius_product(kernel, kernel + 1)),
        (linalg.quadratic_form(blocks, y.chunk(snapshot=2)), linalg.quadratic_form(kernel, y)),
        (linalg.centred_norm(blocks) ** 2, linalg.centred_norm(kernel) ** 2),
        (linalg.gram(blocks, "snapshot"), linalg.gram(kernel, "snapshot")),
        (linalg.centred_gram(blocks, "snapshot"), linalg.centred_gram(kernel, "snapshot")),
    ):
        xr.testing.assert_allclose(measured.compute(scheduler="sync"), expected, rtol=1e-10, atol=1e-10)


def test_a_kernel_in_several_blocks_is_never_whole_in_memory(monkeypatch):
    seen = []
    for name in ("_product", "_products", "_quadratic_form"):
        original = getattr(linalg, name)
        monkeypatch.setattr(
            linalg,
            name,
            lambda *parts, original=original: seen.append(parts[0].shape[-2:]) or original(*parts),
        )
    kernel, y = stacks(3, 6, 1, seed=0)
    blocks = kernel.chunk(snapshot=1, sample=2, sample2=3)
    for lazy in (
        linalg.centred_norm(blocks),
        linalg.quadratic_form(blocks, y),
        linalg.centred_gram(blocks, "snapshot"),
    ):
        lazy.compute(scheduler="sync")
    assert set(seen) == {(2, 3)}


def test_sums_of_float32_kernels_run_in_float64():
    n = 400
    kernel = xr.DataArray(np.full((1, n, n), 0.1, np.float32), dims=("snapshot", "sample", "sample2"))
    y = xr.DataArray(np.ones((1, n, 1), np.float32), dims=("snapshot", "sample", "output"))
    value = float(np.float32(0.1))
    assert float(linalg.frobenius_norm(kernel)[0]) == pytest.approx(value * n, rel=1e-13)
    assert float(linalg.quadratic_form(kernel, y)[0]) == pytest.approx(value * n**2, rel=1e-12)


@pytest.mark.parametrize("measure", ["frobenius_norm", "quadratic_form"])
def test_scalars_of_a_kernel_make_no_float64_copy_of_it(measure):
    kernel = xr.DataArray(np.ones((1, 600, 600), np.float32), dims=("snapshot", "sample", "sample2"))
    y = xr.DataArray(np.ones((1, 600, 1), np.float32), dims=("snapshot", "sample", "output"))
    arguments = (kernel,) if measure == "frobenius_norm" else (kernel, y)
    tracemalloc.start()
    getattr(linalg, measure)(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < kernel.nbytes / 2


@settings(deadline=None, max_examples=15)
@given(shapes, st.booleans())
def test_products_of_all_pairs(shape, lazy):
    kernel, _ = stacks(**shape)
    products = linalg.gram(kernel.chunk(snapshot=2, sample=2) if lazy else kernel, "snapshot")
    assert products.dims == ("snapshot", "other")
    expected = [[np.trace(one.T @ other) for other in kernel.values] for one in kernel.values]
    np.testing.assert_allclose(products, expected, rtol=1e-10, atol=1e-10)


def test_products_of_lazy_kernels_are_lazy_symmetric_and_the_same_every_time(no_compute):
    kernel, _ = stacks(7, 4, 1, seed=0, dtype=np.float32)
    lazy = linalg.gram(kernel.chunk(snapshot=3), "snapshot")
    assert lazy.data.name == linalg.gram(kernel.chunk(snapshot=3), "snapshot").data.name
    products = lazy.compute(scheduler="threads")
    np.testing.assert_array_equal(products, products.T)
    np.testing.assert_allclose(products, linalg.gram(kernel, "snapshot"), rtol=1e-13)


@settings(deadline=None, max_examples=15)
@given(shapes)
def test_full_quadratic_form_is_that_of_the_flattened_kernel(shape):
    _, y = stacks(**shape)
    s, n, c = y.shape
    full = np.random.default_rng(shape["seed"]).standard_normal((s, n, c, n, c))
    found = linalg.full_quadratic_form(xr.DataArray(full, dims=("snapshot", *linalg.FULL)), y)
    expected = [
        sum(
            y.values[t, i, a] * full[t, i, a, j, b] * y.values[t, j, b]
            for i in range(n) for j in range(n) for a in range(c) for b in range(c)
        )
        for t in range(s)
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(shapes)
def test_subspace_overlaps_are_sums_of_squared_products(shape):
    one, _ = stacks(**shape)
    other, _ = stacks(**shape | {"seed": shape["seed"] + 1})
    found = linalg.subspace_overlaps(one.rename(sample2="eig"), other.rename(sample2="eig"))
    for t in range(shape["s"]):
        v, w = one.values[t], other.values[t]
        for k in range(1, shape["n"] + 1):
            expected = sum((v[:, i] @ w[:, j]) ** 2 for i in range(k) for j in range(k)) / k
            np.testing.assert_allclose(found[t, k - 1], expected, rtol=1e-10, atol=1e-12)


def test_a_quotient_by_what_is_not_positive_is_missing():
    found = linalg.ratio(xr.DataArray([1.0, 1, 1, 1]), xr.DataArray([2.0, 0, -1, np.nan]))
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan, np.nan])


def test_targets_that_repeat_along_the_rows_are_worked_on_once():
    seen = []
    once = linalg._once_if_repeated(lambda y: seen.append(len(y)) or linalg._outer_norm(y))
    y = np.random.default_rng(0).standard_normal((1, 5, 2))
    repeated = once(np.broadcast_to(y, (7, 5, 2)))
    assert seen == [1]
    np.testing.assert_array_equal(repeated, once(np.repeat(y, 7, axis=0)))
    assert seen == [1, 7]
