"""Derived results: right numbers at the right steps, computed once, kept while fresh, replaced when stale."""

import os
import shutil
from unittest.mock import patch

import dask
import numpy as np
import pytest
import xarray as xr
import zarr.storage
from mock_store import mock_run, mock_store

from analysis import results
from analysis.results import MEASURES, analyze, result
from pipeline.cadence import Cadence
from pipeline.disk import Directory
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.store import list_runs, read_run, run_path

N, K, STEPS = 8, 6, 12
# Scalars miss steps that the other groups have, and the other way round.
CADENCES = {"snapshots": Cadence(every=6), "spectra": Cadence(every=3), "scalars": Cadence(every=2)}
RUN = "lr-1.2_seed-1"
APPLY = [name for name in MEASURES if name != "linear"]  # whose theory is not of the network of a mock store


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Two runs with all their results."""
    root = tmp_path_factory.mktemp("store")
    mock_store(root, learning_rates=[0.1, 1.2], seeds=[1], steps=STEPS, n=N, k=K, cadences=CADENCES)
    analyze(root)
    return root


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """What these tests write need not survive a power cut, and the disk is what they wait for."""
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two short runs."""
    return mock_store(tmp_path_factory.mktemp("template"), learning_rates=[0.1, 0.2], seeds=[0], steps=4, n=4, k=2)


@pytest.fixture
def root(template, tmp_path):
    """A copy of them that a test may change, by replacing files: the files are shared with the other tests."""
    return shutil.copytree(template, tmp_path / "store", copy_function=os.link)


def kept(root):
    """Results on disk, hidden files too."""
    return sorted(str(path.relative_to(root / "analysis")) for path in (root / "analysis").rglob("*") if path.is_file())


def states(summary):
    return {(row["run"], row["measure"]): row["state"] for row in summary}


# --- numbers ----------------------------------------------------------------------------------------------------------


def dense(root, group):
    """The arrays of a group by plain xarray, the target as a vector, and rows by step."""
    path = run_path(root, RUN)
    ds = xr.open_zarr(path, group=group, chunks=None).load()
    return ds.assign_coords(step=ds.step), xr.open_zarr(path, group="probe", chunks=None).target.values[:, 0].astype(
        float
    )


def test_alignment_is_at_every_step_that_has_a_measure(analysed):
    ds = result(analysed, "alignment", RUN)
    np.testing.assert_array_equal(ds.step, [0, 2, 3, 4, 6, 8, 9, 10, 12])
    assert set(ds.data_vars) == {"loss", "ntk_sharpness", "kta", "kta_centred", "effective_rank", "c1", "c3", "c5"}
    assert all(array.dtype == float for array in ds.data_vars.values())


def test_alignment_is_that_of_the_stored_kernels(analysed):
    ds = result(analysed, "alignment", RUN)
    snapshots, y = dense(analysed, "snapshots")
    p = np.eye(N) - 1 / N
    for step, kernel in zip(snapshots.step.values, snapshots.ntk.values.astype(float), strict=True):
        row = ds.sel(step=step)
        centred, pyy = p @ kernel @ p, p @ np.outer(y, y) @ p
        values = np.linalg.eigvalsh(kernel).clip(1e-300)
        share = values / values.sum()
        np.testing.assert_allclose(row.kta, y @ kernel @ y / np.linalg.norm(kernel) / (y @ y), rtol=1e-6)
        np.testing.assert_allclose(
            row.kta_centred, np.sum(centred * pyy) / np.linalg.norm(centred) / np.linalg.norm(pyy), rtol=1e-9
        )
        np.testing.assert_allclose(row.effective_rank, np.exp(-(share * np.log(share)).sum()), rtol=1e-6)
    scalars, _ = dense(analysed, "scalars")
    at = ds.sel(step=scalars.step.values)
    np.testing.assert_allclose(at.kta, scalars.target_energy / scalars.frobenius_norm / (y @ y), rtol=1e-14)
    np.testing.assert_array_equal(at.ntk_sharpness, scalars.ntk_sharpness)
    spectra, _ = dense(analysed, "spectra")
    shares = (np.einsum("snk,n->sk", spectra.eigenvector.values.astype(float), y) ** 2 / (y @ y)).cumsum(axis=1)
    for k in (1, 3, 5):
        np.testing.assert_allclose(ds[f"c{k}"].sel(step=spectra.step.values), shares[:, k - 1], rtol=1e-12)


def test_alignment_is_missing_where_its_input_is(analysed):
    ds = result(analysed, "alignment", RUN)
    steps = {name: set(ds.step.values[ds[name].notnull().values]) for name in ds.data_vars}
    scalars, spectra, snapshots = {0, 2, 4, 6, 8, 10, 12}, {0, 3, 6, 9, 12}, {0, 6, 12}
    assert steps == {
        "loss": scalars | spectra, "ntk_sharpness": scalars, "kta": scalars, "kta_centred": snapshots,
        "effective_rank": snapshots, "c1": spectra, "c3": spectra, "c5": spectra,
    }  # fmt: skip
    train = xr.open_zarr(run_path(analysed, RUN), group="train", chunks=None)
    np.testing.assert_array_equal(ds.loss, train.loss.values[ds.step.values])


