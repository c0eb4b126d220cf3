"""Runs on disk: what readers see, what a resume gives, and what is refused."""

import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import glob
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import writer_loop
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from writer_loop import (
    CADENCES,
    DIMS,
    RUN,
    C,
    N,
    advance,
    assert_rows_are_those_of_their_steps,
    checkpoint,
    next_step,
    open_writer,
    probe,
    row,
    rows,
    write_run,
)  # fmt: skip

from pipeline import schema, store
from pipeline.disk import Directory
from pipeline.errors import DamagedStore, InputError, MissingError, NtkEosError, RunLocked
from pipeline.schema import GROUPS, Variable, row_variables
from pipeline.store import NonFiniteRow, find_run, list_runs, open_root, read_run, run_path, runs_directory

STEPS = 11


@pytest.fixture(autouse=True)
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


real_chunk_shape = schema.chunk_shape


def small_chunks(variable, shape, itemsize):
    """As `chunk_shape`, for arrays of a few rows: 4 to a shared chunk, bands of at most 40 bytes, tiles of side 4."""
    if variable.rows_per_chunk is not None:
        return (4, *shape[1:])
    if len(shape) == 3 and shape[1] == shape[2]:
        return (1, 4, 4)
    return real_chunk_shape(variable, shape, itemsize)


@contextmanager
def cut(layout):
    """Runs that are created inside have chunks of the real sizes, or so small that every array needs several."""
    if layout == "real":
        yield
    else:
        with patch.object(schema, "chunk_shape", small_chunks), patch.object(schema, "BAND_BYTES", 40):
            yield


def fail_at(name):
    """Make the disk refuse to replace one file."""
    put = Directory.put

    def refusing(self, key, data, **options):
        if key == name:
            raise OSError(28, "No space left on device")
        put(self, key, data, **options)

    return patch.object(Directory, "put", refusing)


def leave_half_a_commit(root, steps, **options):
    """A commit that is cut off before its record: all its chunks are there, and nothing names them."""
    groups = options.get("groups", tuple(GROUPS))
    with open_writer(root, **options) as writer, fail_at("zarr.json"), pytest.raises(OSError, match="No space"):
        advance(writer, steps, groups=groups)


# --- what readers see ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["real", "small"])
def layout(request):
    return request.param


@pytest.fixture(scope="module", params=["growing", "complete"])
def path(request, layout, tmp_path_factory):
    """A run of `STEPS` steps; growing, it has the chunks of a further commit that was never published."""
    root = tmp_path_factory.mktemp("store")
    with patch("os.fsync", lambda handle: None), cut(layout):
        write_run(root, STEPS, status="complete" if request.param == "complete" else None)
        if request.param == "growing":
            leave_half_a_commit(root, STEPS + 9)
    return str(run_path(root, RUN))


def assert_shows_the_committed_rows(ds, group):
    steps = [step for step in range(STEPS) if step % CADENCES[group] == 0]
    assert ds.sizes["step"] == len(steps)
    for name in GROUPS[group] | schema.ROW:
        expected = np.stack([np.asarray(row(group, step)[name]).astype(ds[name].dtype) for step in steps])
        np.testing.assert_array_equal(ds[name].values, expected, err_msg=f"{group}/{name}")


@pytest.mark.parametrize("group", GROUPS)
def test_every_plain_reader_sees_the_committed_rows_and_no_others(path, group):
    assert_shows_the_committed_rows(xr.open_zarr(path, group=group), group)
    assert_shows_the_committed_rows(xr.open_zarr(f"{path}/{group}"), group)
    assert_shows_the_committed_rows(xr.open_datatree(path)[group].to_dataset(), group)
    assert_shows_the_committed_rows(xr.open_dataset(path, group=group, engine="zarr"), group)
    opened = zarr.open_group(path, mode="r")
    run = read_run(path)
    for name, node in run.arrays(group).items():
        np.testing.assert_array_equal(opened[group][name][...], run.read(f"{group}/{name}"))
        assert opened[group][name].chunks == tuple(node["chunk_grid"]["configuration"]["chunk_shape"])


