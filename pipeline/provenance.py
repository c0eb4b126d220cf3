"""Where a run's numbers come from: versions, machine, threads, command, and the commit of this code."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ntk-eos", "numpy", "scipy", "numcodecs", "scikit-learn", "safetensors")

# A change of one of these between two sessions of a run can change its bits.
ENVIRONMENT = ("versions", "threads", "device", "cpu")


def provenance(*, torch: str, threads: int, device: str, dataset_digest: str) -> dict[str, Any]:
    """A JSON-able description of this process.

    Args:
        torch: version that torch states of itself: unlike its package's it tells builds apart.
        threads: threads that torch and BLAS may use in this process.
        device: torch device of the computation.
        dataset_digest: digest of the examples and targets.
    """
    return {
        "versions": {**_versions(), "torch": torch},
        "threads": threads,
        "device": device,
        "cpu": _cpu(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "dataset_digest": dataset_digest,
        **_git(),
    }


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two sessions that could change bits, one readable line each."""
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in ENVIRONMENT if before.get(name) != now[name]]


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _cpu() -> str:
    # The BLAS kernels depend on the type of processor, and so do the last bits of a product.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        model = ""
    return f"{model or platform.processor()} {os.environ.get('OPENBLAS_CORETYPE', '')}".strip()


@cache
def _git() -> dict[str, Any]:
    """Commit of the checkout that this code runs from; None for an installed copy."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return {"git_commit": None, "git_dirty": None}
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit.stdout.strip(), "git_dirty": bool(changes.stdout.strip())}
