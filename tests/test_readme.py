"""README's commands and snippets, run in order in one folder as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)

# What `make demo` leaves, in small: the readme's numbers need no exact store.
DEMO = ["data.n=20", "model.width=32", "stop.steps=5000", "learning_rate=[0.1, 0.2, 0.4]", "record.scalars={every=10}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a digits store where the readme expects it."""
    place = tmp_path_factory.mktemp("readme")
    sets = [word for override in [*DEMO, "record.eigenpairs=20", "seed=0"] for word in ("--set", override)]
    execute(place, "bash", "ntk-eos run digits " + " ".join(f"'{word}'" for word in sets))
    return place


def execute(place: Path, language: str, code: str) -> str:
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "error", "-c"]}[language]
    done = subprocess.run([*program, code], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_blocks_run_and_print_the_first_time_and_the_second(folder):
    for language, code in BLOCKS:  # one test: a block may use what the one before it left
        for _ in range(2):
            printed = execute(folder, language, code)
            if "print(" in code or language == "bash":
                assert printed.strip()
            if "0.001" in code:
                values = re.findall(r"^ *(0\.[124]0?) +(0\.\d+)$", printed, re.MULTILINE)
                assert [float(rate) for rate, _ in values] == [0.1, 0.2, 0.4], "every run is there, with a number"


def test_the_readme_has_what_the_tests_run():
    assert [language for language, _ in BLOCKS].count("python") >= 3
    assert [language for language, _ in BLOCKS].count("bash") >= 3


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README.read_text()))))
def test_a_link_to_a_file_leads_somewhere(link):
    assert link.startswith("https://") or (README.parent / link).exists()
