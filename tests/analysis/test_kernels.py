"""Other kernels in the place of the NTK: every measure against numpy on the stored arrays."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from mock_store import CADENCES, mock_run, mock_store

import analysis
from analysis.catalog import query
from analysis.export import export_store
from analysis.results import analyze
from pipeline import schema
from pipeline.cadence import Cadence
from pipeline.errors import InputError
from pipeline.store import read_run, run_path
from pipeline.verify import verify_root

N, C, K = 9, 2, 4

# The query that the page shows.
PAGE = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text()
COSTS = re.search(r"-- what recording cost.*?;", PAGE, re.DOTALL).group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs that recorded more than the NTK."""
    folder = tmp_path_factory.mktemp("kernels")
    return mock_store(folder, seeds=[0], n=N, c=C, k=K, steps=12, conjugate=True, layers=True)


@pytest.fixture(scope="module")
def ds(root):
    return analysis.open_sweep(root)


def kta(kernel, y):
    return np.sum(kernel * (y @ y.T)) / (np.linalg.norm(kernel) * np.linalg.norm(y @ y.T))


def centred(kernel, y):
    p = np.eye(len(y)) - 1 / len(y)
    return kta(p @ kernel @ p, p @ y)


def test_alignment_of_another_kernel_is_that_computed_by_hand(ds):
    measured = analysis.alignment(analysis.kernel(ds, "conjugate")).compute()
    for row in range(ds.sizes["snapshot"]):
        one = ds.isel(snapshot=row)
        kernel, y = one.conjugate_ntk.values.astype(float), one.target.values.astype(float)
        vectors = np.linalg.eigh(kernel)[1][:, ::-1]
        modes = np.sum((vectors.T @ y) ** 2, axis=1)[:K] / np.sum(y**2)
        np.testing.assert_allclose(measured.kta[row], kta(kernel, y), rtol=1e-5)
        np.testing.assert_allclose(measured.kta_centred[row], centred(kernel, y), rtol=1e-5)
        np.testing.assert_allclose(measured.cumulative_alignment[row], np.cumsum(modes), rtol=1e-4, atol=1e-6)
    assert not np.allclose(measured.kta, analysis.alignment(ds).kta)


@pytest.mark.parametrize("group", ["scalars", "spectra", "snapshots"])
def test_every_group_has_the_other_kernel(root, group):
    ds = analysis.open_sweep(root, group)
    other = analysis.kernel(ds, "conjugate")
    for name in set(schema.OF_A_KERNEL) & schema.GROUPS[group].keys():
        np.testing.assert_array_equal(other[name], ds[f"conjugate_{name}"])
    assert set(other.data_vars) == set(schema.GROUPS[group]) | {"target"}
    assert other.attrs["kernel"] == "conjugate"


def test_other_measures_work_on_it_too(root):
    scalars = analysis.kernel(analysis.open_sweep(root, "scalars"), "conjugate")
    np.testing.assert_array_equal(analysis.phases(scalars).sharpness, scalars.ntk_sharpness)
    matched = analysis.at_loss(analysis.kernel(analysis.open_sweep(root), "conjugate"), 0.6)
    assert np.isfinite(analysis.alignment(matched).kta.values).any()


def test_it_is_lazy(ds, no_compute):
    analysis.alignment(analysis.kernel(ds, "conjugate"))
    analysis.alignment(analysis.layers(ds))


def test_the_ntk_is_the_dataset_itself(ds):
    xr.testing.assert_identical(analysis.kernel(ds, "ntk"), ds)


def test_an_unknown_kernel_names_those_there_are(ds):
    with pytest.raises(InputError, match="kernel 'nngp': this dataset has ntk, conjugate; name others in record"):
        analysis.kernel(ds, "nngp")


