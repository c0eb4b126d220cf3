"""Each protection is switched off in a copy of the source, and the tests that claim to hold it must fail."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from reliability.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
NEEDED = ("pipeline", "analysis", "tests", "data/studies", "docs", "pyproject.toml")
FAILED = re.compile(r"^FAILED (\S+?\.py(?:::\S+)?)", re.MULTILINE)


def copied(folder: Path) -> Path:
    """A copy of what tests need, compiled files included."""
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(folder: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy."""
    options = ["-q", "-rfE", "--tb=no", "--hypothesis-profile=ci", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def mutated(source: str, mutation: Mutation) -> str:
    assert source.count(mutation.text) == 1, f"{mutation.file} has this {source.count(mutation.text)} times"
    return source.replace(mutation.text, mutation.instead)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_mutation_still_says_what_it_changes(mutation):
    changed = mutated((ROOT / mutation.file).read_text(), mutation)
    ast.parse(changed)
    for node in mutation.tests:
        file, _, name = node.partition("::")
        functions = {
            one.name for one in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(one, ast.FunctionDef)
        }
        assert name.partition("[")[0] in functions


def test_every_mutation_has_a_name_of_its_own():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.reliability
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_protection_that_is_switched_off_is_missed(tmp_path, mutation):
    folder = copied(tmp_path)
    source = (folder / mutation.file).read_text()
    (folder / mutation.file).write_text(mutated(source, mutation))
    done = run(folder, mutation.tests)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\nERROR " not in done.stdout, done.stdout[-3000:]
    failed = FAILED.findall(done.stdout)
    for node in mutation.tests:
        assert any(one.partition("[")[0] == node for one in failed), done.stdout[-3000:]


@pytest.mark.reliability
def test_nothing_is_missed_where_nothing_is_switched_off(tmp_path):
    done = run(copied(tmp_path), dict.fromkeys(node for mutation in MUTATIONS for node in mutation.tests))
    assert done.returncode == 0, done.stdout[-3000:]
