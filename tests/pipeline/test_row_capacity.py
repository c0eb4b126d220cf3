from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cadence import Cadence, row_capacity

cadences = st.builds(Cadence, every=st.none() | st.integers(1, 40), log=st.none() | st.integers(1, 12))


@given(cadences, st.integers(1, 300), st.integers(0, 4), st.randoms())
@settings(max_examples=200, deadline=None)
def test_it_is_what_a_run_needs_at_most(cadence, steps, levels, random):
    rows = row_capacity({"scalars": cadence}, levels, steps)
    due = {step for step in range(steps + 1) if cadence.due(step)}
    spare = sorted(set(range(steps + 1)) - due)
    # The worst that can happen: each level is met at a step that has no row yet, and so is the end.
    random.shuffle(spare)
    assert rows == {"scalars": len(due | set(spare[: levels + 1])), "train": steps + 1}


def test_a_billion_steps_are_counted_without_listing_them():
    rows = row_capacity({"spectra": Cadence(every=7, log=3), "scalars": Cadence(log=1)}, 0, 10**9)
    sparse = {0} | {round(10 ** (i / 3)) for i in range(28)}
    beside = sum(step % 7 > 0 for step in sparse)
    assert rows == {"spectra": 10**9 // 7 + 1 + beside + 1, "scalars": 12, "train": 10**9 + 1}
