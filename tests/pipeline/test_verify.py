"""Every kind of damage is found and named, and clean stores are clean."""

import json
import re
import shutil
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writer_loop import CADENCES, RUN, advance, open_writer, probe, row, rows, write_run

from pipeline import store, zarr3
from pipeline.disk import Directory
from pipeline.errors import DamagedStore, InputError, MissingError
from pipeline.schema import GROUPS
from pipeline.store import find_run, read_run
from pipeline.verify import verify, verify_root

STEPS = 11


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


@pytest.fixture(scope="module", params=["growing", "complete"])
def original(request, tmp_path_factory):
    """A run of several commits, and the record of the last but one."""
    root = tmp_path_factory.mktemp("store")
    with open_writer(root) as writer:
        advance(writer, STEPS - 4, every=3)
        older = writer.directory.get("zarr.json")
        advance(writer, STEPS)
        if request.param == "complete":
            writer.finish("complete", "steps")
    return find_run(root, RUN), older


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run, to damage."""
    copy = tmp_path / "runs" / f"{RUN}.zarr"
    shutil.copytree(original[0].path, copy)
    return read_run(copy)


def found(run, deep=True):
    return {problem.where: problem for problem in verify(run, deep)}


def chunks(run):
    """Keys of all chunks."""
    return [key for key in Directory(run.path).list() if key.rpartition("/")[2].startswith("c.")]


def damage(path, how, dice):
    """Change one file as a bad disk or a careless copy would."""
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[dice.integers(len(data))] ^= 1 << dice.integers(8)
    elif how == "truncate":
        del data[dice.integers(len(data)) :]
    elif how == "zeroed tail":
        tail = dice.integers(1, len(data))
        data[tail:] = bytes(len(data) - tail)
    elif how == "grown":
        data += b"\0"
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


# --- clean -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_clean_run_has_no_problems(original, deep):
    told = []
    assert verify(original[0], deep, progress=told.append) == []
    if deep:
        assert told == sorted(told)
        assert told[-1] == 1


@given(
    steps=st.integers(1, 9),
    every=st.integers(1, 4),
    groups=st.sets(st.sampled_from(sorted(GROUPS)), min_size=1),
    status=st.sampled_from(["complete", "diverged", None]),
)
@settings(max_examples=20, deadline=None)
def test_clean_runs_of_any_shape_have_no_problems(steps, every, groups, status, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    run = write_run(root, steps, every=every, groups=tuple(sorted(groups)), status=status)
    assert verify(run, deep=True) == []


def test_a_run_is_certified_as_it_is_stored(tmp_path):
    """JSON turns keys that are numbers into text, which sorts otherwise, and tuples into lists."""
    odd = {"layers": {9: (1, 2), 10: None}}
    with open_writer(tmp_path, identity=odd, attrs=odd, attributes={"train/loss": odd}) as writer:
        writer.note(more=odd)
        advance(writer, 2)
    assert verify(find_run(tmp_path, RUN), deep=True) == []
    open_writer(tmp_path, identity=odd).close()


def test_a_run_without_a_commit_has_no_problems(tmp_path):
    open_writer(tmp_path).close()
    assert verify_root(tmp_path, deep=True) == []


def test_a_run_that_goes_on_while_it_is_verified_has_no_problems(tmp_path):
    """Every look at the disk finds the run further on than its record was when it was read."""
    get = Directory.get

    def meanwhile(self, key, limit=None):
        # After the record is read: two commits, so that the checkpoint it names is overwritten.
        if key != "zarr.json" and commits:
            for _ in range(2):
                step = commits.pop()
                writer.append(step, rows(step))
                writer.commit(f"{step}".encode())
        return get(self, key, limit)

    with open_writer(tmp_path) as writer:
        advance(writer, 3)
        run = find_run(tmp_path, RUN)
        commits = [6, 5, 4, 3]
        with patch.object(Directory, "get", meanwhile):
            assert verify(run, deep=True) == []
        assert commits == []
        (run.path / "snapshots" / ".tmp-1").write_bytes(b"half")  # the writer's, at this very moment
        assert verify(run, deep=True) == []


# --- damaged chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "truncate", "zeroed tail", "grown", "delete"])
def test_any_damage_to_any_chunk_is_found_by_a_deep_look(run, how):
    dice = np.random.default_rng(0)
    keys = chunks(run)
    for key in keys:
        path = run.path / key
        before = path.read_bytes()
        damage(path, how, dice)
        if path.exists() and path.read_bytes() == before:
            continue  # the tail was zero already
        problems = found(run)
        array = key.rpartition("/")[0]
        name = f"{RUN}/{array}"
        assert [where for where in problems if where.startswith(name)], f"{how} of {key}: {sorted(problems)}"
        assert all(problem.damage and str(run.path) in problem.mend for problem in problems.values())
        with pytest.raises(DamagedStore, match=re.escape(str(path))):
            run.read(array)
        path.write_bytes(before)
    assert found(run) == {}
    assert len(keys) > 30


@pytest.mark.parametrize("size", [None, 0])
def test_a_chunk_that_is_missing_or_empty_is_found_by_a_quick_look(run, size):
    for key in chunks(run):
        path = run.path / key
        before = path.read_bytes()
        path.unlink() if size is None else path.write_bytes(b"")
        (problem,) = verify(run)
        assert problem.where.startswith(f"{RUN}/{key.rpartition('/')[0]}")
        assert problem.what == f"{path} {'does not exist' if size is None else 'is empty'}"
        path.write_bytes(before)


def test_damage_to_one_row_is_named_by_its_step_and_does_not_hide_the_others(run):
    (run.path / "snapshots/ntk/c.1.0.0").write_bytes(b"not a chunk")
    (run.path / "snapshots/ntk/c.2.0.0").unlink()
    (run.path / "spectra/eigenvector/c.3.0.0").write_bytes(b"")
    problems = found(run)
    assert sorted(problems) == [
        f"{RUN}/snapshots/ntk at step 10",
        f"{RUN}/snapshots/ntk at step 5",
        f"{RUN}/spectra/eigenvector at step 9",
    ]
    assert "c.1.0.0: checksum does not match" in problems[f"{RUN}/snapshots/ntk at step 5"].what


def test_damage_to_a_shared_chunk_is_named_by_its_steps_and_to_the_steps_by_rows(run):
    (run.path / "scalars/trace/c.0").write_bytes(b"not a chunk")
    (run.path / "train/step/c.0").write_bytes(b"not a chunk")
    assert sorted(found(run)) == [f"{RUN}/scalars/trace at steps 0 to 10", f"{RUN}/train/step at rows 0 to 10"]


def swap(run, one, other):
    first, second = run.path / one, run.path / other
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def test_every_swap_of_two_rows_is_found_and_names_both(run):
    """Each chunk is whole and of the right size: only the digests can tell."""
    count = 0
    for key in (key for key in chunks(run) if "c.0." in key and not key.startswith("probe")):
        array, _, name = key.rpartition("/")
        group = array.partition("/")[0]
        other = f"{array}/{name.replace('c.0.', 'c.1.', 1)}"
        if not (run.path / other).exists():
            continue  # a shared chunk
        swap(run, key, other)
        assert sorted(found(run)) == [f"{RUN}/{group} at step 0", f"{RUN}/{group} at step {CADENCES[group]}"], key
        swap(run, key, other)
        count += 1
    assert count == 4 + 2  # ntk, parameter, eigenvector and prediction of snapshots, the last two of spectra


@pytest.mark.parametrize(
    ("one", "other", "group"),
    [
        ("train/accuracy/c.0", "train/grad_norm/c.0", "train"),
        ("scalars/trace/c.0", "scalars/target_energy/c.0", "scalars"),
        ("scalars/seed/c.0", "scalars/step/c.0", "scalars"),
        ("snapshots/digest/c.0.0", "scalars/digest/c.0.0", "snapshots"),
        ("snapshots/prediction/c.0.0.0", "spectra/prediction/c.2.0.0", "snapshots"),
    ],
)
def test_a_swap_of_two_variables_is_found(run, one, other, group):
    assert (run.path / one).read_bytes() != (run.path / other).read_bytes()
    swap(run, one, other)
    assert any(where.startswith(f"{RUN}/{group} at ") for where in found(run))


def test_a_whole_row_that_was_replaced_with_its_digest_is_found_by_the_chain(run):
    """Rows of two runs of one configuration are each consistent; only the head knows which is ours."""
    with open_writer(run.path.parents[1] / "other") as writer:
        for step in range(STEPS):
            changed = rows(step)
            if step == 5:
                changed["snapshots"]["ntk"] = changed["snapshots"]["ntk"] + 1
            writer.append(step, changed)
        writer.commit(b"")
        other = writer.directory.path
    for key in ("snapshots/ntk/c.1.0.0", "snapshots/digest/c.0.0"):
        shutil.copy(other / key, run.path / key)
    assert list(found(run)) == [f"{RUN}/digest"]
    assert "rows were replaced or moved" in found(run)[f"{RUN}/digest"].what


def test_other_examples_are_found(run):
    document = run.node("probe/target")
    shape = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    (run.path / "probe/target/c.0.0").write_bytes(zarr3.encode(-probe()["target"].reshape(shape)))
    assert list(found(run)) == [f"{RUN}/probe"]
    assert found(run, deep=False) == {}


def test_times_are_not_certified_but_their_bytes_are(run):
    key = run.path / "train/wall_time/c.0"
    times = zarr3.decode(key.read_bytes(), "float64", (4096,))
    key.write_bytes(zarr3.encode(times + 1))
    assert found(run) == {}
    key.write_bytes(b"not a chunk")
    assert list(found(run)) == [f"{RUN}/train/wall_time at steps 0 to 10"]


# --- damaged records and documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_an_older_record_that_was_put_back_is_found(run, original, deep):
    (run.path / "zarr.json").write_bytes(original[1])
    rolled_back = read_run(run.path)
    assert rolled_back.lengths["train"] == STEPS - 4
    problem = found(rolled_back, deep)[f"{RUN}/zarr.json"]
    assert problem.damage
    assert re.search(r"of commit 3, .* but run.json has seen commit 4", problem.what)


def test_a_record_of_another_run_with_as_many_commits_is_found(run):
    with open_writer(run.path.parents[1] / "other", identity={"model": "other"}) as writer:
        advance(writer, STEPS - 4, every=3)
        advance(writer, STEPS)
        shutil.copy(writer.directory.path / "zarr.json", run.path / "zarr.json")
    assert f"{RUN}/zarr.json" in found(read_run(run.path), deep=False)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_any_damage_to_any_document_is_found_by_a_quick_look(run, how):
    dice = np.random.default_rng(1)
    keys = [key for key in Directory(run.path).list() if key.endswith("zarr.json")]
    final = run.status == "complete"
    for key in keys:
        path = run.path / key
        before = path.read_bytes()
        damage(path, how, dice)
        problems = verify_root(run.path.parents[1])
        if path.exists() and harmless(before, path.read_bytes(), final):
            assert problems == []
        else:
            (problem,) = problems
            assert problem.where == f"{RUN}/{key}"
            assert problem.damage
        path.write_bytes(before)
    assert len(keys) > 30


def harmless(before, after, final):
    """Whether a document still says the same; the length of an array that grows is only its plan."""
    try:
        documents = [json.loads(text) for text in (before, after)]
    except ValueError:
        return False
    if not final and documents[0]["node_type"] == "array":
        for document in documents:
            document.get("shape", [0])[0] = 0
    return documents[0] == documents[1]


def test_a_group_may_lag_behind_a_growing_run_but_not_lead_it(tmp_path):
    with open_writer(tmp_path) as writer:
        advance(writer, 3)
        behind = writer.directory.get("train/zarr.json")
        advance(writer, 5)
        ahead = writer.directory.get("train/zarr.json").replace(b'"shape":[5', b'"shape":[6')
    run = find_run(tmp_path, RUN)
    (run.path / "train/zarr.json").write_bytes(behind)
    assert found(run) == {}
    (run.path / "train/zarr.json").write_bytes(ahead)
    assert list(found(run)) == [f"{RUN}/train/zarr.json"]
    with open_writer(tmp_path) as writer:
        advance(writer, 6)
        writer.finish("complete", "steps")
    run = find_run(tmp_path, RUN)
    (run.path / "train/zarr.json").write_bytes(behind)
    assert list(found(run)) == [f"{RUN}/train/zarr.json"]


@pytest.mark.parametrize("how", ["flip", "truncate", "substitute", "delete"])
def test_a_damaged_checkpoint_is_found(run, how):
    name = run.attrs["checkpoint"]["name"]
    path = run.path / name
    if how == "substitute":
        other = next(p for p in run.path.glob("checkpoint-*") if p != path)
        shutil.copy(other, path)
    else:
        damage(path, how, np.random.default_rng(0))
    assert list(found(run)) == [f"{RUN}/{name}"]
    assert list(found(run, deep=False)) == ([f"{RUN}/{name}"] if how == "delete" else [])


# --- debris ----------------------------------------------------------------------------------------------------------


def test_debris_is_a_note_and_not_damage(run):
    for key in ("snapshots/ntk/.tmp-1", "snapshots/ntk/c.3.0.0", "train/loss/c.1", "notes.txt"):
        (run.path / key).write_bytes(b"x")
    (problem,) = verify(run, deep=True)
    assert not problem.damage
    assert problem.where == RUN
    assert problem.what == "4 files that no commit names: notes.txt, snapshots/ntk/.tmp-1, snapshots/ntk/c.3.0.0, ..."
    assert verify(run) == []


# --- a root ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    for name in ("a-1", "a-2", "b"):
        write_run(tmp_path, 3, run_id=name)
    return tmp_path


def test_a_run_that_cannot_be_read_does_not_hide_the_others(root):
    (root / "runs/a-1.zarr/zarr.json").write_bytes(b"{")
    (root / "runs/a-2.zarr/zarr.json").unlink()
    (root / "runs/b.zarr/train/loss/c.0").unlink()
    problems = verify_root(root)
    assert [problem.where for problem in problems] == ["a-1/zarr.json", "a-2/zarr.json", "b/train/loss at steps 0 to 2"]
    assert all(problem.damage for problem in problems)


def test_runs_can_be_picked_by_a_unique_beginning(root):
    for name in ("a-1", "b"):
        (root / f"runs/{name}.zarr/zarr.json").write_bytes(b"{")
    assert verify_root(root, ["a-2"], deep=True) == []
    assert [problem.where for problem in verify_root(root, ["a-2", "b"])] == ["b/zarr.json"]
    with pytest.raises(MissingError, match="run 'a-' matches a-1, a-2"):
        verify_root(root, ["a-"])


def test_progress_goes_from_run_to_run(root):
    told = []
    verify_root(root, deep=True, progress=lambda fraction, note: told.append((fraction, note)))
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert told[-1] == (1, "b")
    assert {note for _, note in told} == {"a-1", "a-2", "b"}


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        verify_root(tmp_path / "nowhere")
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="is not a store"):
        verify_root(tmp_path)


def test_a_file_that_the_disk_cannot_read_is_named(root):
    get = Directory.get

    def bad_sector(self, key, limit=None):
        if key == "train/grad_norm/c.0":
            raise InputError(f"{self.path / key} cannot be read: Input/output error")
        return get(self, key, limit)

    with patch.object(Directory, "get", bad_sector):
        problems = verify_root(root, ["b"], deep=True)
    assert [problem.where for problem in problems] == ["b/train/grad_norm at steps 0 to 2"]
    assert "Input/output error" in problems[0].what


def test_row_values_that_the_store_hands_out_are_those_of_the_digest(original):
    """The chain that `verify` recomputes is over the very numbers that readers get."""
    run = original[0]
    index, step = 2, 10
    values = {name: run.read(f"snapshots/{name}")[index] for name in run.arrays("snapshots")}
    variables = store.schema.row_variables("snapshots", values)
    assert store.row_digest("snapshots", variables, values) == values["digest"].tobytes()
    np.testing.assert_array_equal(values["ntk"], row("snapshots", step)["ntk"].astype("float32"))
