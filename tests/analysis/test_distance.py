"""Distances between the kernels of a run, against loops, closed forms and their invariances."""

import tracemalloc
from itertools import pairwise

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, one_run, with_values

from analysis.distance import cka, kernel_distance, kernel_velocity, polar
from analysis.rows import runs_of
from pipeline.errors import InputError

shapes = st.fixed_dictionaries({"n": st.integers(2, 5), "seed": st.integers(0, 2**31)})


def exact(n, seed):
    return mock_sweep(n=n, k=1, seed=seed, dtype=float, steps=(0, 2, 5)).compute()


def cosine(a, b):
    """⟨A, B⟩ / (‖A‖ ‖B‖) by loops."""

    def inner(a, b):
        return sum(a[i, j] * b[i, j] for i in range(len(a)) for j in range(len(a)))

    return inner(a, b) / np.sqrt(inner(a, a) * inner(b, b))


def centred(kernel):
    p = np.eye(len(kernel)) - 1 / len(kernel)
    return p @ kernel @ p


def one(kernels, steps=None, learning_rate=0.1):
    """A run of nothing but kernels."""
    steps = np.arange(len(kernels)) if steps is None else steps
    return xr.Dataset(
        {"ntk": (("step", "sample", "sample2"), kernels)}, {"step": steps, "learning_rate": learning_rate}
    )