def test_the_values_are_those_that_were_written(path):
    assert assert_rows_are_those_of_their_steps(read_run(path)) == 11 + 6 + 4 + 3 + 2


def test_rows_carry_their_coordinates_their_units_and_the_probe(path):
    with xr.open_datatree(path) as tree:
        assert set(tree.children) == {"probe", *GROUPS}
        assert set(tree["snapshots"].ntk.coords) == {"step", "learning_rate", "seed", "loss"}
        assert "loss" in tree["train"].data_vars
        assert set(tree["train"].accuracy.coords) == {"step", "learning_rate", "seed"}
        assert tree["snapshots"].ntk.attrs["long_name"] == "neural tangent kernel"
        assert tree["train"].wall_time.attrs["units"] == "s"
        assert tree.attrs["Conventions"] == schema.CONVENTIONS
        for name, values in probe().items():
            np.testing.assert_array_equal(tree["probe"][name].values, values)
        assert tree["probe"].input.dims == ("sample", "feature")


def test_many_runs_open_as_one_dataset(tmp_path):
    write_run(tmp_path, STEPS, run_id="a")
    write_run(tmp_path, 6, run_id="b", status=None)
    sweep = xr.open_mfdataset(
        sorted(glob(f"{tmp_path}/runs/*.zarr")), group="snapshots", combine="nested", concat_dim="step"
    )
    assert sweep.step.values.tolist() == [0, 5, 10, 0, 5]
    np.testing.assert_array_equal(sweep.ntk.values[3:], sweep.ntk.values[:2])


@pytest.mark.parametrize("path", ["complete"], indirect=True)
def test_a_finished_run_needs_no_consolidated_metadata(path):
    for group in GROUPS:
        plain = xr.open_zarr(path, group=group, consolidated=False)
        xr.testing.assert_identical(plain.load(), xr.open_zarr(path, group=group).load())


@pytest.mark.parametrize("path", ["growing"], indirect=True)
def test_without_them_a_growing_run_shows_its_plan_in_fill_values(path):
    """A documented limit: the rows that nobody committed look like numbers only to those who skip the record."""
    plain = xr.open_zarr(path, group="scalars", consolidated=False)
    assert plain.sizes["step"] == 50
    assert np.isnan(plain.trace[10:]).all()
    assert (plain.step[10:] == -1).all()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_rows_of_any_array_can_be_read(path, data):
    run = read_run(path)
    names = [f"{group}/{name}" for group in ("probe", *GROUPS) for name in run.arrays(group)]
    name = data.draw(st.sampled_from(names))
    length = run.node(name)["shape"][0]
    start, stop = data.draw(st.integers(0, length + 2)), data.draw(st.integers(0, length + 2))
    whole = zarr.open_group(path, mode="r")[name][...]
    read = run.read(name, start, stop)
    np.testing.assert_array_equal(read, whole[start:stop])
    assert read.dtype == whole.dtype
    within = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in whole.shape[1:]]
    within = within[: data.draw(st.integers(0, len(within)))]
    part = whole[(slice(start, stop), *(slice(*bounds) for bounds in within))]
    np.testing.assert_array_equal(run.read(name, start, stop, within), part)


def test_a_row_that_is_gone_is_named_and_the_others_are_read(tmp_path):
    run = write_run(tmp_path, STEPS)
    gone = run.path / "snapshots/ntk/c.1.0.0"
    gone.unlink()
    with pytest.raises(DamagedStore, match=f"{re.escape(str(gone))} does not exist"):
        run.read("snapshots/ntk")
    np.testing.assert_array_equal(run.read("snapshots/ntk", 2)[0], row("snapshots", 10)["ntk"].astype("f4"))
    gone.write_bytes(b"")
    with pytest.raises(DamagedStore, match=f"{re.escape(str(gone))}: checksum does not match"):
        run.read("snapshots/ntk", 1, 2)


# --- going on --------------------------------------------------------------------------------------------------------


