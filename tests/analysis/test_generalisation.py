"""Kernel regression against linear solves and regression on features; errors and alignment of held-out examples."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_store import mock_run, mock_store

import analysis
from analysis import linalg
from analysis.catalog import query
from analysis.generalisation import held_out, held_out_alignment, held_out_error, kernel_regression
from analysis.results import analyze
from pipeline.cadence import Cadence
from pipeline.errors import InputError
from pipeline.schema import HELD_OUT
from pipeline.store import list_runs
from pipeline.verify import verify_root

N, M, K = 8, 5, 4
PAGE = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text()
OF_THE_PAGE = re.search(r"-- does the network.*?;", PAGE, re.DOTALL).group()
CADENCES = {"snapshots": Cadence(every=2), "spectra": Cadence(every=2), "scalars": Cadence(every=1)}
sizes = settings(deadline=None, max_examples=20)


def features(seed: int, count: int, width: int) -> np.ndarray:
    """φ(x) (rows, count, width) of two rows."""
    return np.random.default_rng(seed).normal(size=(2, count, width))


def dataset(train: np.ndarray, test: np.ndarray, y: np.ndarray, test_y: np.ndarray, f=None, dtype=float) -> xr.Dataset:
    """What is recorded of kernels φ φᵀ: two rows of features (2, n, q) and (2, m, q), targets (n, c) and (m, c)."""
    f = np.zeros((2, *test_y.shape)) if f is None else f

    def kernel(one, two):
        return (one @ two.swapaxes(1, 2)).astype(dtype)

    return xr.Dataset(
        {
            "ntk": (("snapshot", "sample", "sample2"), kernel(train, train)),
            "ntk_cross": (("snapshot", "test_sample", "sample"), kernel(test, train)),
            "ntk_test": (("snapshot", "test_sample", "test_sample2"), kernel(test, test)),
            "target": (("snapshot", "sample", "output"), np.stack([y, y])),
            "test_target": (("snapshot", "test_sample", "output"), np.stack([test_y, test_y])),
            "prediction_test": (("snapshot", "test_sample", "output"), f),
        },
    )


def random(seed: int, n: int = N, m: int = M, c: int = 1, width: int = 3 * N, **options) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    y, test_y = (rng.choice([-1.0, 1.0], (count, c)) for count in (n, m))
    phi = features(seed, n + m, width)
    return dataset(phi[:, :n], phi[:, n:], y, test_y, f=rng.normal(size=(2, m, c)), **options)


# --- kernel regression ------------------------------------------------------------------------------------------------


@sizes
@given(
    n=st.integers(1, 9), m=st.integers(1, 6), c=st.integers(1, 3), seed=st.integers(0, 2**31),
    ridge=st.sampled_from([0.0, 1e-3, 0.5]),
)  # fmt: skip
def test_it_solves_the_system_of_each_output_with_the_mean_kernel(n, m, c, seed, ridge):
    ds = random(seed, n, m, c, width=4 * n)
    found = kernel_regression(ds, ridge).regression_prediction
    for row in range(2):
        mean, cross = ds.ntk.values[row] / c, ds.ntk_cross.values[row] / c
        for output in range(c):
            y = ds.target.values[row, :, output]
            expected = cross @ np.linalg.solve(mean + ridge * n * np.eye(n), y)
            np.testing.assert_allclose(found[row, :, output], expected, rtol=1e-6, atol=1e-6)


@sizes
@given(width=st.integers(1, N), seed=st.integers(0, 2**31), dtype=st.sampled_from([np.float32, np.float64]))
def test_of_a_kernel_without_an_inverse_it_is_the_least_squares_fit_of_least_norm(width, seed, dtype):
    width = min(width, N - 2)
    ds = random(seed, width=width, dtype=dtype)
    phi = features(seed, N + M, width)
    found = kernel_regression(ds).regression_prediction
    for row in range(2):
        weights = np.linalg.lstsq(phi[row, :N], ds.target.values[row], rcond=None)[0]
        size = np.linalg.norm(weights) * np.linalg.norm(phi[row, N:])
        np.testing.assert_allclose(found[row], phi[row, N:] @ weights, atol=1e-3 * size)


@sizes
@given(width=st.integers(1, 2 * N), seed=st.integers(0, 2**31), ridge=st.floats(1e-2, 10))
def test_with_a_ridge_it_is_ridge_regression_on_the_features(width, seed, ridge):
    ds = random(seed, width=width)
    phi = features(seed, N + M, width)
    found = kernel_regression(ds, ridge).regression_prediction
    for row in range(2):
        train = phi[row, :N]
        gram = train.T @ train + ridge * N * np.eye(width)
        weights = np.linalg.solve(gram, train.T @ ds.target.values[row])
        np.testing.assert_allclose(found[row], phi[row, N:] @ weights, rtol=1e-7, atol=1e-9)


def test_on_the_training_examples_it_interpolates():
    phi, y = features(0, N, 3 * N), np.random.default_rng(0).normal(size=(N, 2))
    found = kernel_regression(dataset(phi, phi, y, y))
    np.testing.assert_allclose(found.regression_prediction[1], y, atol=1e-9)
    np.testing.assert_allclose(found.regression_squared_error, 0, atol=1e-18)


def test_what_rounding_makes_of_a_kernel_without_an_inverse_does_not_count():
    exact, rounded = (kernel_regression(random(3, width=3, dtype=dtype)) for dtype in (np.float64, np.float32))
    np.testing.assert_allclose(exact.regression_prediction, rounded.regression_prediction, atol=1e-4)


@pytest.mark.parametrize(("scale", "expected"), [(1, (1, 0, 1)), (-1, (-1, 2, 0)), (2, (1, 0.5, 1))])
def test_how_near_it_is_to_a_network_that_is_a_multiple_of_it(scale, expected):
    ds = random(1)
    f_k = kernel_regression(ds).regression_prediction
    found = kernel_regression(ds.assign(prediction_test=scale * f_k))
    for name, value in zip(("correlation", "distance", "agreement"), expected, strict=True):
        np.testing.assert_allclose(found[f"regression_{name}"], value, atol=1e-12, err_msg=name)


@sizes
@given(c=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_how_near_it_is_to_any_network(c, seed):
    ds = random(seed, c=c)
    found = kernel_regression(ds)
    for row in range(2):
        f_k, f = found.regression_prediction.values[row], ds.prediction_test.values[row]
        np.testing.assert_allclose(found.regression_correlation[row], np.corrcoef(f_k.ravel(), f.ravel())[0, 1])
        np.testing.assert_allclose(found.regression_distance[row], np.linalg.norm(f_k - f) / np.linalg.norm(f))
        same = [
            np.sign(a[0]) == np.sign(b[0]) if c == 1 else a.argmax() == b.argmax() for a, b in zip(f_k, f, strict=True)
        ]
        np.testing.assert_allclose(found.regression_agreement[row], np.mean(same))


@pytest.mark.parametrize("ridge", [-1e-9, float("nan"), float("inf"), True, "1"])
def test_a_ridge_that_is_none_is_refused(ridge):
    with pytest.raises(InputError, match=r"ridge = .*: must be a finite number from 0 up"):
        kernel_regression(random(0), ridge)


# --- errors and alignment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "y", "squared", "rate"),
    [
        ([[2.0], [-1.0], [0.0]], [[1.0], [1.0], [-1.0]], (1 + 4 + 1) / 6, 2 / 3),
        ([[0.9, 0.1], [0.6, 0.4]], [[1.0, 0.0], [0.0, 1.0]], (0.02 + 0.72) / 4, 0.5),
        ([[1.0], [0.5]], [[2.0], [1.0]], (1 + 0.25) / 4, None),
        ([[1.0, 0.0]], [[1.0, 1.0]], 0.5, None),
    ],
    ids=["signs", "one_hot", "numbers", "two_labels"],
)
def test_errors_by_hand(f, y, squared, rate):
    arrays = [(("snapshot", "test_sample", "output"), np.array([values])) for values in (f, y)]
    found = held_out_error(xr.Dataset(dict(zip(("prediction_test", "test_target"), arrays, strict=True))))
    np.testing.assert_allclose(found.test_squared_error, squared)
    np.testing.assert_allclose(found.test_error_rate, np.nan if rate is None else rate)


@sizes
@given(m=st.integers(2, 7), c=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_alignment_of_the_held_out_examples_from_their_features(m, c, seed):
    ds = random(seed, m=m, c=c, width=2 * m + 1)
    phi, y = features(seed, N + m, 2 * m + 1)[:, N:], ds.test_target.values[0]
    found = held_out_alignment(ds)
    centre = np.eye(m) - 1 / m
    for row in range(2):
        for name, p in (("kta_test", np.eye(m)), ("kta_centred_test", centre)):
            kernel, outer = p @ phi[row] @ phi[row].T @ p, p @ y @ y.T @ p
            size = np.linalg.norm(kernel) * np.linalg.norm(outer)
            expected = np.sum(kernel * outer) / size if np.ptp(y, axis=0).any() or name == "kta_test" else np.nan
            np.testing.assert_allclose(found[name][row], expected, rtol=1e-9, err_msg=name)
        left = np.linalg.svd(phi[row])[0]  # in descending order, without a kernel
        shares = np.cumsum(np.sum((left.T @ y) ** 2, axis=1)) / np.sum(y**2)
        np.testing.assert_allclose(found.cumulative_alignment_test[row], shares, atol=1e-9)


def test_every_measure_works_on_the_held_out_examples():
    ds = random(2)
    here, there = analysis.alignment(held_out(ds)), held_out_alignment(ds)
    np.testing.assert_array_equal(here.kta, there.kta_test)
    vectors, values = held_out(ds).eigenvector, linalg.eigenvalues(held_out(ds).ntk)
    np.testing.assert_allclose(ds.ntk_test.values @ vectors.values, vectors * values.values[:, None], atol=1e-9)
    assert analysis.eigenspace(held_out(ds)).prediction_in_eigenspace.sizes["eig"] == M


def test_nothing_is_computed_before_it_is_asked_for(no_compute):
    ds = random(0).chunk({"snapshot": 1})
    for found in (held_out(ds), held_out_alignment(ds), held_out_error(ds), kernel_regression(ds)):
        assert all(array.chunks for array in found.data_vars.values())


@pytest.mark.parametrize("name", ["ntk", "ntk_cross", "ntk_test"])
def test_a_kernel_that_is_not_finite_has_no_value_and_meets_no_eigensolver(name):
    ds = random(0)
    ds[name][0, 0, 0] = np.nan
    found = xr.merge([held_out_alignment(ds), kernel_regression(ds)])
    touched = ["cumulative_alignment_test", "kta_test"] if name == "ntk_test" else [
        "regression_squared_error", "regression_error_rate", "regression_correlation", "regression_distance",
        "regression_agreement",
    ]  # fmt: skip
    for column in touched:
        missing = np.isnan(found[column].values).reshape(2, -1)
        assert missing[0].all(), column
        assert not missing[1].any(), column


@pytest.mark.parametrize("measure", [held_out, held_out_alignment, held_out_error, kernel_regression])
def test_a_run_that_holds_nothing_out_is_told_how_to(tmp_path, measure):
    ds = analysis.open_run(mock_run(tmp_path, 0.1, 0, steps=2))
    with pytest.raises(InputError, match=r"A run has it, in the group snapshots, .*: record.test = m"):
        measure(ds)


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    options = {"steps": 4, "n": N, "k": K, "c": 2, "cadences": CADENCES}
    return mock_store(tmp_path_factory.mktemp("store"), learning_rates=[0.1, 0.3], seeds=[0], test=M, **options)


def test_a_sweep_has_the_held_out_targets_and_all_that_was_measured(root):
    ds = analysis.open_sweep(root)
    runs = list_runs(root)
    assert HELD_OUT.keys() < set(ds.data_vars)
    assert ds.ntk_cross.dims == ("snapshot", "test_sample", "sample")
    stored = np.concatenate([np.repeat(run.read("probe/test_target")[None], 3, axis=0) for run in runs])
    np.testing.assert_array_equal(ds.test_target, stored)
    assert "test_target" not in analysis.open_sweep(root, "scalars")
    np.testing.assert_allclose(held_out_error(ds).test_squared_error, ds.test_loss, rtol=1e-5)
    assert verify_root(root, deep=True) == []


def test_the_catalogue_has_the_measures_and_the_held_out_loss(root):
    analyze(root)
    ds = analysis.open_sweep(root).isel(snapshot=slice(0, 3)).compute()
    expected = xr.merge([held_out_error(ds), kernel_regression(ds), held_out_alignment(ds)])
    rows = query(
        root, "select measure, step, value from measures join runs using (run_id) where learning_rate = 0.1"
    ).rows
    found = {(measure, step): value for measure, step, value in rows}
    for row, step in enumerate((0, 2, 4)):
        for name in (
            "test_squared_error",
            "regression_distance",
            "regression_agreement",
            "kta_test",
            "kta_centred_test",
        ):
            np.testing.assert_allclose(found[name, step], expected[name][row], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(
            found["cumulative_alignment_test_3", step], expected.cumulative_alignment_test[row, 2]
        )
        assert ("cumulative_alignment_test_10", step) not in found  # there are fewer examples
    losses = query(root, "select step, test_loss, test_accuracy from alignment join runs using (run_id) "
                         "where learning_rate = 0.1 order by step").rows  # fmt: skip
    run = list_runs(root)[0]
    scalars = zip(
        *(run.read(f"scalars/{name}").tolist() for name in ("step", "test_loss", "test_accuracy")), strict=True
    )
    assert losses == list(scalars)
    assert query(root, "select distinct m from runs").rows == [(M,)]
    assert [row[:2] for row in query(root, OF_THE_PAGE).rows] == [
        (rate, step) for rate in (0.1, 0.3) for step in (0, 2, 4)
    ]
    assert query(root, "select count(test_loss) from snapshots").rows == [(6,)]


def test_another_kernel_is_not_mixed_with_that_of_the_held_out_examples(tmp_path):
    ds = analysis.open_run(mock_run(tmp_path, 0.1, 0, steps=2, n=N, k=K, test=M, conjugate=True))
    other = analysis.kernel(ds, "conjugate")
    assert not {"ntk_test", "ntk_cross"} & set(other.data_vars)
    assert {"prediction_test", "test_loss", "test_target"} <= set(other.data_vars)


def test_runs_with_and_without_held_out_examples_make_one_sweep(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=2, n=N, k=K, cadences=CADENCES)
    mock_run(tmp_path, 0.2, 0, steps=2, n=N, k=K, cadences=CADENCES, test=M)
    ds = analysis.open_sweep(tmp_path)
    for name in ("test_target", "ntk_cross", "test_loss"):
        missing = np.isnan(ds[name].values).reshape(4, -1)
        np.testing.assert_array_equal(missing, np.broadcast_to([[True], [True], [False], [False]], missing.shape))
    found = xr.merge([kernel_regression(ds), held_out_error(ds), held_out_alignment(ds)])
    for name, array in found.data_vars.items():
        missing = np.isnan(array.values).reshape(4, -1)
        np.testing.assert_array_equal(missing.all(1), [True, True, False, False], err_msg=name)


def test_runs_that_hold_out_different_numbers_are_refused(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=1, n=N, k=K, test=M)
    mock_run(tmp_path, 0.2, 0, steps=1, n=N, k=K, test=M + 1)
    with pytest.raises(InputError, match=r"runs of one dataset must share m: .* has m = 5, .* has m = 6"):
        analysis.open_sweep(tmp_path)
