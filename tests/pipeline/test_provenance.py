"""What a run says of where its numbers come from."""

import subprocess
from pathlib import Path

import pytest

from pipeline import provenance as module
from pipeline.provenance import environment_changes, provenance


@pytest.fixture
def here():
    return provenance(torch="2.0", threads=1, device="cpu", dataset_digest="00")


def test_it_names_versions_machine_and_command(here):
    assert {"python", "numpy", "ntk-eos"} <= set(here["versions"])
    assert all(here[name] for name in ("cpu", "host", "command"))


def test_the_commit_is_that_of_the_code(here):
    root = Path(module.__file__).parents[1]
    if not (root / ".git").exists():
        assert here["git_commit"] is None
        return
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert here["git_commit"] == (said.stdout.strip() or None)


def test_without_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "pipeline" / "provenance.py"))
    assert module._git.__wrapped__() == {"git_commit": None, "git_dirty": None}


def test_only_what_can_change_bits_is_a_change(here):
    assert environment_changes(here, {**here, "host": "another", "command": "another", "git_commit": "another"}) == []
    (change,) = environment_changes(here, {**here, "threads": 2})
    assert change == "threads: 1 -> 2"