def data_files(path):
    """All files of a run that readers' numbers come from."""
    return {key: Directory(path).get(key) for key in Directory(path).list() if "/" in key}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 23 steps in one commit."""
    with patch("os.fsync", lambda handle: None):
        return write_run(tmp_path_factory.mktemp("store"), 23, every=1000)


def write_in_parts(root, stops, **options):
    """Write a run of 23 steps that stops as told: (step, what happens there)."""
    groups = options.get("groups", tuple(GROUPS))
    writer = open_writer(root, **options)
    for stop, how in sorted(stops):
        if how == "kill":  # after some rows that are not committed
            for step in range(next_step(writer), stop):
                writer.append(step, rows(step, groups))
        elif next_step(writer) < stop and how != "half":
            advance(writer, stop, groups=groups)
        if how != "commit":
            writer.close()
            if how == "half":
                leave_half_a_commit(root, max(stop, 1), **options)
            writer = open_writer(root, **options)
    with writer:
        advance(writer, 23, groups=groups)
        writer.finish("complete", "steps")
    return find_run(root, options.get("run_id", RUN))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 23 steps in one commit, of two groups, with small chunks."""
    with patch("os.fsync", lambda handle: None), cut("small"):
        return write_run(tmp_path_factory.mktemp("store"), 23, every=1000, groups=("train", "spectra"))


interruptions = st.lists(
    st.tuples(st.integers(0, 22), st.sampled_from(["commit", "reopen", "kill", "half"])), max_size=5
)


@given(stops=interruptions)
@settings(max_examples=15, deadline=None)
def test_however_a_run_is_interrupted_it_ends_with_the_same_head_and_the_same_bytes(stops, whole, tmp_path_factory):
    with cut("small"):
        parts = write_in_parts(tmp_path_factory.mktemp("store"), stops, groups=("train", "spectra"))
    assert parts.head == whole.head
    assert data_files(parts.path) == data_files(whole.path)


def test_a_run_that_was_interrupted_in_every_way_has_the_same_head_and_the_same_bytes(tmp_path, undisturbed):
    stops = [(3, "commit"), (5, "half"), (7, "reopen"), (8, "kill"), (13, "half"), (13, "kill"), (20, "commit")]
    run = write_in_parts(tmp_path, stops)
    assert run.head == undisturbed.head
    assert data_files(run.path) == data_files(undisturbed.path)


def test_the_head_does_not_depend_on_the_chunks(tmp_path, undisturbed):
    with cut("small"):
        run = write_run(tmp_path, 23)
    assert run.node("snapshots/ntk")["chunk_grid"]["configuration"]["chunk_shape"] == [1, 4, 4]
    assert run.head == undisturbed.head


def test_the_next_writer_starts_from_the_last_commit_with_its_checkpoint(tmp_path):
    with open_writer(tmp_path) as writer:
        assert (writer.last_step, writer.checkpoint(), writer.status) == (None, None, "running")
        advance(writer, 5, every=2)
        writer.append(5, rows(5))
        assert writer.last_step == 5
    leave_half_a_commit(tmp_path, 9)
    with open_writer(tmp_path) as writer:
        assert (writer.last_step, writer.checkpoint()) == (4, checkpoint(4))
        advance(writer, 6)
    with open_writer(tmp_path) as writer:
        assert (writer.last_step, writer.checkpoint()) == (5, checkpoint(5))


def test_a_run_may_outgrow_its_plan(tmp_path, undisturbed):
    with cut("small"):
        write_run(tmp_path, 7, capacity=dict.fromkeys(GROUPS, 2), status=None)
    assert assert_rows_are_those_of_their_steps(find_run(tmp_path, RUN)) == 7 + 4 + 3 + 2 + 1
    run = write_run(tmp_path, 23, capacity=dict.fromkeys(GROUPS, 1))
    assert run.head == undisturbed.head
    assert xr.open_zarr(run.path, group="train", consolidated=False).sizes["step"] == 23


