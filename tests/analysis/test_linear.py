import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from mock_store import mock_store

import analysis
from analysis.linear import two_layer_linear
from pipeline.errors import InputError


def problem(seed, n=12, d=4, m=5, scale=1.0):
    """Inputs, targets and weights (W, a)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=n), scale * rng.normal(size=(m, d)), scale * rng.normal(size=m)


def descend(x, y, w, a, rate, steps):
    """The rows of gradient descent, parameters as a run stores them: W, then a."""
    rows = []
    for _ in range(steps + 1):
        rows.append(np.concatenate([w.ravel(), a]))
        r = x @ w.T @ a - y
        w, a = w - rate / len(y) * np.outer(a, x.T @ r), a - rate / len(y) * w @ x.T @ r
    return np.array(rows)


def dataset(x, y, parameters, rate, steps=None):
    """Snapshots of one run, and its inputs."""
    count = len(parameters)
    ds = xr.Dataset(
        {
            "parameter": (("step", "parameter_index"), parameters),
            "target": (("step", "sample", "output"), np.broadcast_to(y[:, None], (count, len(y), 1))),
            "learning_rate": ("step", np.full(count, rate)),
        },
        coords={"step": np.arange(count) if steps is None else np.asarray(steps)},
    )
    return ds, xr.DataArray(x, dims=("sample", "feature"))


def kernel(x, w, a):
    return a @ a * x @ x.T + (x @ w.T) @ (x @ w.T).T


def kta(k, y):
    return y @ k @ y / (np.linalg.norm(k) * (y @ y))


@given(st.integers(0, 10**6), st.floats(0.001, 0.2), st.integers(1, 6))
def test_gradient_descent_follows_the_recursions(seed, rate, m):
    x, y, w, a = problem(seed, m=m, scale=0.5)
    found = two_layer_linear(*dataset(x, y, descend(x, y, w, a, rate, 3), rate)).recursion_error
    assert found.max() < 1e-12
    assert list(found.isnull()) == [False, False, False, True]


@pytest.mark.parametrize("change", [0.99, 1.01])
def test_another_step_does_not(change):
    x, y, w, a = problem(0)
    rows = descend(x, y, w, a, 0.2 * change, 1)
    assert two_layer_linear(*dataset(x, y, rows, 0.2)).recursion_error[0] > 1e-6


def test_rows_that_are_not_neighbours_have_no_error():
    x, y, w, a = problem(0)
    rows = descend(x, y, w, a, 0.1, 4)
    found = two_layer_linear(*dataset(x, y, rows[[0, 1, 3]], 0.1, [0, 1, 3]))
    assert list(found.recursion_error.isnull()) == [False, True, True]


@given(st.integers(0, 10**6), st.floats(0.2, 5))
def test_the_closed_form_is_the_kta_of_the_kernel_at_the_fit(seed, s):
    x, beta, _, a = problem(seed, d=3)
    y = x @ beta[:3]
    a = a / np.linalg.norm(a) * np.sqrt(s)
    w = np.outer(a, beta[:3]) / s  # f = X Wᵀ a = X beta: the fit
    found = two_layer_linear(*dataset(x, y, np.concatenate([w.ravel(), a])[None], 0.1))
    assert found.squared_length.item() == pytest.approx(s)
    assert found.rank_one_error.item() < 1e-12
    assert found.kta_closed_form.item() == pytest.approx(kta(kernel(x, w, a), y), rel=1e-10)


def test_a_target_outside_the_range_of_the_inputs_stands_for_its_projection():
    x, y, _, a = problem(3)
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    s = a @ a
    w = np.outer(a, beta) / s
    found = two_layer_linear(*dataset(x, y, np.concatenate([w.ravel(), a])[None], 0.1))
    assert found.kta_closed_form.item() == pytest.approx(kta(kernel(x, w, a), y), rel=1e-10)


@given(st.integers(0, 10**6))
def test_c_of_k_does_not_rise_with_s(seed):
    x, y, w, a = problem(seed)
    found = two_layer_linear(*dataset(x, y, np.concatenate([w.ravel(), a])[None], 0.1))
    assert found.shift_violation.item() < 1e-10


def test_the_bound_of_the_gap_and_a_form_that_is_not_of_rank_one():
    x, y, w, a = problem(1)
    ds, inputs = dataset(x, y, np.concatenate([w.ravel(), a])[None], 0.1)
    found = two_layer_linear(ds, inputs)
    f = xr.DataArray((x @ w.T @ a)[:, None], dims=("sample", "output"))
    expected = analysis.gap_bound(inputs, ds.target.isel(step=0), f)
    assert found.gap_bound.item() == pytest.approx(expected.item(), rel=1e-12)
    best = np.linalg.norm(w - np.outer(a, a @ w) / (a @ a)) / np.linalg.norm(w)
    assert found.rank_one_error.item() == pytest.approx(best)
    assert best > 0.1


# --- set A: data with one outlier, where every number of the theory is known ------------------------------------------

# Learning rate, s at the end, its prediction, KTA, C(3), C(5).
SET_A = [
    (0.02, 1.4384, 1.4393, 0.1161, 0.764, 0.835),
    (0.15, 1.4362, 1.4393, 0.1163, 0.765, 0.835),
    (0.20, 1.0472, 1.1104, 0.1605, 0.933, 0.950),
    (0.25, 0.8720, 0.8879, 0.2015, 0.969, 0.976),
    (0.30, 0.7266, 0.7394, 0.2582, 0.985, 0.989),
]


def set_a():
    n, d, m = 100, 20, 50
    rng = np.random.default_rng(1)
    u, r = np.linalg.qr(rng.normal(size=(n, d)))[0], np.linalg.qr(rng.normal(size=(d, d)))[0]
    h = np.concatenate([[0.3], rng.normal(size=d - 1)])
    x = u * (np.sqrt(n) * np.concatenate([[3], np.linspace(1, 0.5, d - 1)])) @ r.T
    y = np.sqrt(n) * u @ (h / np.linalg.norm(h))
    rng = np.random.default_rng(3)
    a = rng.normal(size=m) * 0.05 / np.sqrt(m)
    return x, y, rng.normal(size=(m, d)) * 0.05 / np.sqrt(m), a


@pytest.mark.parametrize(("rate", "s", "predicted", "alignment", "c3", "c5"), SET_A)
def test_set_a(rate, s, predicted, alignment, c3, c5):
    x, y, w, a = set_a()
    n = len(y)
    for _ in range(20_000):
        r = x @ w.T @ a - y
        if r @ r / (2 * n) < 1e-6:
            break
        w, a = w - rate / n * np.outer(a, x.T @ r), a - rate / n * w @ x.T @ r
    found = two_layer_linear(*dataset(x, y, np.concatenate([w.ravel(), a])[None], rate))
    k = kernel(x, w, a)
    shares = np.cumsum((np.linalg.eigh(k)[1].T @ y)[::-1] ** 2) / (y @ y)
    assert found.squared_length.item() == pytest.approx(s, rel=0.01)
    assert found.squared_length_predicted.item() == pytest.approx(predicted, rel=1e-3)
    assert kta(k, y) == pytest.approx(alignment, rel=0.01)
    assert found.kta_closed_form.item() == pytest.approx(kta(k, y), rel=0.01)
    assert found.squared_length.item() == pytest.approx(found.squared_length_predicted.item(), rel=0.07)
    np.testing.assert_allclose([shares[2], shares[4]], [c3, c5], rtol=0.01)


def test_there_is_no_end_beyond_the_smallest_sharpness():
    x, y, w, a = set_a()
    rows = np.concatenate([w.ravel(), a])[None]
    # The smallest S(s) is 3.338, so no s is stable from a step size of 0.599 on.
    assert two_layer_linear(*dataset(x, y, rows, 0.61)).squared_length_predicted.isnull().item()
    assert two_layer_linear(*dataset(x, y, rows, 0.59)).squared_length_predicted.item() == pytest.approx(0.343, rel=0.2)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_several_runs_or_outputs_are_refused(tmp_path):
    root = mock_store(tmp_path, learning_rates=[0.1], seeds=[0, 1], steps=2)
    ds = analysis.open_sweep(root)
    x = xr.DataArray(np.ones((ds.sizes["sample"], 2)), dims=("sample", "feature"))
    with pytest.raises(InputError, match="take one run, of a network with one output"):
        two_layer_linear(ds, x)
    with pytest.raises(InputError, match="theory of two-layer linear networks needs `parameter`"):
        two_layer_linear(ds.drop_vars("parameter"), x)