def test_modes_are_those_of_the_snapshots(analysed):
    ds = result(analysed, "modes", RUN)
    snapshots, y = dense(analysed, "snapshots")
    np.testing.assert_array_equal(ds.step, snapshots.step)
    shares = np.einsum("snk,n->sk", snapshots.eigenvector.values.astype(float), y) ** 2 / (y @ y)
    np.testing.assert_allclose(ds.mode_alignment, shares, rtol=1e-12)
    norms = np.linalg.norm(snapshots.ntk.values.astype(float), axis=(1, 2))
    np.testing.assert_allclose(ds.normalised_eigenvalue, snapshots.eigenvalue.values / norms[:, None], rtol=1e-6)


def test_phases_are_per_step_and_per_run(analysed):
    ds = result(analysed, "phases", RUN)
    scalars, _ = dense(analysed, "scalars")
    np.testing.assert_array_equal(ds.step, scalars.step)
    np.testing.assert_array_equal(ds.sharpness, scalars.ntk_sharpness)
    np.testing.assert_allclose(ds.line, 2 / 1.2)
    assert ds.crossed.dims == ()
    assert ds.crossed == (scalars.ntk_sharpness > 2 / 1.2).any()
    np.testing.assert_allclose(ds.final_sharpness_mean, scalars.ntk_sharpness[-2:].mean())


def test_several_outputs_and_few_eigenpairs(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=2, n=4, c=3, k=2)
    assert set(result(tmp_path, "alignment", "lr-0.1_seed-0").data_vars) >= {"kta", "c1"}
    assert "c3" not in result(tmp_path, "alignment", "lr-0.1_seed-0")


# --- freshness --------------------------------------------------------------------------------------------------------


def test_results_are_computed_once(root, monkeypatch):
    first = analyze(root)
    assert set(states(first).values()) == {"computed"}
    assert len(first) == 2 * len(APPLY)
    before = kept(root)
    monkeypatch.setattr(dask, "compute", lambda *args: pytest.fail("computed again"))
    assert set(states(analyze(root)).values()) == {"fresh"}
    result(root, "phases", "lr-0.1_seed-0")
    assert kept(root) == before


def test_the_same_numbers_give_the_same_bytes(root):
    analyze(root)
    before = {name: (root / "analysis" / name).read_bytes() for name in kept(root)}
    shutil.rmtree(root / "analysis")
    analyze(root)
    assert {name: (root / "analysis" / name).read_bytes() for name in kept(root)} == before


def test_a_run_that_went_on_is_computed_anew(root):
    mock_run(root, 0.3, 0, steps=2, n=4, k=2, end=None)
    analyze(root)
    before = kept(root)
    mock_run(root, 0.3, 0, steps=4, n=4, k=2, end=None)
    # Until then its older result is the newest there is.
    assert results.files(root)["lr-0.3_seed-0"].keys() == set(APPLY)
    changed = {key for key, state in states(analyze(root)).items() if state == "computed"}
    assert changed == {("lr-0.3_seed-0", measure) for measure in APPLY}
    assert result(root, "phases", "lr-0.3_seed-0").sizes["step"] == 5
    assert len(kept(root)) == len(before)  # superseded ones are gone
    assert len(set(kept(root)) & set(before)) == 2 * len(APPLY)


def test_a_run_that_turns_out_diverged_is_computed_anew(root):
    """Its rows, and so its head, are the same; its phases are not."""
    path = mock_run(root, 0.3, 0, steps=4, n=4, k=2, end=None)
    analyze(root)
    head = read_run(path).head
    mock_run(root, 0.3, 0, steps=4, n=4, k=2, end="diverged")
    assert read_run(path).head == head
    assert states(analyze(root))["lr-0.3_seed-0", "phases"] == "computed"


def test_a_new_version_of_a_measure_is_computed_anew(root, monkeypatch):
    analyze(root)
    monkeypatch.setitem(MEASURES, "modes", results.Measure(MEASURES["modes"].compute, ("snapshots",), version=2))
    computed = {measure for (_, measure), state in states(analyze(root)).items() if state == "computed"}
    assert computed == {"modes"}


def test_results_of_runs_that_are_gone_are_removed(root):
    analyze(root)
    shutil.rmtree(run_path(root, "lr-0.1_seed-0"))
    analyze(root)
    assert {name.split("/")[1].rsplit(".", 3)[0] for name in kept(root)} == {"lr-0.2_seed-0"}


