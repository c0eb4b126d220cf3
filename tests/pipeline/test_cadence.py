import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cadence import Cadence
from pipeline.errors import InputError

everies = st.none() | st.integers(1, 300)
logs = st.none() | st.integers(1, 60)


def is_log_step(step: int, log: int) -> bool:
    """Whether step = round(10^(i / log)) for some i, in whole numbers: (2 step ± 1)^log brackets 2^log 10^i."""
    low, high, point = (2 * step - 1) ** log, (2 * step + 1) ** log, 2**log
    while point < high:
        if point > low:
            return True
        point *= 10
    return False


@given(everies, logs, st.integers(0, 2000))
@settings(max_examples=100, deadline=None)
def test_steps_are_those_of_the_definition_and_due_agrees(every, log, last):
    cadence = Cadence(every, log)
    expected = [
        step
        for step in range(last + 1)
        if step == 0
        or (every is not None and step % every == 0)
        or (log is not None and is_log_step(step, log))
    ]  # fmt: skip
    assert cadence.steps(last).tolist() == expected
    assert [step for step in range(last + 1) if cadence.due(step)] == expected
    assert cadence.count(last) == len(expected)


@given(st.integers(1, 60), st.integers(1, 10**9))
@settings(max_examples=200, deadline=None)
def test_due_is_right_far_out_too(log, step):
    assert Cadence(log=log).due(step) == is_log_step(step, log)


@given(everies, logs, st.integers(0, 500), st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_a_longer_run_keeps_the_grid_of_a_shorter_one(every, log, short, more):
    cadence = Cadence(every, log)
    longer = cadence.steps(short + more)
    np.testing.assert_array_equal(longer[longer <= short], cadence.steps(short))


def test_ten_points_per_decade():
    assert Cadence(log=10).steps(20).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", -3), ("log", 0)])
def test_a_number_that_is_not_positive_is_refused(name, value):
    with pytest.raises(InputError, match=f"cadence {name} = {value}: must be a whole number of at least 1"):
        Cadence(**{name: value})
