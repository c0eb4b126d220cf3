"""The command that computes a kernel on many examples, watched from outside: for tests and the scale study.

Memory is the resident set of the command and all its children, looked at every 20 ms.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from pipeline.config import File, Mlp, Record, RunConfig, Stop
from pipeline.store import run_path
from pipeline.train import train

COMMAND = Path(sys.executable).with_name("ntk-eos")
FEATURES, WIDTH, PAIRS = 64, 128, 20


def trained(folder: Path, n: int) -> tuple[Path, Path]:
    """A short run on a few examples, and a file with n of the same kind, whose covariance decays as a power law."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, FEATURES)) / np.sqrt(np.arange(1, 1 + FEATURES))
    y = np.sign(x @ rng.normal(size=FEATURES))
    np.savez(folder / "train.npz", x=x[:200], y=y[:200])
    np.savez(folder / "probe.npz", x=x.astype(np.float32), y=y)
    run = RunConfig(
        learning_rate=0.1, data=File(file=str(folder / "train.npz")), model=Mlp(width=WIDTH, depth=2),
        stop=Stop(steps=20), record=Record(eigenpairs=PAIRS),
    )  # fmt: skip
    train(run, str(folder / "store"))
    return run_path(folder / "store", run.run_id), folder / "probe.npz"


def command(run: Path, probe: Path, *more: str) -> list[str]:
    return [str(COMMAND), "kernel", str(run), "--probe", str(probe), "--json", "-q", *more]


def watched(arguments: list[str]) -> tuple[Path, int]:
    """Run the command to its end: where the result lies, and the most memory that was seen."""
    with psutil.Popen(arguments, stdout=subprocess.PIPE) as process:
        most = 0
        while process.poll() is None:
            most = max(most, held(process))
            time.sleep(0.02)
        assert process.returncode == 0
        (row,) = json.loads(process.stdout.read())["rows"]
    return Path(row["path"]), most


def held(process: psutil.Process) -> int:
    try:
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0
