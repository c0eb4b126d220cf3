"""An older record, or an older copy of a whole run, is put back: two witnesses have seen more, and say so.

`run.json` has seen the last commit, and the catalogue the newest state that it was synced with. Where neither has, an
older copy is a run like any other.
"""

import shutil
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from command import call, rows
from sizes import sizes
from writer_loop import RUN, advance, open_writer, write_run

from analysis import catalog
from pipeline.store import find_run, run_path
from pipeline.verify import verify_root


@pytest.fixture(autouse=True)
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


def write(root, stop, **attrs):
    """Go on to step `stop`, exclusive; not finished."""
    about = {"title": "a test", "learning_rate": 0.1, "seed": 0, "created_at": "2026-01-02T03:04:05+00:00"} | attrs
    with open_writer(root, attrs=about) as writer:
        advance(writer, stop)


@contextmanager
def in_place_of(path, other):
    """Another file or folder, for a while."""
    kept = path.rename(path.with_name(".kept"))
    (shutil.copytree if other.is_dir() else shutil.copyfile)(other, path)
    yield
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept.rename(path)


def damaged(root):
    """What `ntk-eos verify` finds wrong."""
    return {row["where"]: row["what"] for row in rows("verify", root) if row["damage"]}


@sizes("states", short=3, full=25)
def test_an_older_record_and_an_older_run_are_noticed(tmp_path, measured, states):
    root, path = tmp_path / "store", run_path(tmp_path / "store", RUN)
    write_run(root, 3, run_id="another")
    for number in range(states):
        write(root, 2 * number + 2)
        shutil.copytree(path, tmp_path / f"{number}")
    write_run(root, 2 * states + 2, attrs={"created_at": "2026-01-02T03:04:05+00:00"})
    catalog.sync(root)
    assert damaged(root) == {}
    before, head = (root / catalog.NAME).read_bytes(), find_run(root, RUN).head
    for number in range(states):
        with in_place_of(path / "zarr.json", tmp_path / f"{number}" / "zarr.json"):
            found = damaged(root)
            assert "but run.json has seen commit" in found[f"{RUN}/zarr.json"]
        with in_place_of(path, tmp_path / f"{number}"):
            assert verify_root(root, deep=True) == []  # it is whole
            found = damaged(root)
            assert list(found) == [RUN]
            assert f"step {2 * number + 1}, " in found[RUN]
            assert f"has seen step {2 * states + 1}, head {head}" in found[RUN]
    assert (root / catalog.NAME).read_bytes() == before, "a witness that is asked must not learn"
    measured("R12", "an older zarr.json; run.json has seen a later commit", rolled_back=states, noticed=states)
    measured("R12", "an older run; the catalogue has seen a later head", rolled_back=states, noticed=states)


@pytest.fixture
def rolled_back(tmp_path):
    """A store whose catalogue has seen ten steps of a run, of which there are four again."""
    root = tmp_path / "store"
    write(root, 4)
    shutil.copytree(run_path(root, RUN), tmp_path / "older")
    write(root, 10)
    catalog.sync(root)
    shutil.rmtree(run_path(root, RUN))
    shutil.copytree(tmp_path / "older", run_path(root, RUN))
    return root


def steps(root):
    return catalog.query(root, "select steps from runs").rows


def test_a_query_does_not_make_the_catalogue_forget(rolled_back, caplog):
    assert steps(rolled_back) == [(9,)]
    assert f"{RUN}: the record ends at step 3, " in caplog.text
    assert "its rows in the catalogue stay as they were" in caplog.text
    assert call("verify", rolled_back).exit_code == 1


def test_a_run_that_goes_on_is_no_longer_behind_once_it_has_come_as_far(rolled_back):
    for stop, seen in [(6, 9), (10, 9), (12, 11)]:
        write(rolled_back, stop)
        assert (damaged(rolled_back) == {}) == (stop >= 10)
        assert steps(rolled_back) == [(seen,)]


def test_a_run_that_was_deleted_and_recorded_again_is_another_one(rolled_back):
    shutil.rmtree(run_path(rolled_back, RUN))
    write(rolled_back, 2, created_at="2026-01-03T00:00:00+00:00")
    assert damaged(rolled_back) == {}
    assert steps(rolled_back) == [(1,)]


def test_without_a_witness_an_older_run_is_a_run_like_any_other(rolled_back):
    (rolled_back / catalog.NAME).unlink()
    assert damaged(rolled_back) == {}
    assert steps(rolled_back) == [(3,)]
