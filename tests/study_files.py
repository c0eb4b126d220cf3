"""A small study file and what tests of study files share."""

import pytest
from hypothesis import HealthCheck, settings

from pipeline.errors import StudyError

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

MINIMAL = """
title = "t"
learning_rate = [0.1, 0.2]
seed = [0, 1]
[data]
name = "digits"
[model]
name = "mlp"
[stop]
steps = 10
"""


def one(study, *overrides):
    """The only run of the minimal study at learning rate 0.1 and seed 0, after overrides."""
    (run,) = study(MINIMAL, "learning_rate=0.1", "seed=0", *overrides).runs()
    return run


def message(call, error=StudyError):
    with pytest.raises(error, match=r".") as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def assert_one_plain_line(text):
    assert text
    assert text.isprintable(), text
    assert "pydantic" not in text
    assert "Traceback" not in text
