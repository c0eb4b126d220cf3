"""The golden store of each format version is read for ever: by us, by xarray alone, and by an independent reader.

A test here that fails says that stores out there can no longer be read, or mean something else now. The cure is never
to make the store anew.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
from golden import make
from independent_reader import ORDER
from independent_reader import Run as IndependentRun
from mock_store import mock_run

from analysis import open_sweep
from pipeline import schema
from pipeline.errors import InputError
from pipeline.store import list_runs, read_run
from pipeline.verify import verify_root

GOLDEN = Path(__file__).parent / "format-1"
PATHS = {name: GOLDEN / "runs" / f"{name}.zarr" for name in make.RUNS}
HEADS = {
    "lr-0.5_seed-0_complete": "a43fc43a10f1bb5be427f78d3ef453b1",
    "lr-2.0_seed-0_diverged": "7672e5ec53b5c721cfa0445efacb77b9",
    "lr-0.5_seed-1_growing": "f357d9807d616493b87e65ce9f3ddff8",
}


def expected(run, group, name):
    """All committed values of an array, from the formula."""
    learning_rate, seed, groups, last, _ = make.RUNS[run]
    if group == "probe":
        return make.probe(seed)[name]
    steps = range(0, last + 1, make.EVERY[group])
    return np.array([make.row(groups[group], step, learning_rate, seed)[name] for step in steps])


def names(run, group):
    """The arrays of a group but for its digests."""
    return ["step", "learning_rate", "seed", "loss", *(name for name in make.RUNS[run][2][group] if name != "loss")]


CASES = [(run, group) for run in make.RUNS for group in ("probe", *make.RUNS[run][2])]


def test_every_digest_of_the_golden_store_is_right():
    assert verify_root(GOLDEN, deep=True) == []
    assert {run.run_id: run.head for run in list_runs(GOLDEN)} == HEADS
    assert {run.run_id: run.status for run in list_runs(GOLDEN)} == {
        name: status or "stale" for name, (*_, status) in make.RUNS.items()
    }


@pytest.mark.parametrize(("name", "group"), CASES)
def test_our_reader_gives_the_numbers(name, group):
    run = read_run(PATHS[name])
    for variable in ("sample_index", "input", "target") if group == "probe" else names(name, group):
        np.testing.assert_array_equal(run.read(f"{group}/{variable}"), expected(name, group, variable))


@pytest.mark.parametrize(("name", "group"), CASES)
def test_plain_xarray_gives_the_numbers(name, group):
    with xr.open_datatree(PATHS[name], engine="zarr") as tree:
        for variable in ("sample_index", "input", "target") if group == "probe" else names(name, group):
            np.testing.assert_array_equal(tree[group][variable].values, expected(name, group, variable))


@pytest.mark.parametrize("name", make.RUNS)
def test_an_independent_reader_gives_the_numbers_and_the_digests(name, measured):
    run = IndependentRun(PATHS[name])
    for group in make.RUNS[name][2]:
        for variable in names(name, group):
            np.testing.assert_array_equal(run.arrays[f"{group}/{variable}"], expected(name, group, variable))
        for row, digest in enumerate(run.arrays[f"{group}/digest"]):
            assert run.digest(group, row) == digest.tobytes()
    assert run.seed_digest().hex() == run.attrs["seed_digest"]
    assert run.head().hex() == HEADS[name]
    measured(
        "R19", f"golden store of format 1, {name}", arrays=len(run.arrays), rows=sum(run.attrs["lengths"].values()),
        values_that_differ=0,
    )  # fmt: skip


def test_a_store_of_the_next_format_is_refused_with_what_to_do(tmp_path, measured):
    for name, path in PATHS.items():
        copy = shutil.copytree(path, tmp_path / "runs" / path.name)
        document = json.loads((copy / "zarr.json").read_text())
        document["attributes"]["format_version"] += 1
        (copy / "zarr.json").write_text(json.dumps(document))
        said = f"{name}.zarr has format version 2; this ntk-eos reads 1: install a newer one"
        with pytest.raises(InputError, match=re.escape(said)):
            read_run(copy)
    with pytest.raises(InputError, match="install a newer one"):
        open_sweep(tmp_path)
    assert [problem.damage for problem in verify_root(tmp_path)] == [False] * len(PATHS)
    measured("R19", "stores of format 2 are refused with a hint", stores=len(PATHS), refused=len(PATHS))


def test_the_analysis_opens_it_as_a_sweep():
    ds = open_sweep(GOLDEN, "scalars")
    assert list(ds.learning_rate.values) == [0.5] * 9 + [2.0] * 2
    trace = np.concatenate([expected(name, "scalars", "trace") for name in sorted(make.RUNS)])
    np.testing.assert_array_equal(ds.trace.values, trace[[*range(9), 9, 10]])
    assert set(ds.status.values) == {"complete", "stale", "diverged"}


def test_the_checkpoint_is_a_safetensors_file():
    safetensors = pytest.importorskip("safetensors.numpy")
    run = read_run(PATHS["lr-0.5_seed-0_complete"])
    tensors = safetensors.load((run.path / run.attrs["checkpoint"]["name"]).read_bytes())
    np.testing.assert_array_equal(tensors["model.weight"], make.values("weight", 10, (6,)))


def test_what_is_written_today_has_the_same_heads(tmp_path):
    """The names, the order and the bytes that a digest covers are part of the format."""
    with patch("os.fsync"):
        make.make(tmp_path)
    assert {run.run_id: run.head for run in list_runs(tmp_path)} == HEADS


KINDS = {
    "of one output": {"c": 1},
    "with other kernels and layers": {"conjugate": True, "layers": True},
    "of all pairs of outputs": {"full": True},
    "with held-out examples": {"test": 4},
    "diverged": {"end": "diverged"},
    "growing": {"end": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_reader_reads_what_is_written_today(tmp_path, measured, kind):
    path = mock_run(tmp_path, 0.1, 0, **{"steps": 7, "n": 5, "c": 2, "k": 3} | KINDS[kind])
    ours, theirs = read_run(path), IndependentRun(path)
    assert theirs.arrays.keys() == {
        f"{group}/{name}" for group in ("probe", *ours.lengths) for name in ours.arrays(group)
    }
    for name, values in theirs.arrays.items():
        np.testing.assert_array_equal(values, ours.read(name))
    assert theirs.head().hex() == ours.head
    measured("R19", f"an independent reader of a run of today, {kind}", arrays=len(theirs.arrays), values_that_differ=0)


def test_the_page_lists_every_variable_of_a_digest_in_its_order():
    growing = {group: [*variables, *schema.MORE.get(group, ())] for group, variables in schema.GROUPS.items()}
    own = {group: schema.variables_of(group, names).values() for group, names in growing.items()}
    certified = {group: [one.name for one in variables if not one.volatile] for group, variables in own.items()}
    assert ORDER == {"row": list(schema.ROW), **certified, "kernel": list(schema.OF_A_KERNEL)}


def test_the_independent_reader_is_independent():
    code = "import sys, independent_reader; print({'zarr', 'pipeline', 'analysis', 'xarray'} & sys.modules.keys())"
    tests = Path(__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"