def test_alignment_by_layer_is_that_computed_by_hand(ds):
    by_layer = analysis.layers(ds)
    assert by_layer.layer.values.tolist() == ["W", "A"]
    measured = analysis.alignment(by_layer).compute()
    assert measured.kta.dims == ("snapshot", "layer")
    for row in range(ds.sizes["snapshot"]):
        one = ds.isel(snapshot=row)
        for layer, kernel in zip(("W", "A"), one.ntk_layer.values.astype(float), strict=True):
            y = one.target.values.astype(float)
            here = measured.isel(snapshot=row).sel(layer=layer)
            np.testing.assert_allclose(here.kta, kta(kernel, y), rtol=1e-6)
            np.testing.assert_allclose(here.kta_centred, centred(kernel, y), rtol=1e-6)
    np.testing.assert_allclose(by_layer.ntk.sum("layer"), ds.ntk, rtol=1e-5, atol=1e-5)


def test_without_parts_the_message_says_where_they_are(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=2)
    with pytest.raises(InputError, match=r"the kernel by layer needs `ntk_layer`.* with snapshots"):
        analysis.layers(analysis.open_sweep(tmp_path))


def test_runs_with_and_without_more_make_one_sweep(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=2, n=N, k=K, conjugate=True, layers=True)
    mock_run(tmp_path, 0.2, 0, steps=2, n=N, k=K, cadences={**CADENCES, "snapshots": Cadence(every=1)})
    ds = analysis.open_sweep(tmp_path)
    without = ds.learning_rate.values == 0.2
    for name in ("conjugate_ntk", "ntk_layer", "conjugate_solver_iterations"):
        missing = np.isnan(ds[name].values)
        np.testing.assert_array_equal(missing.reshape(len(without), -1).all(1), without, err_msg=name)
    assert ds.conjugate_ntk.dtype == ds.ntk_layer.dtype == np.float32
    assert np.isfinite(ds.ntk.values).all()


def test_parts_of_other_tensors_are_left_out_of_a_common_sweep(tmp_path, monkeypatch):
    mock_run(tmp_path, 0.1, 0, steps=1, n=N, k=K, layers=True)
    path = mock_run(tmp_path, 0.2, 0, steps=1, n=N, k=K, layers=True)
    assert "ntk_layer" in analysis.open_sweep(tmp_path)
    from pipeline.store import Run

    arrays = Run.node
    monkeypatch.setattr(
        Run, "node",
        lambda run, name: {**arrays(run, name), "attributes": {"names": ["U", "A"]}}
        if run.path == path and name.endswith("ntk_layer") else arrays(run, name),
    )  # fmt: skip
    assert "ntk_layer" not in analysis.open_sweep(tmp_path)


def test_a_store_with_more_is_verified_analysed_and_read_plainly(root):
    assert verify_root(root, deep=True) == []
    assert {row["state"] for row in analyze(root)} == {"computed"}
    tree = xr.open_datatree(run_path(root, "lr-0.1_seed-0"), engine="zarr")
    assert tree["snapshots"].conjugate_ntk.dims == ("step", "sample", "sample2")
    assert tree["snapshots"].ntk_layer.dims == ("step", "layer", "sample", "sample2")
    assert tree["hessian"].hessian_eigenvalue.dims == ("step", "hessian_eig")
    tree.close()


def test_a_store_with_more_is_exported(root, tmp_path):
    pytest.importorskip("h5netcdf")
    paths = list(export_store(root, "netcdf", tmp_path))
    assert len(paths) == 2
    with xr.open_datatree(paths[0], engine="h5netcdf") as tree:
        run = read_run(run_path(root, paths[0].stem))
        np.testing.assert_array_equal(tree["snapshots"].ntk_layer, run.read("snapshots/ntk_layer"))
        assert json.loads(tree["snapshots"].ntk_layer.attrs["names"]) == ["W", "A"]


def test_the_catalogue_has_the_costs_of_each_run(root):
    (cost,) = {row[1:] for row in query(root, COSTS).rows}
    assert cost == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
