"""One damaged snapshot is named, and everything else goes on as if nothing had happened, to the same bits."""

import logging
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from mock_store import mock_run

from analysis import alignment, catalog, open_sweep, results
from pipeline.cli import main
from pipeline.errors import DamagedStore


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Two runs."""
    root = tmp_path_factory.mktemp("clean")
    for rate in (0.1, 0.2):
        mock_run(root, rate, 0, steps=20, n=5, k=2)
    return root


@pytest.fixture
def damaged(clean, tmp_path):
    """A copy in which the kernel of step 2 of the first run is lost."""
    root = shutil.copytree(clean, tmp_path / "store")
    (root / "runs/lr-0.1_seed-0.zarr/snapshots/ntk/c.2.0.0").write_bytes(b"not a chunk")
    return root


def test_the_other_rows_of_a_sweep_have_the_same_bits(clean, damaged, caplog, measured):
    with pytest.raises(DamagedStore, match=r"snapshots/ntk/c\.2\.0\.0: checksum does not match"):
        open_sweep(damaged).load()
    whole = open_sweep(clean).load()
    rest = open_sweep(damaged, skip_damaged=True).load()
    at = np.flatnonzero((whole.run == "lr-0.1_seed-0") & (whole.step == 2))
    assert len(at) == 1
    xr.testing.assert_identical(rest, whole.drop_isel(snapshot=at))
    xr.testing.assert_identical(alignment(rest).compute(), alignment(whole.drop_isel(snapshot=at)).compute())
    (said,) = caplog.messages
    assert "lr-0.1_seed-0: row 2 of snapshots is left out" in said
    assert "c.2.0.0: checksum does not match" in said
    measured("R11", "one damaged kernel of a sweep", rows=len(whole.snapshot), left_out=len(at), others_changed=0)


def test_where_nothing_is_damaged_nothing_is_left_out(clean):
    xr.testing.assert_identical(open_sweep(clean, skip_damaged=True).load(), open_sweep(clean).load())


def test_a_chunk_that_rows_share_takes_them_all_and_no_other_run(damaged):
    (damaged / "runs/lr-0.1_seed-0.zarr/scalars/step/c.0").unlink()
    assert set(open_sweep(damaged, "scalars", skip_damaged=True).run.values) == {"lr-0.2_seed-0"}


def test_a_damaged_run_keeps_no_result_of_another_back_and_is_tried_again(clean, damaged, caplog):
    with caplog.at_level(logging.WARNING):
        states = {(row["run"], row["measure"]): row["state"] for row in results.analyze(damaged)}
    # What needs no kernel is computed of the damaged run too.
    damaged_keys = {key for key, state in states.items() if state == "damaged"}
    assert damaged_keys == {("lr-0.1_seed-0", measure) for measure in ("alignment", "evolution")}
    assert all("snapshots/ntk/c.2.0.0" in message for message in caplog.messages)
    (damaged / "runs/lr-0.1_seed-0.zarr/train/loss/c.0").unlink()
    assert {row[0] for row in catalog.query(damaged, "select run_id from runs").rows} == {"lr-0.2_seed-0"}
    called = CliRunner().invoke(main, ["analyze", str(damaged), "-q", "--json"])
    assert called.exit_code == 1
    assert "damaged" in called.stdout
    shutil.copytree(clean / "runs", damaged / "runs", dirs_exist_ok=True)
    results.analyze(damaged)
    assert {row["state"] for row in results.analyze(damaged)} == {"fresh"}
    assert len(catalog.query(damaged, "select run_id from runs").rows) == 2