def test_a_finished_run_can_be_taken_up_again(tmp_path, undisturbed):
    first = write_run(tmp_path, 9)
    with open_writer(tmp_path) as writer:
        assert writer.status == "complete"
        assert find_run(tmp_path, RUN).document == first.document
        writer.reopen(dict.fromkeys(GROUPS, 20))
        assert find_run(tmp_path, RUN).status == "running"
        assert xr.open_zarr(first.path, group="train").sizes["step"] == 9
        assert xr.open_zarr(first.path, group="train", consolidated=False).sizes["step"] == 29
    assert find_run(tmp_path, RUN).status == "stale"
    with open_writer(tmp_path) as writer:
        assert (writer.status, writer.attrs["stop_reason"]) == ("running", None)
        advance(writer, 23)
        writer.finish("complete", "loss")
    last = find_run(tmp_path, RUN)
    assert (last.head, last.status, last.attrs["stop_reason"]) == (undisturbed.head, "complete", "loss")
    assert assert_rows_are_those_of_their_steps(last) == 23 + 12 + 8 + 5 + 4


def test_finishing_twice_changes_nothing(tmp_path):
    with open_writer(tmp_path) as writer:
        advance(writer, 3)
        writer.finish("complete", "steps")
        before = data_files(writer.directory.path), writer.directory.get("zarr.json")
        writer.finish("complete", "steps")
        assert (data_files(writer.directory.path), writer.directory.get("zarr.json")) == before


def test_a_run_is_finished_only_when_every_copy_of_its_metadata_is_right(tmp_path):
    with open_writer(tmp_path) as writer, fail_at("train/zarr.json"), pytest.raises(OSError, match="No space"):
        advance(writer, 3)
    run = find_run(tmp_path, RUN)
    assert run.lengths["train"] == 3
    assert xr.open_zarr(run.path / "train").sizes["step"] == 0
    with open_writer(tmp_path) as writer, fail_at("train/zarr.json"), pytest.raises(OSError, match="No space"):
        writer.finish("complete", "steps")
    assert find_run(tmp_path, RUN).attrs["status"] == "running"
    with open_writer(tmp_path) as writer:
        writer.finish("complete", "steps")
    assert xr.open_zarr(run.path / "train").sizes["step"] == 3


def test_a_writer_whose_commit_failed_says_so_and_the_next_one_goes_on(tmp_path, undisturbed):
    """It cannot know whether the record is out, and with it which checkpoint must not be overwritten."""
    with open_writer(tmp_path) as writer:
        advance(writer, 4)
        before = writer.attrs["commits"]
        writer.append(4, rows(4))
        with fail_at("zarr.json"), pytest.raises(OSError, match="No space"):
            writer.commit(checkpoint(4))
        for again in (lambda: writer.commit(b""), lambda: writer.reopen({})):
            with pytest.raises(NtkEosError, match=r"an earlier commit of .* failed: open the run again to go on"):
                again()
        writer.heartbeat("failed")
        run = find_run(tmp_path, RUN)
        assert run.heartbeat["commits"] == run.attrs["commits"] == before
    assert write_run(tmp_path, 23).head == undisturbed.head


def test_rows_that_wait_must_be_committed_before_the_end(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.append(0, rows(0))
        assert writer.pending_bytes >= sum(np.asarray(v).nbytes for v in (np.zeros((N, N), "f4"), np.zeros(N * C)))
        with pytest.raises(ValueError, match="commit them before the run is finished"):
            writer.finish("complete", "steps")
        writer.commit(b"")
        assert writer.pending_bytes == 0
        writer.finish("complete", "steps")


def test_notes_are_published_with_the_next_commit(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.note(environment_changes=["torch"])
        assert "environment_changes" not in find_run(tmp_path, RUN).attrs
        advance(writer, 1)
    assert find_run(tmp_path, RUN).attrs["environment_changes"] == ["torch"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("train", "loss", np.nan),
        ("train", "grad_norm", np.inf),
        ("snapshots", "ntk", np.full((N, N), 1e39)),  # finite in float64, infinite in float32
        ("spectra", "eigenvalue", np.array([1.0, -np.inf, 0.0])),
    ],
)
def test_a_row_that_is_not_finite_is_refused_whole(tmp_path, group, name, value):
    with open_writer(tmp_path) as writer:
        bad = rows(0)
        bad[group] = {**bad[group], name: value}
        with pytest.raises(NonFiniteRow, match=f"{group}/{name} at step 0 is not finite"):
            writer.append(0, bad)
        assert (writer.last_step, writer.pending_bytes) == (None, 0)
        advance(writer, 2)
    assert assert_rows_are_those_of_their_steps(find_run(tmp_path, RUN)) == 2 + 1 + 1 + 1 + 1
    assert find_run(tmp_path, RUN).head == write_run(tmp_path / "clean", 2).head


def test_a_row_of_another_shape_or_out_of_order_is_refused_whole(tmp_path):
    with open_writer(tmp_path) as writer:
        bad = rows(0)
        bad["snapshots"] = {**bad["snapshots"], "ntk": np.zeros((N, N + 1))}
        with pytest.raises(ValueError, match=r"snapshots/ntk at step 0: shape \(6, 7\), planned \(6, 6\)"):
            writer.append(0, bad)
        advance(writer, 3)
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"step {step} after step 2"):
                writer.append(step, rows(step))
        advance(writer, 4)
    assert find_run(tmp_path, RUN).head == write_run(tmp_path / "clean", 4).head


