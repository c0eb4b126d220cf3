"""What repair calls debris, and what it leaves alone. tests/reliability has what it is for: nothing is lost."""

import json
import shutil
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from writer_loop import RUN, advance, open_writer, write_run

from pipeline.cli import main
from pipeline.disk import Directory
from pipeline.errors import MissingError
from pipeline.repair import repair_root
from pipeline.store import find_run

GROUPS = {"snapshots": ["ntk", "trace"], "train": ["loss"]}
STEPS = 11


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


def left(root, *run_ids):
    """What is there to remove, as paths."""
    return [debris.path for debris in repair_root(root, run_ids) if debris.size is not None]


@pytest.fixture
def root(tmp_path):
    """A growing run with all three kinds of debris, and files that are somebody else's."""
    path = write_run(tmp_path, STEPS, status=None).path
    for key in ("snapshots/ntk/.tmp-1", "snapshots/ntk/c.3.0.0", "train/loss/c.1", ".tmp-2"):
        (path / key).write_bytes(b"debris")
    for key in ("notes.txt", "snapshots/ntk/c.3.0.0.txt", "snapshots/c.9", "train/loss/c.x"):
        (path / key).write_bytes(b"mine")
    half_made = tmp_path / "runs" / ".new-0-lr-9.zarr" / "train"
    half_made.mkdir(parents=True)
    (half_made / "zarr.json").write_bytes(b"{}")
    return tmp_path


def test_debris_is_named_and_what_is_not_known_stays(root):
    path = root / "runs" / f"{RUN}.zarr"
    assert {(debris.path, debris.size, debris.what) for debris in repair_root(root, apply=True)} == {
        (root / "runs" / ".new-0-lr-9.zarr", 2, "a run half made"),
        (path / ".tmp-2", 6, "a file half written"),
        (path / "snapshots/ntk/.tmp-1", 6, "a file half written"),
        (path / "snapshots/ntk/c.3.0.0", 6, "a chunk of rows that were never committed"),
        (path / "train/loss/c.1", 6, "a chunk of rows that were never committed"),
    }
    mine = [file.name for file in path.rglob("*") if file.is_file() and file.read_bytes() == b"mine"]
    assert sorted(mine) == ["c.3.0.0.txt", "c.9", "c.x", "notes.txt"]


def test_runs_can_be_picked_and_runs_half_made_are_of_no_run(root):
    assert left(root)[0].name.startswith(".new-")
    assert not [path for path in left(root, RUN) if path.name.startswith(".new-")]
    write_run(root, 3, run_id="other")
    assert repair_root(root, ["other"]) == []
    with pytest.raises(MissingError, match="run 'lr-7' is not one of"):
        repair_root(root, ["lr-7"])


@pytest.mark.parametrize("apply", [False, True])
def test_a_run_that_is_being_written_is_left_alone(root, apply):
    with open_writer(root, run_id="other") as writer:
        (writer.directory.path / ".tmp-1").write_bytes(b"mine, in a moment")
        (debris,) = repair_root(root, ["other"], apply=apply)
        assert (debris.path, debris.size) == (writer.directory.path, None)
        assert (writer.directory.path / ".tmp-1").exists()


@pytest.mark.parametrize("witness", ["run.json", "a group"])
def test_rows_newer_than_a_record_that_was_put_back_are_not_debris(tmp_path, witness):
    """They were committed: an old record must not make repair delete them."""
    with open_writer(tmp_path, groups=GROUPS) as writer:
        advance(writer, 4, groups=tuple(GROUPS))
        older = writer.directory.get("zarr.json")
        advance(writer, STEPS, groups=tuple(GROUPS))
    path = find_run(tmp_path, RUN).path
    (path / "zarr.json").write_bytes(older)
    if witness == "a group":
        (path / "run.json").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "LEASE"}
    (debris,) = repair_root(tmp_path, apply=True)
    assert debris.what.startswith("left alone: ")
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("apply", [False, True])
def test_a_run_without_a_readable_record_is_left_alone(root, apply):
    (root / "runs" / f"{RUN}.zarr" / "zarr.json").write_bytes(b"{")
    found = repair_root(root, apply=apply)
    assert [debris.size for debris in found] == [2, None]
    assert "is not the record of a run" in found[1].what
    assert (root / "runs" / f"{RUN}.zarr" / ".tmp-2").exists()


def test_a_run_half_made_by_a_living_writer_is_not_debris(root):
    runs = Directory(root / "runs")
    with runs.lease(".lock", b"somebody who makes a run"):
        assert not [path for path in left(root) if path.name.startswith(".new-")]


def test_the_command_shows_first_and_removes_when_told_to(root):
    shown = CliRunner().invoke(main, ["repair", str(root)])
    assert shown.exit_code == 0
    assert len(shown.stdout.splitlines()) == 5
    assert "train/loss/c.1: a chunk of rows that were never committed, 6 B" in shown.stdout
    assert shown.stderr == f"{root}: 5 file(s) or folder(s) of 26 B would be removed; add --apply\n"
    printed = CliRunner().invoke(main, ["repair", str(root), "--apply", "--json"]).stdout
    assert {row["size"] for row in json.loads(printed)["rows"]} == {2, 6}
    assert CliRunner().invoke(main, ["repair", str(root)]).stderr == f"{root}: nothing to remove\n"
    shutil.rmtree(root)
    assert CliRunner().invoke(main, ["repair", str(root)]).exit_code == 4
