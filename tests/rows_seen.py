"""What a reader sees of a store from one moment to the next, for tests that kill its writers."""

from itertools import zip_longest
from pathlib import Path

from pipeline.disk import door, location
from pipeline.errors import NtkEosError
from pipeline.store import list_runs


def committed(root: Path | str) -> dict[str, dict[str, list[str]]]:
    """Digests of all rows that a reader sees, by run and group."""
    if not door(location(root) / "runs").is_there():
        return {}
    return {
        run.run_id: {group: [bytes(row).hex() for row in run.read(f"{group}/digest")] for group in run.lengths}
        for run in list_runs(root)
    }


def lost_rows(seen: dict[str, dict[str, list[str]]], now: dict[str, dict[str, list[str]]]) -> int:
    """How many rows that were seen are not there any more, or are others."""
    return sum(
        digest != there
        for run, groups in seen.items()
        for group, digests in groups.items()
        for digest, there in zip_longest(digests, now.get(run, {}).get(group, [])[: len(digests)])
    )


def commits(root: Path | str) -> int:
    """Commits of all runs together."""
    try:
        return sum(run.attrs["commits"] for run in list_runs(root))
    except NtkEosError:
        return 0
