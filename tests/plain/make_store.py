"""Writes the store that the plain reads are tried on: one finished run, one that is still growing.

python tests/plain/make_store.py FOLDER
"""

import sys

from pipeline.config import load_study
from pipeline.train import train


def main(root: str) -> None:
    """Train the smoke study, and stop its last run half way."""
    *whole, last = load_study("smoke", ["stop.steps=40"]).runs()
    for run in whole:
        train(run, root)
    asked = iter(range(1000))
    train(last, root, should_stop=lambda: next(asked) == 20)


if __name__ == "__main__":
    main(sys.argv[1])
