"""A store needs none of this project's code: these tests import xarray, zarr, dask and numpy only.

`make test` runs them in an environment that has nothing else, on a store written elsewhere (NTK_EOS_STORE).
"""

import json
import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

COMMITTED = {"train": 21, "scalars": 21}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished run of 41 steps and one that stopped growing after 21."""
    written = os.environ.get("NTK_EOS_STORE")
    if written:
        return Path(written)
    folder = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, str(Path(__file__).parent / "make_store.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, str]:
    """Paths of the runs by the status in their commit record."""
    paths = sorted(glob(f"{root}/runs/*.zarr"))
    return {json.loads(Path(path, "zarr.json").read_text())["attributes"]["status"]: path for path in paths}


@pytest.mark.parametrize("status", ["complete", "running"])
def test_a_run_opens_as_a_data_tree(runs, status):
    with xr.open_datatree(runs[status]) as tree:
        assert set(tree.children) == {"probe", "scalars", "snapshots", "spectra", "train"}
        assert tree["train"].step.values.tolist() == list(range(41 if status == "complete" else 21))
        for group in ("scalars", "snapshots", "spectra", "train"):
            for name, variable in tree[group].variables.items():
                assert np.isfinite(variable.values).all(), f"{group}/{name} shows rows that were not committed"
        kernel = tree["snapshots"].ntk.values
        np.testing.assert_array_equal(kernel, kernel.transpose(0, 2, 1))


@pytest.mark.parametrize("status", ["complete", "running"])
def test_alignment_is_one_line_of_xarray(runs, status):
    with xr.open_datatree(runs[status]) as tree:
        y = tree["probe"].target
        ds = tree["snapshots"]
        kta = ds.target_energy / (ds.frobenius_norm * float((y**2).sum()))
        energy = np.einsum("sij,ic,jc->s", ds.ntk.values.astype(float), y.values, y.values)
        norms = np.linalg.norm(ds.ntk.values.astype(float), axis=(1, 2))
        np.testing.assert_allclose(kta, energy / (norms * float((y**2).sum())), rtol=1e-5)


def test_all_runs_open_as_one_dataset(root):
    ds = xr.open_mfdataset(sorted(glob(f"{root}/runs/*.zarr")), group="snapshots", combine="nested", concat_dim="step")
    assert ds.ntk.dims == ("step", "sample", "sample2")
    assert set(ds.learning_rate.values) == {float(rate) for rate in ds.learning_rate.values}
    assert len(set(ds.learning_rate.values)) == 2
    assert np.isfinite(ds.ntk.mean().compute())


@pytest.mark.parametrize("group", ["snapshots", "spectra", "scalars", "train"])
@pytest.mark.parametrize("status", ["complete", "running"])
def test_a_group_opens_by_its_own_path_at_the_same_length(runs, status, group):
    by_path = xr.open_zarr(f"{runs[status]}/{group}")
    by_name = xr.open_zarr(runs[status], group=group)
    assert by_path.sizes == by_name.sizes
    if status == "running" and group in COMMITTED:
        assert by_path.sizes["step"] == COMMITTED[group]


def test_a_finished_run_reads_the_same_without_consolidated_metadata(runs):
    for group in ("snapshots", "train"):
        consolidated = xr.open_zarr(runs["complete"], group=group)
        plain = xr.open_zarr(runs["complete"], group=group, consolidated=False)
        xr.testing.assert_identical(consolidated.load(), plain.load())


def test_zarr_alone_reads_it(runs):
    group = zarr.open_group(runs["complete"], mode="r")
    assert group["snapshots/ntk"].metadata.dimension_names == ("step", "sample", "sample2")
    assert group["train/loss"][:].min() > 0