def test_a_row_is_what_it_was_when_it_was_appended(tmp_path):
    """Training loops update their arrays in place."""
    with open_writer(tmp_path) as writer:
        appended = rows(0)
        appended["snapshots"]["parameter"] = buffer = appended["snapshots"]["parameter"].astype("float32")
        writer.append(0, appended)
        buffer[:] = 0
        writer.commit(b"")
    np.testing.assert_array_equal(
        find_run(tmp_path, RUN).read("snapshots/parameter")[0], row("snapshots", 0)["parameter"].astype("float32")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": probe(1)}, "was recorded on other data: write to another root, or remove .*"),
        ({"identity": {"model": "other"}}, "was recorded on other data"),
        ({"dims": {**DIMS, "eig": 2}}, r"other variables or shapes \(.*eigenvalue.*\): write to another root"),
        ({"dtype": "float64"}, r"other variables or shapes \(.*parameter.*\)"),
        ({"groups": ("train", "scalars", "spectra", "hessian")}, r"other variables or shapes \(snapshots/step, .*\)"),
    ],
    ids=["probe", "identity", "eigenpairs", "dtype", "groups"],
)
def test_a_run_of_that_name_with_other_data_is_refused_and_left_alone(tmp_path, options, message):
    run = write_run(tmp_path, 3, status=None)
    before = data_files(run.path)
    with pytest.raises(InputError, match=f"run {RUN} in .*{message}"):
        open_writer(tmp_path, **options)
    assert data_files(run.path) == before
    assert run.status == "stale"  # the lease was given back
    write_run(tmp_path, 5)


def test_a_group_that_the_run_was_not_planned_with_is_refused(tmp_path):
    write_run(tmp_path, 3, groups=("train",), status=None)
    with pytest.raises(InputError, match=r"other variables or shapes \(hessian, scalars, snapshots\)"):
        open_writer(tmp_path)


def other_process(root, *arguments):
    command = [sys.executable, writer_loop.__file__, str(root), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_writer_is_refused_by_name_until_the_first_is_gone(tmp_path):
    with other_process(tmp_path, "hold") as first:
        assert first.stdout.readline() == "open\n"
        run = find_run(tmp_path, RUN)
        assert run.status == "running"
        message = rf"{RUN}.zarr is being written by process {first.pid} on .* since .*Z; wait for it or stop it"
        with pytest.raises(RunLocked, match=message):
            open_writer(tmp_path)
        write_run(tmp_path, 2, run_id="another")
        first.kill()
    assert run.status == "stale"
    write_run(tmp_path, 2)
    assert find_run(tmp_path, RUN).status == "complete"


def test_of_many_that_create_a_run_at_once_one_wins_and_the_others_are_told(tmp_path):
    processes = [other_process(tmp_path, "hold") for _ in range(4)]
    try:
        lines = sorted(process.stdout.readline() for process in processes)
        assert lines == ["", "", "", "open\n"]
    finally:
        errors = [process.communicate()[1] for process in processes]
    assert sum("RunLocked" in error for error in errors) == 3
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != ".lock"] == [f"{RUN}.zarr"]


