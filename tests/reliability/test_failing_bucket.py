"""The first request to an object store goes wrong, the second, ... until a run gets through: no point is left out."""

import random
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count

import pytest
from bucket import URL, Bucket
from sizes import sizes
from writer_loop import RUN, assert_rows_are_those_of_their_steps, planned_rows, record

from pipeline import objects
from pipeline.errors import MissingError, NtkEosError
from pipeline.store import find_run
from pipeline.verify import verify

SMALL = {"spectra": ["prediction"]}
LARGER = {"spectra": ["eigenvalue", "prediction"], "train": ["loss"]}
FAULTS = ("refused", "unanswered", "repeated")


def attempt(groups, committed):
    """What `record` failed with, if it did."""
    try:
        record(URL, groups, committed)
    except NtkEosError as error:
        return error
    return None


def assert_nothing_is_lost(committed):
    """Every row whose commit returned is there, every row that is there is right."""
    try:
        run = find_run(URL, RUN)
    except MissingError:
        assert not committed
        return
    assert all(length >= planned_rows(group, max(committed, default=0)) for group, length in run.lengths.items())
    assert_rows_are_those_of_their_steps(run)
    assert [problem for problem in verify(run, deep=True) if problem.damage] == []


def fault_at(point, kind, number, verb, path):
    """The request that is struck; a cut is the end of all that follow, too."""
    if kind == "cut":
        return "refused" if number >= point else None
    return kind if number == point else None


@pytest.fixture
def runs(monkeypatch):
    """Starts with an empty bucket that has this fault; leases of writers that failed have run out when it is over."""

    def begin(strike):
        bucket, now = Bucket(strike), [datetime.now(UTC)]
        monkeypatch.setattr(objects, "client", lambda name: bucket)
        monkeypatch.setattr(objects, "_now", lambda: now[0])

        def over():
            bucket.strike = lambda *_: None
            now[0] += timedelta(hours=1)

        return bucket, over

    return begin


@sizes("groups", short=SMALL, full=LARGER)
@pytest.mark.parametrize("kind", [*FAULTS, "cut"])
def test_a_run_survives_a_fault_at_every_request(runs, monkeypatch, measured, groups, kind):
    monkeypatch.setattr(objects, "PUTS_AT_ONCE", 1)  # so that the k-th request is the same one every time
    runs(lambda *_: None)
    record(URL, groups, [])
    head, failed = find_run(URL, RUN).head, 0
    for point in count():
        committed = []
        bucket, over = runs(partial(fault_at, point, kind))
        error = attempt(groups, committed)
        struck = bucket.requests.total() > point
        over()
        failed += error is not None
        if kind == "repeated":
            assert error is None, "the client asked again, and nothing else happened"
        assert_nothing_is_lost(committed)
        record(URL, groups, committed)
        assert find_run(URL, RUN).head == head
        assert verify(find_run(URL, RUN), deep=True) == []
        if not struck:
            break
    assert point > 80
    assert failed == 0 if kind == "repeated" else failed > 0.9 * point
    measured("R3", f"object store, a request is {kind}", points=point, recovered=point, rows_lost=0)


@sizes("seeds", short=10, full=100, soak=1000)
def test_a_run_gets_through_a_store_that_fails_now_and_then(runs, measured, seeds):
    """Several PUTs at once, every fault, one request in forty."""
    runs(lambda *_: None)
    record(URL, LARGER, [])
    head, attempts = find_run(URL, RUN).head, 0
    for seed in range(seeds):
        dice, committed = random.Random(seed), []
        bucket, over = runs(lambda *_, dice=dice: dice.choice(FAULTS) if dice.random() < 1 / 40 else None)
        flaky = bucket.strike
        for _ in range(100):
            attempts += 1
            error = attempt(LARGER, committed)
            over()
            assert_nothing_is_lost(committed)
            bucket.strike = flaky
            if error is None:
                break
        over()
        record(URL, LARGER, committed)
        assert find_run(URL, RUN).head == head
        assert verify(find_run(URL, RUN), deep=True) == []
    measured("R3", "object store, one request in forty fails", runs=seeds, attempts=attempts, rows_lost=0)
