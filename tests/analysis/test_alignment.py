"""Alignment against naive float64 loops, the identities of the measures, and laziness."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, one_run, with_values

from analysis.alignment import (
    alignment,
    centred_alignment,
    full_alignment,
    kernel_target_alignment,
    layer_alignment,
    mode_alignment,
)
from pipeline.errors import InputError

MEASURES = [
    "kta", "kta_centred", "mode_alignment", "cumulative_alignment", "normalised_eigenvalue", "effective_rank",
]  # fmt: skip
OF_KERNEL = ["target_energy", "frobenius_norm"]


def inner(a, b):
    """⟨A, B⟩ by loops."""
    return sum(a[i, j] * b[i, j] for i in range(len(a)) for j in range(len(a)))


def naive_kta(kernel, y):
    outer = y @ y.T
    return inner(kernel, outer) / np.sqrt(inner(kernel, kernel) * inner(outer, outer))


def naive_centred_kta(kernel, y):
    n = len(y)
    p = np.eye(n) - np.ones((n, n)) / n
    return naive_kta(p @ kernel @ p, p @ y)


def naive_modes(vectors, y):
    out = []
    for i in range(vectors.shape[1]):
        share = sum(sum(vectors[j, i] * y[j, c] for j in range(len(y))) ** 2 for c in range(y.shape[1]))
        out.append(share / sum(value**2 for value in y.ravel()))
    return out


def with_kernels(kernels, targets):
    """A dataset of nothing but kernels and targets."""
    return xr.Dataset(
        {"ntk": (("snapshot", "sample", "sample2"), kernels), "target": (("snapshot", "sample", "output"), targets)}
    )


def with_all_outputs(n, c, seed, rows=2):
    """Kernels of all pairs of outputs, their sum over equal outputs, and targets."""
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((rows, n, c, 2 * n * c))
    full = np.einsum("sicp,sjdp->sicjd", j, j)
    ds = with_kernels(np.einsum("sicjc->sij", full), rng.standard_normal((rows, n, c)))
    return ds.assign(ntk_full=(("snapshot", "sample", "output", "sample2", "output2"), full))


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 7), c=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_measure_agrees_with_loops(n, c, seed):
    ds = mock_sweep(n=n, c=c, k=n, seed=seed, dtype=float, steps=(0, 1)).compute()
    result = alignment(ds)
    assert list(result) == MEASURES
    for row in range(ds.sizes["snapshot"]):
        kernel, y, vectors = (ds[name].values[row] for name in ("ntk", "target", "eigenvector"))
        c_i = naive_modes(vectors, y)
        assert result.kta.values[row] == pytest.approx(naive_kta(kernel, y), rel=1e-12)
        assert result.kta_centred.values[row] == pytest.approx(naive_centred_kta(kernel, y), rel=1e-10)
        np.testing.assert_allclose(result.mode_alignment[row], c_i, atol=1e-12)
        np.testing.assert_allclose(result.cumulative_alignment[row], [sum(c_i[: k + 1]) for k in range(n)], atol=1e-12)
        values = np.sort(np.linalg.eigvals(kernel).real)[::-1]
        np.testing.assert_allclose(result.normalised_eigenvalue[row], values / np.linalg.norm(values), atol=1e-10)
        p = values / values.sum()
        assert result.effective_rank.values[row] == pytest.approx(np.prod(p**-p), rel=1e-9)


def test_energy_in_all_modes_is_one_and_kta_is_the_weighted_sum_over_modes(exact_sweep):
    result = alignment(exact_sweep).compute()
    np.testing.assert_allclose(result.mode_alignment.sum("eig"), 1, rtol=1e-12)
    np.testing.assert_allclose(result.cumulative_alignment.isel(eig=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(
        (result.normalised_eigenvalue * result.mode_alignment).sum("eig"), result.kta, rtol=1e-12
    )


def test_several_outputs_weigh_the_sum_over_modes_by_the_norms_of_the_target():
    ds = mock_sweep(n=6, c=3, k=6, dtype=float).compute()
    result = alignment(ds)
    y = ds.target.values
    ratio = [np.linalg.norm(row @ row.T) / np.linalg.norm(row) ** 2 for row in y]
    sums = (result.normalised_eigenvalue * result.mode_alignment).sum("eig")
    np.testing.assert_allclose(sums, result.kta * ratio, rtol=1e-12)


def test_measures_lie_between_zero_and_one(sweep):
    result = alignment(sweep).compute()
    for name in ("kta", "kta_centred", "mode_alignment", "cumulative_alignment", "normalised_eigenvalue"):
        assert ((result[name] >= 0) & (result[name] <= 1 + 1e-7)).all(), name
    assert ((result.effective_rank >= 1) & (result.effective_rank <= sweep.sizes["sample"])).all()


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 9), c=st.integers(1, 3), seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_a_kernel_made_of_the_target_is_aligned_wholly(n, c, seed, scale):
    y = np.random.default_rng(seed).standard_normal((1, n, c))
    ds = with_kernels(scale * y @ y.swapaxes(1, 2), y)
    assert kernel_target_alignment(ds).item() == pytest.approx(1, rel=1e-12)
    assert centred_alignment(ds).item() == pytest.approx(1, rel=1e-9)


def test_kta_of_the_identity_is_one_over_the_root_of_n():
    ds = with_kernels(np.eye(9)[None], np.ones((1, 9, 1)))
    assert kernel_target_alignment(ds).item() == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), kernel_scale=st.floats(1e-3, 1e3), target_scale=st.floats(1e-3, 1e3))
def test_scales_and_the_order_of_examples_do_not_matter(seed, kernel_scale, target_scale):
    ds = mock_sweep(n=5, c=2, k=5, seed=seed, dtype=float, steps=(0, 1)).compute().drop_vars(OF_KERNEL)
    expected = alignment(ds)
    order = np.random.default_rng(seed).permutation(5)
    moved = ds.isel(sample=order, sample2=order)
    scales = {"ntk": kernel_scale, "eigenvalue": kernel_scale, "target": -target_scale}
    scaled = moved.assign({name: scale * moved[name].variable for name, scale in scales.items()})
    xr.testing.assert_allclose(alignment(scaled), expected, rtol=1e-9, atol=1e-10)


def test_centring_removes_what_a_constant_adds():
    ds = mock_sweep(dtype=float).compute().drop_vars(OF_KERNEL)
    moved = ds.assign(ntk=ds.ntk.variable + 100.0, target=ds.target.variable + 3.0)
    np.testing.assert_allclose(centred_alignment(moved), centred_alignment(ds), rtol=1e-9)
    assert (abs(kernel_target_alignment(moved) - kernel_target_alignment(ds)) > 0.1).all()


def test_scalars_come_first_and_the_stored_kernel_stands_in(sweep):
    from_kernel = alignment(sweep.drop_vars(OF_KERNEL)).compute()
    from_scalars = alignment(sweep).compute()
    np.testing.assert_allclose(from_kernel.kta, from_scalars.kta, rtol=1e-6)
    np.testing.assert_allclose(from_kernel.normalised_eigenvalue, from_scalars.normalised_eigenvalue, rtol=1e-6)
    doubled = alignment(sweep.assign(target_energy=2 * sweep.target_energy.variable)).compute()
    np.testing.assert_allclose(doubled.kta, 2 * from_scalars.kta)


@pytest.mark.parametrize("group", ["scalars", "spectra"])
def test_a_group_gives_what_its_variables_allow(group):
    result = alignment(mock_sweep(group))
    assert list(result) == {"scalars": ["kta"], "spectra": ["mode_alignment", "cumulative_alignment"]}[group]
    whole = alignment(mock_sweep("snapshots"))
    xr.testing.assert_allclose(result.compute(), whole[list(result)].compute())


def test_a_run_opened_by_plain_xarray_works_once_it_has_its_target(sweep):
    run = one_run(sweep, "lr-0.4_seed-1")
    plain = run.assign(target=run.target.isel(step=0))
    rows = sweep.run == "lr-0.4_seed-1"
    result = alignment(plain)
    assert result.kta.dims == ("step",)
    for name in MEASURES:
        np.testing.assert_allclose(result[name], alignment(sweep).isel(snapshot=rows.values)[name], err_msg=name)


def test_one_row_and_a_grid_work_as_well(sweep):
    expected = alignment(sweep).compute()
    row = alignment(sweep.isel(snapshot=3))
    assert float(row.kta) == float(expected.kta[3])
    assert row.mode_alignment.dims == ("eig",)
    grid = alignment(sweep[["ntk", "target"]].compute().drop_vars(["run", "status", "loss"]).unstack())
    np.testing.assert_allclose(grid.kta_centred.sel(learning_rate=0.4, seed=1, step=10),
                               expected.kta_centred.sel(learning_rate=0.4, seed=1, step=10))  # fmt: skip


def test_everything_stays_lazy(sweep, no_compute):
    result = alignment(sweep)
    assert all(array.chunks is not None for array in result.values())
    with pytest.raises(AssertionError, match="computed a lazy array"):
        result.compute()


def test_numpy_gives_numpy_with_the_same_values(sweep):
    result = alignment(sweep.compute())
    assert all(array.chunks is None for array in result.values())
    xr.testing.assert_identical(result, alignment(sweep).compute())


def test_coordinates_and_status_come_along_and_everything_is_described(sweep):
    result = alignment(sweep)
    xr.testing.assert_identical(result.coords.to_dataset(), sweep.coords.to_dataset())
    assert set(result.status.values) == {"complete", "diverged"}
    for name, array in result.items():
        assert array.attrs.keys() == {"long_name", "units", "description"}, name
        assert array.attrs["units"] == "1", name
        assert "NTK scalar" not in array.attrs["description"], name
    assert sweep.eigenvalue.attrs["long_name"] == "NTK eigenvalue"


@pytest.mark.parametrize("lazy", [False, True], ids=["numpy", "dask"])
def test_zeros_are_missing_values_not_warnings(lazy):
    kernels, targets = np.stack([np.zeros((3, 3)), np.eye(3)]), np.stack([np.ones((3, 1)), np.zeros((3, 1))])
    ds = with_kernels(kernels, targets)
    ds["eigenvector"] = ds.ntk.rename(sample2="eig")
    ds["eigenvalue"] = ds.eigenvector[:, 0]
    result = alignment(ds.chunk() if lazy else ds).compute()
    assert np.isnan(result.kta).all()
    assert np.isnan(result.kta_centred).all()
    assert np.isnan(result.mode_alignment[1]).all()
    np.testing.assert_allclose(result.normalised_eigenvalue, [[np.nan] * 3, [3**-0.5, 0, 0]])


@pytest.mark.parametrize("label", [1.0, 0.1])
def test_equal_labels_have_no_centred_alignment(label):
    # the float64 mean of seven times 0.1 is not 0.1
    assert np.isnan(centred_alignment(with_kernels(np.eye(7)[None], np.full((1, 7, 1), label))).item())


def test_a_missing_row_stays_missing_in_the_cumulative_sum(exact_sweep):
    ds = exact_sweep.compute()
    ds["eigenvector"][2] = np.nan
    result = alignment(ds)
    assert np.isnan(result.cumulative_alignment[2]).all()
    assert np.isfinite(result.cumulative_alignment[1]).all()


def test_without_a_target_the_error_says_where_it_is(sweep):
    with pytest.raises(InputError, match=r"alignment needs `target`.* group probe; analysis\.open_sweep and open_run"):
        alignment(sweep.drop_vars("target"))


def test_a_group_without_kernels_names_what_is_needed_and_where():
    with pytest.raises(InputError, match=r"needs `ntk`, `eigenvector`, or .* has loss, accuracy, .* with snapshots"):
        alignment(mock_sweep("train"))


@pytest.mark.parametrize(
    ("function", "missing", "groups"),
    [
        (kernel_target_alignment, "target_energy", "scalars or snapshots"),
        (centred_alignment, "ntk", "snapshots"),
        (mode_alignment, "eigenvector", "snapshots or spectra"),
    ],
)
def test_a_missing_variable_is_named_with_its_groups(function, missing, groups):
    with pytest.raises(InputError, match=f"needs `{missing}`.*group=\\.\\.\\.\\) with {groups}$"):
        function(mock_sweep("train"))


# --- all outputs, and layer by layer ----------------------------------------------------------------------------------

shapes = st.fixed_dictionaries({"n": st.integers(2, 5), "c": st.integers(1, 3), "seed": st.integers(0, 2**31)})


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_alignment_of_all_outputs_is_that_of_the_flattened_kernel(shape):
    ds, (n, c) = with_all_outputs(**shape), (shape["n"], shape["c"])
    result = full_alignment(ds)
    p = np.kron(np.eye(n) - np.ones((n, n)) / n, np.eye(c))  # over the examples, each output by itself
    for t in range(2):
        kernel, y = ds.ntk_full.values[t].reshape(n * c, n * c), ds.target.values[t].reshape(n * c, 1)
        assert result.kta_full.values[t] == pytest.approx(naive_kta(kernel, y), rel=1e-10)
        assert result.kta_full_centred.values[t] == pytest.approx(naive_kta(p @ kernel @ p, p @ y), rel=1e-8)


def test_with_one_output_both_conventions_are_one():
    ds = with_all_outputs(5, 1, seed=0)
    np.testing.assert_allclose(full_alignment(ds).kta_full, kernel_target_alignment(ds), rtol=1e-12)
    np.testing.assert_allclose(full_alignment(ds).kta_full_centred, centred_alignment(ds), rtol=1e-12)


def test_outputs_that_share_nothing_and_are_alike_tell_the_conventions_apart():
    """K_ab = δ_ab G: then KTA_full = Σ_a y_aᵀGy_a / (√c ‖G‖ ‖Y‖²), and KTA has ‖YYᵀ‖ in the place of √c ‖Y‖² / c."""
    g, y = np.diag([3.0, 2.0, 1.0]), np.eye(3)[:, :2]
    ds = with_kernels(2 * g[None], y[None]).assign(
        ntk_full=(("snapshot", "sample", "output", "sample2", "output2"), np.einsum("ij,ab->iajb", g, np.eye(2))[None])
    )
    assert full_alignment(ds).kta_full.item() == pytest.approx(5 / (np.sqrt(2) * np.sqrt(14) * 2))
    assert kernel_target_alignment(ds).item() == pytest.approx(5 / (np.sqrt(14) * np.sqrt(2)))


@settings(deadline=None, max_examples=10)
@given(shapes, st.floats(1e-2, 1e2))
def test_all_outputs_may_be_scaled_reordered_and_turned_together(shape, scale):
    ds, rng = with_all_outputs(**shape), np.random.default_rng(shape["seed"])
    order = rng.permutation(shape["n"])
    q, _ = np.linalg.qr(rng.standard_normal((shape["c"], shape["c"])))
    moved = ds.isel(sample=order, sample2=order)
    turned = np.einsum("siajb,ac,bd->sicjd", moved.ntk_full.values, q, q)
    moved = with_values(moved, ntk_full=scale * turned, target=-scale * moved.target.values @ q)
    xr.testing.assert_allclose(full_alignment(moved), full_alignment(ds), rtol=1e-8)


def test_alignment_by_layer_is_that_of_each_part():
    ds = with_all_outputs(4, 2, seed=1)
    parts = np.stack([0.3 * ds.ntk.values, ds.ntk.values**2, 0 * ds.ntk.values], axis=1)
    dims = ("snapshot", "layer", "sample", "sample2")
    result = layer_alignment(ds.assign(ntk_layer=xr.Variable(dims, parts, {"names": ["U", "V", "unused"]})))
    assert result.layer.values.tolist() == ["U", "V", "unused"]
    for t in range(2):
        for layer in range(2):
            kernel, y = parts[t, layer], ds.target.values[t]
            assert result.kta_layer.values[t, layer] == pytest.approx(naive_kta(kernel, y), rel=1e-10)
            assert result.kta_layer_centred.values[t, layer] == pytest.approx(naive_centred_kta(kernel, y), rel=1e-8)
    assert np.isnan(result.sel(layer="unused").to_dataarray()).all()
    np.testing.assert_allclose(result.kta_layer.sel(layer="U"), kernel_target_alignment(ds), rtol=1e-12)
