"""Path lengths against loops, a straight line and their invariances."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_sweep import mock_sweep, with_values

from analysis.complexity import complexity
from analysis.rows import runs_of


def run(parameters, traces):
    """One run of nothing but parameters and traces."""
    return xr.Dataset(
        {"parameter": (("step", "parameter_index"), parameters), "trace": ("step", traces)},
        {"step": np.arange(len(traces))},
    )


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), lazy=st.booleans())
def test_it_agrees_with_loops(seed, lazy):
    ds = mock_sweep(n=3, k=1, seed=seed, dtype=float)
    ds = ds if lazy else ds.compute()
    result = complexity(ds).compute()
    theta, trace = ds.parameter.values, ds.trace.values
    for rows in runs_of(ds).rows:
        length = 0.0
        for position, t in enumerate(rows):
            if position:
                before = rows[position - 1]
                stride = sum((a - b) ** 2 for a, b in zip(theta[t], theta[before], strict=True)) ** 0.5
                length += stride * trace[before] ** 0.5
            start = sum((a - b) ** 2 for a, b in zip(theta[t], theta[rows[0]], strict=True)) ** 0.5
            assert result.path_length.values[t] == pytest.approx(length, rel=1e-12)
            assert result.parameter_distance.values[t] == pytest.approx(start, rel=1e-12)


def test_a_straight_line_at_a_steady_pace():
    result = complexity(run(np.outer(np.arange(4), [3.0, 4.0]), np.full(4, 9.0)))
    np.testing.assert_allclose(result.parameter_distance, [0, 5, 10, 15])
    np.testing.assert_allclose(result.path_length, [0, 15, 30, 45])


def test_there_and_back_is_a_path_without_a_distance():
    result = complexity(run(np.array([[0.0], [1.0], [0.0]]), np.array([4.0, 1.0, 0.0])))
    np.testing.assert_allclose(result.parameter_distance, [0, 1, 0])
    np.testing.assert_allclose(result.path_length, [0, 2, 3])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_an_orthogonal_change_of_the_parameters_does_not_matter_and_scales_come_out(seed, scale):
    ds = mock_sweep(n=3, k=1, seed=seed, dtype=float).compute()
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    order = rng.permutation(ds.sizes["snapshot"])
    moved = with_values(ds, parameter=scale * ds.parameter.values @ q, trace=4 * ds.trace)
    found, expected = complexity(moved.isel(snapshot=order)), complexity(ds).isel(snapshot=order)
    np.testing.assert_allclose(found.parameter_distance, scale * expected.parameter_distance, rtol=1e-9)
    np.testing.assert_allclose(found.path_length, 2 * scale * expected.path_length, rtol=1e-9)


def test_float32_parameters_are_summed_in_float64():
    result = complexity(run(np.array([[1e4], [1e4 + 2**-8]], np.float32), np.ones(2)))
    assert result.parameter_distance.dtype == np.float64
    assert float(result.path_length[1]) == float(np.float32(1e4 + 2**-8)) - 1e4


def test_from_a_missing_row_on_the_length_is_missing():
    ds = run(np.zeros((4, 1)), np.array([1.0, np.nan, 1.0, 1.0]))
    np.testing.assert_array_equal(np.isnan(complexity(ds).path_length), [False, False, True, True])
    ds = run(np.array([[0.0], [np.nan], [1.0], [2.0]]), np.ones(4))
    result = complexity(ds)
    np.testing.assert_array_equal(np.isnan(result.path_length), [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(result.parameter_distance), [False, True, False, False])
