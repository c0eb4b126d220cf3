"""One test at three sizes: short in `make test`, full in `make reliability`, soak in `make soak`."""

from typing import Any

import pytest

MARKS = {"short": [pytest.mark.short], "full": [pytest.mark.reliability], "soak": [pytest.mark.soak]}


def sizes(names: str, **values: Any) -> pytest.MarkDecorator:
    """Run a test once per size, each with its own argument.

    Args:
        names: of the arguments, as for `pytest.mark.parametrize`.
        values: the argument, or a tuple of several, of the sizes short, full and soak; of two of them, or of one.
    """
    several = "," in names
    return pytest.mark.parametrize(
        names,
        [pytest.param(*(value if several else [value]), id=size, marks=MARKS[size]) for size, value in values.items()],
    )