def test_a_creation_that_was_cut_off_is_cleared_away_by_the_next(tmp_path):
    with fail_at("zarr.json"), pytest.raises(OSError, match="No space"):
        open_writer(tmp_path, run_id="a[b]*")
    assert len(list((tmp_path / "runs").glob(".new-*"))) == 1
    assert list_runs(tmp_path) == []
    write_run(tmp_path, 1)
    assert list((tmp_path / "runs").glob(".new-*")) == []


def test_a_run_cannot_be_named_out_of_its_root(tmp_path):
    with pytest.raises(InputError, match="printable ASCII characters without slashes"):
        open_writer(tmp_path / "root", run_id="../../escaped")
    assert list(tmp_path.glob("*.zarr")) == []


# --- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["interrupted", "failed"])
def test_an_unfinished_run_says_how_it_stopped(tmp_path, said):
    with open_writer(tmp_path) as writer:
        advance(writer, 2)
        writer.heartbeat(said, error="why")
        assert find_run(tmp_path, RUN).status == "running"
    run = find_run(tmp_path, RUN)
    assert (run.status, run.heartbeat["error"], run.heartbeat["last_step"]) == (said, "why", 1)


@pytest.mark.parametrize("said", [b"", b"{", b"[1]", b'{"status": "complete"}', b"[" * 10_000, None])
def test_an_unfinished_run_whose_heartbeat_says_nothing_is_stale(tmp_path, said):
    run = write_run(tmp_path, 2, status=None)
    beat = run.path / "run.json"
    beat.unlink() if said is None else beat.write_bytes(said)
    assert find_run(tmp_path, RUN).status == "stale"


@pytest.mark.parametrize("status", ["complete", "diverged"])
def test_a_finished_run_keeps_its_status_whatever_its_heartbeat_says(tmp_path, status):
    run = write_run(tmp_path, 2, status=status)
    assert run.heartbeat["status"] == status
    (run.path / "run.json").write_text('{"status": "failed"}')
    assert find_run(tmp_path, RUN).status == status