def plane(angles):
    """Unit kernels at these angles to the first of two orthogonal ones."""
    a, b = np.diag([1.0, 0, 0]), np.array([[0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]) / np.sqrt(2)
    return np.stack([np.cos(angle) * a + np.sin(angle) * b for angle in angles])


# --- all pairs --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_all_pairs_agree_with_loops(shape):
    ds = exact(**shape)
    distance, similarity = kernel_distance(ds).compute(), cka(ds).compute()
    kernels = ds.ntk.values
    for rows in runs_of(ds).rows:
        for t in rows:
            for other, u in enumerate(rows):
                assert distance.values[t, other] == pytest.approx(1 - cosine(kernels[t], kernels[u]), abs=1e-12)
                expected = cosine(centred(kernels[t]), centred(kernels[u]))
                assert similarity.values[t, other] == pytest.approx(expected, rel=1e-8)
                assert distance.other_step.values[t, other] == ds.step.values[u]
            assert np.isnan(distance.values[t, len(rows) :]).all()
            assert (distance.other_step.values[t, len(rows) :] == -1).all()


def test_a_kernel_is_at_no_distance_from_itself(sweep):
    distance, similarity = kernel_distance(sweep).compute(), cka(sweep).compute()
    for rows in runs_of(sweep).rows:
        for position, t in enumerate(rows):
            assert distance[t, position] == 0
            assert similarity[t, position] == 1


@settings(deadline=None, max_examples=10)
@given(shapes, st.floats(1e-3, 1e3))
def test_all_pairs_ignore_scales_and_the_order_of_examples(shape, scale):
    ds = exact(**shape)
    rng = np.random.default_rng(shape["seed"])
    order = rng.permutation(shape["n"])
    scales = scale * rng.uniform(0.5, 2, (ds.sizes["snapshot"], 1, 1))
    moved = ds.isel(sample=order, sample2=order)
    moved = with_values(moved, ntk=scales * moved.ntk.values)
    xr.testing.assert_allclose(kernel_distance(moved), kernel_distance(ds), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(cka(moved), cka(ds), rtol=1e-8)


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_distance_sees_no_orthogonal_change_and_cka_no_constant(shape):
    ds = exact(**shape)
    q, _ = np.linalg.qr(np.random.default_rng(shape["seed"]).standard_normal((shape["n"], shape["n"])))
    turned = with_values(ds, ntk=q @ ds.ntk.values @ q.T)
    np.testing.assert_allclose(kernel_distance(turned), kernel_distance(ds), atol=1e-12)
    np.testing.assert_allclose(cka(with_values(ds, ntk=ds.ntk + 3)), cka(ds), rtol=1e-7)


def test_rows_may_stand_in_any_order(sweep):
    order = np.random.default_rng(0).permutation(sweep.sizes["snapshot"])
    xr.testing.assert_allclose(kernel_distance(sweep.isel(snapshot=order)), kernel_distance(sweep).isel(snapshot=order))


def test_a_stack_of_kernels_is_taken_one_by_one(sweep):
    squared = sweep.assign(ntk=sweep.ntk.variable**2)
    stack = xr.Variable.concat([sweep.ntk.variable, squared.ntk.variable], "layer")
    both = kernel_distance(sweep.assign(ntk=stack))
    for layer, alone in enumerate((sweep, squared)):
        np.testing.assert_allclose(both.isel(layer=layer), kernel_distance(alone), atol=1e-14)


def test_few_blocks_are_in_memory_at_once():
    """Kernels that are made when they are asked for, one to a block."""
    kernels = da.random.default_rng(0).random((16, 200, 200), chunks=(1, 200, 200)).astype(np.float32)
    distance = kernel_distance(one(kernels))
    tracemalloc.start()
    distance.compute(scheduler="sync")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < kernels.nbytes


# --- along the run ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_velocity_and_polar_coordinates_agree_with_loops(shape):
    ds = exact(**shape)
    velocity, coordinates, kernels = kernel_velocity(ds).compute(), polar(ds).compute(), ds.ntk.values
    for rows in runs_of(ds).rows:
        for t, following in pairwise(rows):
            dt = float(ds.step[following] - ds.step[t])
            v = (1 - cosine(kernels[t], kernels[following])) / dt
            assert velocity.kernel_velocity.values[t] == pytest.approx(v, abs=1e-13)
            flow = velocity.kernel_velocity_flow.values[t]
            assert flow == pytest.approx(v / float(ds.learning_rate[t]), abs=1e-12)
        assert np.isnan(velocity.to_dataarray()[:, rows[-1]]).all()
        for t in rows:
            radius = np.sqrt(((kernels[t] - kernels[rows[0]]) ** 2).sum())
            row = coordinates.isel(snapshot=t)
            assert float(row.radius) == pytest.approx(radius)
            assert float(row.relative_radius) == pytest.approx(radius / np.sqrt((kernels[rows[0]] ** 2).sum()))
            assert np.cos(float(row.angle)) == pytest.approx(cosine(kernels[t], kernels[rows[0]]), abs=1e-12)


def test_kernels_that_turn_in_a_plane():
    angles = np.array([0.0, 0.1, 0.5, 1.5])
    ds = one(plane(angles), steps=[0, 2, 3, 7], learning_rate=0.25)
    np.testing.assert_allclose(polar(ds).angle, angles, rtol=1e-12)
    np.testing.assert_allclose(polar(ds).radius, 2 * np.sin(angles / 2), rtol=1e-12)
    np.testing.assert_allclose(kernel_distance(ds)[0], 1 - np.cos(angles), atol=1e-15)
    velocity = (1 - np.cos(np.diff(angles))) / [2, 1, 4]
    np.testing.assert_allclose(kernel_velocity(ds).kernel_velocity[:-1], velocity, rtol=1e-12)
    np.testing.assert_allclose(kernel_velocity(ds).kernel_velocity_flow[:-1], velocity / 0.25, rtol=1e-12)


def test_small_angles_keep_their_digits():
    assert polar(one(plane([0, 1e-9]))).angle[1] == pytest.approx(1e-9, rel=1e-6)


@settings(deadline=None, max_examples=10)
@given(shapes, st.floats(1e-3, 1e3))
def test_along_the_run_only_the_radius_sees_the_scale(shape, scale):
    ds = exact(**shape)
    n = shape["n"]
    rng = np.random.default_rng(shape["seed"])
    order, (q, _) = rng.permutation(n), np.linalg.qr(rng.standard_normal((n, n)))
    turned = q @ ds.ntk.values[:, order][:, :, order] @ q.T
    moved = with_values(ds, ntk=scale * turned)
    xr.testing.assert_allclose(kernel_velocity(moved), kernel_velocity(ds), rtol=1e-9, atol=1e-12)
    one_way, other = polar(moved), polar(ds)
    np.testing.assert_allclose(one_way.radius, scale * other.radius, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(one_way.relative_radius, other.relative_radius, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one_way.angle, other.angle, rtol=1e-9, atol=1e-12)


def test_a_run_opened_by_plain_xarray_works_too(sweep):
    run, rows = one_run(sweep, "lr-0.4_seed-1"), (sweep.run == "lr-0.4_seed-1").values
    for measure in (kernel_distance, kernel_velocity, polar):
        plain, whole = measure(run), measure(sweep).isel(snapshot=rows)
        if isinstance(plain, xr.DataArray):
            plain, whole = plain.to_dataset(name="found"), whole.to_dataset(name="found")
        for name in plain.data_vars:
            np.testing.assert_allclose(plain[name], whole[name], atol=1e-14, err_msg=name)


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_kernels_in_several_blocks_are_measured_as_whole_ones(shape):
    ds = exact(**shape).compute()
    blocks = ds.chunk(snapshot=1, sample=2, sample2=3)
    xr.testing.assert_allclose(kernel_distance(blocks).compute(), kernel_distance(ds), atol=1e-12)
    xr.testing.assert_allclose(cka(blocks).compute(), cka(ds), atol=1e-10)
    xr.testing.assert_allclose(kernel_velocity(blocks).compute(), kernel_velocity(ds), atol=1e-12)
    xr.testing.assert_allclose(polar(blocks).compute(), polar(ds), atol=1e-6)  # the angle at its smallest


@pytest.mark.parametrize("chunks", [None, {"step": 2}, {"sample": 2, "sample2": 2}], ids=["numpy", "rows", "blocks"])
def test_a_kernel_of_zeros_has_no_direction(chunks):
    kernels = np.stack([np.eye(3), np.zeros((3, 3)), np.eye(3), 2 * np.eye(3)])
    ds = one(kernels).chunk(chunks) if chunks else one(kernels)
    for matrix in (kernel_distance(ds), cka(ds)):
        np.testing.assert_array_equal(np.isnan(matrix[1]), True)
        np.testing.assert_array_equal(np.isnan(matrix[0]), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(kernel_velocity(ds).kernel_velocity), [True, True, False, True])
    np.testing.assert_array_equal(np.isnan(polar(ds).angle), [False, True, False, False])
    np.testing.assert_allclose(polar(ds).radius, [0, np.sqrt(3), 0, np.sqrt(3)])
    first = polar(ds.isel(step=[1, 2]))
    np.testing.assert_array_equal(np.isnan(first.relative_radius), True)


def test_missing_kernels_stay_missing(exact_sweep):
    ds = exact_sweep.compute()
    ds["ntk"][1] = np.nan
    assert np.isnan(kernel_distance(ds)[1]).all()
    assert np.isfinite(kernel_distance(ds)[0, [0, 2, 3]]).all()
    assert np.isnan(kernel_velocity(ds).kernel_velocity[:2]).all()
    assert np.isnan(polar(ds).isel(snapshot=1).to_dataarray()).all()


@pytest.mark.parametrize("measure", [kernel_distance, cka, kernel_velocity, polar])
def test_rows_are_needed(sweep, measure):
    with pytest.raises(InputError, match="no rows along `snapshot`"):
        measure(sweep.isel(snapshot=[]))
