"""The lease and the fence of an object store, and what becomes of requests that fail, or seem to."""

import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from bucket import URL, Bucket

from pipeline import objects
from pipeline.disk import door, location
from pipeline.errors import MissingError, NtkEosError, RunLocked, UnreachableStore
from pipeline.objects import Objects


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(objects, "client", lambda name: bucket)
    return bucket


@pytest.fixture
def later(monkeypatch):
    """Lets every lease that is not renewed run out."""
    return lambda: monkeypatch.setattr(objects, "_now", lambda: datetime.now(UTC) + timedelta(hours=1))


def place():
    return Objects(location(URL))


def put(writer, key, data):
    writer.put(key, data)
    writer.sync()


def fault(bucket, *kinds, verb="put"):
    """The next requests of a kind go wrong in turn."""
    left = list(kinds)
    bucket.strike = lambda number, asked, path: left.pop(0) if asked == verb and left else None


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["refused", "unanswered"])
def test_a_request_that_fails_is_an_error_of_ours(bucket, kind):
    place().put("a", b"1")
    for verb, request in {
        "put": lambda: place().put("a", b"2"),
        "get": lambda: place().get("a"),
        "head": lambda: place().size("a"),
        "list": lambda: list(place().list()),
        "list_with_delimiter": lambda: place().folders(()),
        "delete": lambda: place().delete("a"),
    }.items():
        fault(bucket, kind, verb=verb)
        with pytest.raises(UnreachableStore, match=r"^\w+ memory://bucket/store.* failed: (503|operation)"):
            request()


def test_the_client_says_which_extra_it_needs(monkeypatch):
    for name in ("obstore", "obstore.store", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NtkEosError, match=r"memory://elsewhere needs the extra `cloud`: pip install"):
        door("memory://elsewhere/store").is_there()


def test_a_bucket_in_memory_is_one_for_the_whole_process():
    door("memory://mine/a").put("b", b"1")
    assert door("memory://mine").get("a/b") == b"1"
    assert not door("memory://other").is_there()


# --- the lease --------------------------------------------------------------------------------------------------------


def test_a_lease_is_refused_by_name_while_it_is_held(bucket):
    with place().lease("LEASE", b"process 7 on mars") as lease:
        assert lease.still_held()
        assert place().leased("LEASE")
        with pytest.raises(RunLocked, match=r"store is being written by process 7 on mars; .* ends in (60|59) s"):
            place().lease("LEASE", b"me")
    assert not lease.still_held()
    assert not place().leased("LEASE")
    place().lease("LEASE", b"me").release()


def test_nothing_is_leased_where_nothing_is(bucket):
    assert not place().leased("LEASE")


@pytest.mark.parametrize("already", [b"", b"process 1\nof long ago"])
def test_of_two_that_ask_at_once_one_gets_it(bucket, later, already):
    place().put("LEASE", already)
    later()
    other = place()

    def first(number, verb, path):
        if verb == "put":
            bucket.strike = lambda *_: None
            other.lease("LEASE", b"the other")

    bucket.strike = first
    with pytest.raises(RunLocked, match="is being written by another process"):
        place().lease("LEASE", b"me")


def test_a_lease_that_was_not_renewed_is_taken_over_and_its_holder_notices(bucket, later, monkeypatch):
    lost = place().lease("LEASE", b"asleep")
    later()
    taken = place().lease("LEASE", b"awake")
    assert lost.still_held(), "it need not ask so soon after it was told"
    asked = time.monotonic() + objects.LEASE_SECONDS
    monkeypatch.setattr(objects.time, "monotonic", lambda: asked)
    assert not lost.still_held()
    lost.release()
    assert taken.still_held()
    assert place().get("LEASE").startswith(b"awake\n"), "who lost a lease leaves the next one alone"


def test_a_lease_is_renewed_while_its_holder_computes(bucket, monkeypatch):
    monkeypatch.setattr(objects, "LEASE_SECONDS", 0.3)
    with place().lease("LEASE", b"me"):
        fault(bucket, "refused")  # one renewal may fail
        deadline = time.monotonic() + 5
        while bucket.requests["put"] < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert place().leased("LEASE")
    assert not place().leased("LEASE")


def test_where_the_store_does_not_answer_nobody_knows_whether_the_lease_holds(bucket, monkeypatch):
    lease = place().lease("LEASE", b"me")
    asked = time.monotonic() + objects.LEASE_SECONDS
    monkeypatch.setattr(objects.time, "monotonic", lambda: asked)
    fault(bucket, "refused")
    with pytest.raises(UnreachableStore, match="503"):
        lease.still_held()
    fault(bucket, "refused")
    lease.release()  # as well as it can: the lease runs out
    assert place().leased("LEASE")


@pytest.mark.parametrize("kind", ["repeated", "unanswered"])
def test_a_lease_whose_answer_was_lost_is_held_or_runs_out(bucket, later, kind):
    fault(bucket, kind)
    if kind == "repeated":
        assert place().lease("LEASE", b"me").still_held()
        return
    with pytest.raises(UnreachableStore, match="timed out"):
        place().lease("LEASE", b"me")
    with pytest.raises(RunLocked, match="by me;"):
        place().lease("LEASE", b"me")
    later()
    place().lease("LEASE", b"me").release()


# --- the fence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 8])
def test_who_lost_a_lease_replaces_nothing_that_it_has_not_seen(bucket, later, monkeypatch, at_once):
    monkeypatch.setattr(objects, "PUTS_AT_ONCE", at_once)
    asleep, awake = place(), place()
    asleep.put("seen", b"0")
    asleep.lease("LEASE", b"asleep")
    later()
    awake.lease("LEASE", b"awake")
    for key in ("seen", "new"):
        put(awake, key, b"0")
        put(awake, key, b"1")  # what was put is seen
        with pytest.raises(RunLocked, match=f"{key} was replaced by another process, which writes here now"):
            put(asleep, key, b"2")
        assert place().get(key) == b"1"


def test_a_put_that_was_done_although_it_was_refused_counts_as_done(bucket):
    writer = place()
    with writer.lease("LEASE", b"me"):
        for data in (b"1", b"2"):
            fault(bucket, "repeated")
            put(writer, "a", data)
            assert place().get("a") == data


def test_of_two_puts_of_one_object_the_later_one_counts(bucket):
    writer = place()
    with writer.lease("LEASE", b"me"):
        fault(bucket, 0.02, 0.1)
        writer.put("a", b"1")
        writer.put("a", b"2")
        writer.put("b", b"3")
        writer.sync()
        assert (place().get("a"), place().get("b")) == (b"2", b"3")


def test_the_first_failure_of_many_puts_is_raised_once(bucket):
    writer = place()
    with writer.lease("LEASE", b"me"):
        fault(bucket, "refused", "refused")
        for key in "abcd":
            writer.put(key, b"1")
        with pytest.raises(UnreachableStore, match="503"):
            writer.sync()
        writer.sync()
    assert len(list(place().list())) == 3  # the lease, and the two that were put


def test_an_object_that_vanished_is_not_replaced(bucket):
    writer = place()
    writer.put("a", b"1")
    with writer.lease("LEASE", b"me"):
        bucket.store.delete("store/a")
        with pytest.raises(RunLocked, match="was replaced by another process"):
            put(writer, "a", b"2")
    with pytest.raises(MissingError, match="does not exist"):
        place().get("a")