def test_two_at_once_keep_each_others_results(root, monkeypatch):
    """While one analyser computes, the run goes on and another one analyses its newer rows."""
    mock_run(root, 0.3, 0, steps=2, n=4, k=2, end=None)
    compute = results._compute
    newer = []

    def overtaken(*args):
        monkeypatch.setattr(results, "_compute", compute)
        mock_run(root, 0.3, 0, steps=4, n=4, k=2, end=None)
        analyze(root)
        newer.extend(results._path(root, name, read_run(run_path(root, "lr-0.3_seed-0"))) for name in APPLY)
        return compute(*args)

    monkeypatch.setattr(results, "_compute", overtaken)
    analyze(root)
    assert newer
    assert all(path.exists() for path in newer)
    assert set(states(analyze(root)).values()) == {"fresh"}
    assert len(kept(root)) == 3 * len(APPLY), "what the slower one left is gone"


def test_only_the_measures_asked_for(root):
    assert {row["measure"] for row in analyze(root, ["modes"])} == {"modes"}
    assert {name.split("/")[0] for name in kept(root)} == {"modes"}


def test_a_kill_while_writing_leaves_no_result(root, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        analyze(root)
    monkeypatch.undo()
    assert kept(root) == []
    assert set(states(analyze(root)).values()) == {"computed"}


def test_a_result_that_goes_while_files_are_listed_is_not_the_newest(root, monkeypatch):
    analyze(root)
    there, gone, listed = results.files(root), "lr-0.1_seed-0.0000000000000000.zarr.zip", Directory.list
    monkeypatch.setattr(Directory, "list", lambda self, *args, **options: [*listed(self, *args, **options), gone])
    assert results.files(root) == there


def test_is_fresh_needs_every_measure(root):
    run = list_runs(root)[0]
    analyze(root, set(MEASURES) - {"modes"})
    assert not results.is_fresh(root, run)
    analyze(root, ["modes"])
    assert results.is_fresh(root, run)


# --- form -------------------------------------------------------------------------------------------------------------


def test_a_result_is_a_zarr_group_that_xarray_reads(root):
    analyze(root)
    path = results.files(root)["lr-0.1_seed-0"]["alignment"]
    with zarr.storage.ZipStore(path, mode="r") as store:
        ds = xr.open_zarr(store, consolidated=False, chunks=None).load()
    xr.testing.assert_identical(ds[sorted(ds.data_vars)], result(root, "alignment", "lr-0.1_seed-0"))
    assert ds.attrs == {"run": "lr-0.1_seed-0", "measure": "alignment", "head": list_runs(root)[0].head}
    assert ds.kta.attrs["long_name"] == "kernel target alignment"


def test_progress_is_told_before_each_batch(root):
    told = []
    analyze(root, progress=lambda fraction, note: told.append((fraction, note)))
    assert told[0] == (0.0, "alignment of lr-0.1_seed-0")
    assert all(0 <= fraction < 1 for fraction, _ in told)
    told.clear()
    analyze(root, progress=lambda fraction, note: told.append(note))
    assert told == []


def test_runs_without_rows_have_no_results(tmp_path):
    mock_run(tmp_path, 0.1, 0, steps=-1, n=4, k=1, end=None)
    assert analyze(tmp_path) == []
    with pytest.raises(MissingError, match=r"lr-0.1_seed-0 has no committed row in snapshots, which modes needs"):
        result(tmp_path, "modes", "lr-0.1_seed-0")


def test_a_measure_that_is_not_known(root):
    with pytest.raises(InputError, match="measure 'kta': must be one of alignment, modes, phases"):
        analyze(root, ["alignment", "kta"])
    with pytest.raises(InputError, match="measure 'kta': must be one of"):
        result(root, "kta", "lr-0.1_seed-0")
    assert not (root / "analysis").exists()


def test_a_run_that_is_not_known(root):
    with pytest.raises(MissingError, match="lr-9"):
        result(root, "phases", "lr-9")


def test_damage_is_named_and_keeps_nothing_else_back(root, caplog):
    chunk = run_path(root, "lr-0.2_seed-0") / "snapshots" / "ntk" / "c.1.0.0"
    data = chunk.read_bytes()[:-1] + b"?"
    chunk.unlink()
    chunk.write_bytes(data)
    found = states(analyze(root))
    damaged = {key for key, state in found.items() if state == "damaged"}
    assert damaged == {("lr-0.2_seed-0", measure) for measure in ("alignment", "evolution")}
    assert str(chunk) in caplog.text
    with pytest.raises(DamagedStore, match=r"lr-0\.2_seed-0 is damaged"):
        result(root, "alignment", "lr-0.2_seed-0")


def test_a_damaged_result_is_named(root):
    analyze(root)
    path = results.files(root)["lr-0.1_seed-0"]["phases"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=rf"{path}: .*; remove it, and `ntk-eos analyze` computes it again"):
        result(root, "phases", "lr-0.1_seed-0")