def test_a_commit_tells_the_heartbeat_what_the_loop_told_it(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.append(0, rows(0))
        writer.commit(b"", loss=0.5, steps=7)
    beat = find_run(tmp_path, RUN).heartbeat
    assert (beat["loss"], beat["steps"], beat["commits"], beat["pid"]) == (0.5, 7, 1, os.getpid())


# --- digests ---------------------------------------------------------------------------------------------------------


def digest(*parts):
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def test_the_head_is_the_documented_chain(tmp_path):
    """Recomputed here from the values, with nothing of the store's."""

    def described(group, name, value):
        little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"))
        return f"{group}\0{name}\0{value.dtype.name}\0{value.shape}\0".encode() + little.tobytes()

    run = write_run(tmp_path, STEPS)
    examples = [described("probe", name, probe()[name]) for name in ("input", "sample_index", "target")]
    head = digest(b'{"model":"none"}', digest(*examples))
    assert run.attrs["seed_digest"] == head.hex()
    for step in range(STEPS):
        for group in ("hessian", "scalars", "snapshots", "spectra", "train"):
            if step % CADENCES[group] == 0:
                index = step // CADENCES[group]
                names = [variable.name for variable in row_variables(group) if not variable.volatile]
                link = digest(*(described(group, name, run.read(f"{group}/{name}")[index]) for name in names))
                assert run.read(f"{group}/digest")[index].tobytes() == link
                head = digest(head, link)
    assert run.head == head.hex()


def test_the_digests_of_format_1_never_change():
    train = {"step": np.int64(3), "learning_rate": np.float64(0.1), "seed": np.int64(0), "loss": np.float64(0.25)}
    train |= {"accuracy": np.float64(1.0), "grad_norm": np.float64(2.0)}
    kernel, ntk = np.arange(6, dtype="f4").reshape(2, 3), Variable("ntk", (), "", "", "", "")
    seed = store.chain_seed({"b": 1.5, "a": [None]}, {"target": np.ones((2, 1), "f4")})
    assert store.row_digest("train", row_variables("train"), train).hex() == "f33638dcee086d6d5b53ebfdc54a0e98"
    assert store.row_digest("snapshots", [ntk], {"ntk": kernel}).hex() == "ad44af42391efffdffa3608d503bc9ff"
    assert seed.hex() == "6456486196d5e6c892e3ecd78d2fb080"


@pytest.mark.parametrize("group", GROUPS)
def test_the_head_covers_every_value_but_times(tmp_path, group):
    plain = write_run(tmp_path / "plain", 1, groups=(group,)).head
    for number, name in enumerate([*GROUPS[group], "learning_rate", "seed", "loss"]):
        changed = row(group, 0)
        changed[name] = np.asarray(changed[name]) + 1
        with open_writer(tmp_path / str(number), groups=(group,)) as writer:
            writer.append(0, {group: changed})
            writer.commit(b"")
        head = find_run(tmp_path / str(number), RUN).head
        assert (head == plain) == (name == "wall_time" or name.startswith("seconds_")), name


def test_the_head_covers_the_identity_and_the_probe(tmp_path):
    heads = {
        write_run(tmp_path / "a", 1).head,
        write_run(tmp_path / "b", 1, identity={"model": "other"}).head,
        write_run(tmp_path / "c", 1, probe=probe(1)).head,
        write_run(tmp_path / "d", 1, probe=probe() | {"target": probe()["target"].astype("float64")}).head,
    }
    assert len(heads) == 4


@pytest.mark.parametrize("features", [(), (4,), (2, 3), (2, 3, 1)])
def test_a_probe_may_have_any_feature_axes(tmp_path, features):
    x = np.arange(N * int(np.prod(features)), dtype="float64").reshape(N, *features)
    run = write_run(tmp_path, 1, probe=probe() | {"input": x})
    stored = xr.open_zarr(run.path, group="probe").input
    axes = {0: (), 1: ("feature",)}.get(len(features), tuple(f"feature_{axis}" for axis in range(len(features))))
    assert stored.dims == ("sample", *axes)
    np.testing.assert_array_equal(stored, x)


# --- records, names and roots ----------------------------------------------------------------------------------------


def test_no_flipped_bit_of_the_record_is_believed(tmp_path):
    run = write_run(tmp_path, 3)
    record = run.path / "zarr.json"
    data = bytearray(record.read_bytes())
    dice = np.random.default_rng(0)
    believed = []
    for position, bit in zip(dice.integers(len(data), size=200), dice.integers(8, size=200), strict=True):
        data[position] ^= 1 << bit
        record.write_bytes(data)
        with suppress(DamagedStore, InputError):
            believed.append(read_run(run.path).document)
        data[position] ^= 1 << bit
    # Two spellings of one letter, such as \u03BB and \u03bb, are the same record.
    assert all(document == run.document for document in believed)
    assert len(believed) < 10
    assert bytes(data) == zarr_json(run.document)


def zarr_json(document):
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


NO_RECORDS = {
    "empty": b"",
    "not text": b"\xff",
    "a list": b"[]",
    "an empty object": b"{}",
    "a number": b"7",
    "attributes of another kind": b'{"attributes": 1}',
    "NaN": b'{"attributes": {"record": 1, "format_version": 1}, "x": NaN}',
    "infinite": b'{"attributes": {"record": 1, "format_version": 1}, "x": 1e400}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("text", NO_RECORDS.values(), ids=NO_RECORDS)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text):
    run = write_run(tmp_path, 1)
    (run.path / "zarr.json").write_bytes(text)
    with pytest.raises(DamagedStore, match=r"zarr.json is not (the record of a run|what was committed)"):
        read_run(run.path)
    with pytest.raises(DamagedStore, match=r"zarr\.json is not"):
        open_writer(tmp_path)
    assert not Directory(run.path).leased("LEASE")


def test_a_newer_format_and_an_enormous_record_are_refused(tmp_path):
    run = write_run(tmp_path, 1)
    with patch.object(schema, "FORMAT_VERSION", 0), pytest.raises(InputError, match="install a newer one"):
        read_run(run.path)
    with patch.object(store, "RECORD_LIMIT", 1000), pytest.raises(InputError, match="more than the 1000 allowed"):
        read_run(run.path)


def test_a_checkpoint_that_is_not_the_committed_one_is_refused(tmp_path):
    run = write_run(tmp_path, 2, status=None)
    file = run.path / run.attrs["checkpoint"]["name"]
    file.write_bytes(b"other")
    with open_writer(tmp_path) as writer, pytest.raises(DamagedStore, match="is not the checkpoint that was committed"):
        writer.checkpoint()
    file.unlink()
    with open_writer(tmp_path) as writer, pytest.raises(MissingError, match=f"{file.name} does not exist"):
        writer.checkpoint()


def test_runs_are_found_by_a_unique_beginning_of_their_name(tmp_path):
    for name in ("lr-0.1_seed-0", "lr-0.1_seed-1", "lr-0.1"):
        write_run(tmp_path, 1, run_id=name)
    (tmp_path / "runs" / "notes.txt").write_text("")
    assert [run.run_id for run in list_runs(tmp_path)] == ["lr-0.1", "lr-0.1_seed-0", "lr-0.1_seed-1"]
    assert find_run(tmp_path, "lr-0.1").run_id == "lr-0.1"
    assert find_run(tmp_path, "lr-0.1_seed-1").run_id == "lr-0.1_seed-1"
    with pytest.raises(MissingError, match=r"matches lr-0\.1_seed-0, lr-0.1_seed-1; give a full name"):
        find_run(tmp_path, "lr-0.1_")
    with pytest.raises(MissingError, match=r"run 'lr-9' is not one of lr-0.1, .*ntk-eos status"):
        find_run(tmp_path, "lr-9")


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(InputError, match="is not a store and not empty"):
        open_root(photos)
    with pytest.raises(InputError, match="is not a store: it has no folder 'runs'"):
        runs_directory(photos)
    with pytest.raises(MissingError, match="does not exist; `ntk-eos run STUDY --out"):
        runs_directory(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot create"):
        open_root(photos / "cat.jpg")
    with pytest.raises(MissingError, match=r"is not a run: it has no zarr\.json"):
        read_run(photos)
    assert [path.name for path in photos.iterdir()] == ["cat.jpg"]


def test_an_empty_folder_becomes_a_store_and_one_that_cannot_be_written_does_not(tmp_path):
    assert open_root(tmp_path).path == tmp_path / "runs"
    with patch("os.access", return_value=False), pytest.raises(InputError, match="cannot be written; choose a folder"):
        open_root(tmp_path)


def test_a_run_lies_where_run_path_says(tmp_path):
    assert write_run(tmp_path, 1).path == run_path(tmp_path, RUN) == Path(tmp_path, "runs", f"{RUN}.zarr")


def test_a_value_in_chunks_is_committed_like_any_other_and_only_in_its_own_row(tmp_path):
    with open_writer(tmp_path / "whole", groups=("snapshots",)) as writer:
        advance(writer, 1, groups=("snapshots",))
        head = writer.attrs["head"]
    with open_writer(tmp_path / "chunks", groups=("snapshots",)) as writer:
        value, given = writer.in_chunks("snapshots", "ntk"), rows(0, ("snapshots",))["snapshots"]
        for index in value.grid():
            value.put(index, given["ntk"][value.region(index)])
        for other in (replace(value, row=1), replace(value, shape=(3, 3))):
            with pytest.raises(ValueError, match="snapshots/ntk at step 0: its chunks are of another row or shape"):
                writer.append(0, {"snapshots": {**given, "ntk": other}})
        writer.append(0, {"snapshots": {**given, "ntk": value}})
        writer.commit(b"")
        assert writer.attrs["head"] == head
    run = find_run(tmp_path / "chunks", RUN)
    stored = run.read("snapshots/ntk")[0]
    np.testing.assert_array_equal(stored, given["ntk"].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate(list(run.in_chunks("snapshots/ntk", 0).bands())), stored)
