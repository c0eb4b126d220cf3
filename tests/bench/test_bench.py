"""The benchmark runs and prints a ratio for every row; its figures are not judged here."""

import re
import subprocess
import sys
from pathlib import Path


def test_every_row_has_a_ratio():
    script = Path(__file__).with_name("run.py")
    printed = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, check=True).stdout
    rows = printed.splitlines()[2:]
    assert len(rows) == 19, "fifteen, and four parts of a recorded row"
    for row in rows:
        assert re.search(r"against .*\d.* \d+(\.\d+)? ?(x|of) ", row), row
