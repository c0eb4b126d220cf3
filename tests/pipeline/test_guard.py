"""What a commit record may say: the attributes that are read as tables and lists are never null."""

import json
from copy import deepcopy

import pytest
from mock_store import mock_run

from pipeline.errors import DamagedStore
from pipeline.guard import check_record


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = mock_run(tmp_path_factory.mktemp("guard"), 0.1, 0, steps=2)
    return json.loads((path / "zarr.json").read_bytes())


@pytest.mark.parametrize("name", ["axes", "claims", "stop", "provenance", "learning_rate", "seed"])
def test_a_null_where_a_value_is_read_is_damage(document, name):
    forged = deepcopy(document)
    forged["attributes"][name] = None
    with pytest.raises(DamagedStore, match=f"{name} = None: must be"):
        check_record(forged)


@pytest.mark.parametrize("name", ["paper", "part", "size", "study_title", "figures", "study"])
def test_what_a_run_need_not_have_may_be_null_and_is_no_number(document, name):
    forged = deepcopy(document)
    forged["attributes"][name] = None
    check_record(forged)
    forged["attributes"][name] = 3
    with pytest.raises(DamagedStore, match=f"{name} = 3"):
        check_record(forged)
