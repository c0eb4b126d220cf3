"""Named streams of random numbers."""

import subprocess
import sys

import numpy as np

from pipeline.seeds import stream


def test_equal_arguments_give_equal_numbers_in_another_process():
    code = "from pipeline.seeds import stream; print(stream(3, 'data').integers(2**62))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stream(3, "data").integers(2**62)


def test_the_numbers_do_not_change_between_versions():
    """A change would make every run of every study another one."""
    assert stream(0, "data").integers(2**32) == 1810604482
    assert stream(0, "init").integers(2**32) == 2941833197


def test_streams_differ_by_seed_and_by_name():
    firsts = {stream(seed, name).integers(2**62) for seed in range(5) for name in ("data", "init", "order")}
    assert len(firsts) == 15


def test_streams_are_uncorrelated():
    a, b = (stream(0, name).standard_normal(10_000) for name in ("data", "init"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.04  # four standard errors
