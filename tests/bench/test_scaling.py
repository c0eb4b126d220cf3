"""The script of the scale study fits exponents and makes its tables; its figures are not judged here."""

import importlib.util
import math
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("scaling", Path(__file__).with_name("scaling.py"))
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_an_exponent_is_the_slope_of_the_logarithms(power):
    sizes = [10, 30, 100]
    assert scaling.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_what_is_zero_has_no_exponent():
    assert math.isnan(scaling.exponent([1, 2], [0, 1]))


def test_a_table_has_a_line_per_size_and_the_exponents():
    lines = scaling.table("pairs", quick=True).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| 100 | 0.0")
    assert lines[-1].startswith("| **exponent** | **")
