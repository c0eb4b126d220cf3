"""The same store on an object store: the same heads, one writer, and nothing lost to a writer that lost its turn."""

from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pytest
import xarray as xr
from bucket import URL, Bucket
from writer_loop import RUN, advance, assert_rows_are_those_of_their_steps, open_writer, planned_rows, row, write_run
from zarr.storage import ObjectStore, StorePath

from pipeline import objects
from pipeline.disk import door
from pipeline.errors import DamagedStore, InputError, MissingError, RunLocked, UnreachableStore
from pipeline.repair import repair_root
from pipeline.store import RECORD, find_run, list_runs, read_run, relabel, run_path
from pipeline.verify import verify, verify_root

PATH = run_path(URL, RUN)


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(objects, "client", lambda name: bucket)
    return bucket


@pytest.fixture
def later(monkeypatch):
    """Lets every lease that is not renewed run out."""
    return lambda: monkeypatch.setattr(objects, "_now", lambda: datetime.now(UTC) + timedelta(hours=1))


def damage(run):
    return [problem for problem in verify(run, deep=True) if problem.damage]


def test_heads_and_bytes_are_those_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    there, here = write_run(URL), write_run(tmp_path)
    assert there.head == here.head
    files = {key: door(here.path).get(key) for key in door(here.path).list() if key not in ("run.json", "LEASE")}
    assert {key: door(PATH).get(key) for key in files} == files
    assert verify(there, deep=True) == []
    assert [run.run_id for run in list_runs(URL)] == [RUN]


def test_a_resumed_run_has_the_head_of_one_that_was_not(bucket):
    head = write_run(URL).head
    for stop in (3, 5, 12):
        run = write_run(f"{URL}-2", stop, status="complete" if stop == 12 else None)
        assert_rows_are_those_of_their_steps(run)
    assert run.head == head
    assert verify(run, deep=True) == []


def test_plain_readers_see_the_committed_rows(bucket):
    with open_writer(URL) as writer:
        advance(writer, 12)
        writer.append(12, {"train": row("train", 12)})
        source = StorePath(ObjectStore(bucket.store, read_only=True), PATH.prefix)
        tree = xr.open_datatree(source, engine="zarr", chunks={})
        assert tree["train"].sizes["step"] == 12
        steps = xr.open_zarr(source, group="spectra")["step"]
        np.testing.assert_array_equal(steps, find_run(URL, RUN).read("spectra/step"))


def test_a_run_is_not_there_before_its_record(bucket):
    with pytest.raises(MissingError, match="memory://bucket/store does not exist"):
        list_runs(URL)

    def last_put(number, verb, path):
        if verb == "put" and path == f"{PATH.prefix}/{RECORD}":
            assert list_runs(URL) == []
            assert verify_root(URL) == []
            return "refused"
        return None

    bucket.strike = last_put
    with pytest.raises(UnreachableStore, match="503"):
        open_writer(URL)
    bucket.strike = lambda *_: None
    open_writer(URL).close()
    assert [run.status for run in list_runs(URL)] == ["stale"]


def test_a_bucket_that_holds_something_else_is_no_store():
    door(URL).put("other/data", b"1")
    with pytest.raises(InputError, match="is not a store: it has no folder 'runs'"):
        list_runs(URL)
    with pytest.raises(InputError, match="is not a store and not empty"):
        open_writer(URL)


def test_a_record_that_was_lost_is_damage_and_not_written_over():
    write_run(URL, status=None)
    door(PATH).delete(RECORD)
    (problem,) = verify_root(URL)
    assert "has no zarr.json" in problem.what
    with pytest.raises(MissingError, match="is not a run"):
        open_writer(URL)


def test_a_store_that_does_not_answer_is_not_a_damaged_one(bucket):
    write_run(URL, 6, groups=("spectra", "train"))
    for point in count():
        struck = []
        before = bucket.requests.total()
        bucket.strike = lambda n, *_, k=before + point, s=struck: s.append(k) or "refused" if n == k else None
        try:
            assert verify_root(URL, deep=True) == []
            break
        except UnreachableStore:
            assert struck
    assert not struck
    assert point > 50


def test_repair_deletes_nothing_where_a_writer_may_still_commit_it():
    write_run(URL, 6, status=None)
    door(PATH).put("train/loss/c.9", b"debris")
    (note,) = verify_root(URL, deep=True)
    assert "files that no commit names: train/loss/c.9" in note.what
    assert "repair" not in note.mend
    with pytest.raises(InputError, match="is on an object store, of which repair removes nothing"):
        repair_root(URL, apply=True)
    assert door(PATH).get("train/loss/c.9") == b"debris"


def test_a_chunk_is_read_no_further_than_it_can_be_large():
    run = write_run(URL)
    door(PATH).put("train/loss/c.0", bytes(10**6))
    with pytest.raises(DamagedStore, match="has 1000000 bytes, more than the"):
        run.read("train/loss")


def test_a_second_writer_is_refused_and_the_first_goes_on(bucket):
    with open_writer(URL) as writer:
        assert find_run(URL, RUN).status == "running"
        with pytest.raises(RunLocked, match=rf"{RUN}.zarr is being written by process \d+ on .* since"):
            open_writer(URL)
        advance(writer, 4)
        with pytest.raises(RunLocked, match="is being written by process"):
            relabel(find_run(URL, RUN), {"title": "another"})
    relabel(find_run(URL, RUN), {"title": "another"})
    assert find_run(URL, RUN).attrs["title"] == "another"


def test_a_writer_that_notices_its_lost_lease_stops_before_its_next_commit(later, monkeypatch):
    asleep = open_writer(URL)
    advance(asleep, 4)
    later()
    with open_writer(URL) as awake:
        advance(awake, 8)
        head = find_run(URL, RUN).head
        asked = objects.time.monotonic() + objects.LEASE_SECONDS
        monkeypatch.setattr(objects.time, "monotonic", lambda: asked)
        beat = door(PATH).get("run.json")
        with pytest.raises(RunLocked, match="was taken over by another process, as its lease was not renewed"):
            advance(asleep, 12)
        asleep.heartbeat("failed")
        assert door(PATH).get("run.json") == beat, "the heartbeat is the new writer's"
        assert find_run(URL, RUN).head == head
    asleep.close()


@pytest.mark.parametrize("newest", [5, 9])
@pytest.mark.parametrize("meanwhile", ["nothing", "commit"])
def test_a_writer_that_does_not_notice_can_harm_nothing(later, meanwhile, newest):
    """It believes in its lease (its machine slept in the middle of a commit), and sends what it has."""
    asleep = open_writer(URL)
    advance(asleep, 4)
    later()
    awake = open_writer(URL)
    if meanwhile == "commit":
        advance(awake, 8)
    with pytest.raises(RunLocked, match="was replaced by another process, which writes here now: this one stops"):
        advance(asleep, newest)
    run = read_run(PATH)
    assert run.lengths["train"] == planned_rows("train", 8 if meanwhile == "commit" else 4)
    assert damage(run) == []
    try:
        advance(awake, 12)
    except RunLocked:  # the other one's objects were in its way: whoever opens the run next has seen them
        awake.close()
        awake = open_writer(URL)
        advance(awake, 12)
    awake.finish("complete", "steps")
    awake.close()
    assert find_run(URL, RUN).head == write_run(f"{URL}-2").head
    assert damage(find_run(URL, RUN)) == []
