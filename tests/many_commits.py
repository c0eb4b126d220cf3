"""Commits many times in one process, and prints what the process holds after every tenth time.

python tests/many_commits.py writer|recorder ROOT COMMITS
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from unittest.mock import patch

import psutil
from writer_loop import advance, next_step, open_writer


def by_writer(root: str, commits: int) -> Iterator[None]:
    """The writer alone: rows of every group."""
    with open_writer(root) as writer:
        for _ in range(commits):
            advance(writer, next_step(writer) + 1)
            yield


def by_recorder(root: str, commits: int) -> Iterator[None]:
    """A training loop that measures, and commits at every step."""
    import torch
    from torch import nn

    from pipeline.cadence import Cadence
    from pipeline.record import Probe, Recorder

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(20, 3)
    y = torch.sign(x[:, :1])
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(
        root, model, Probe(x, y), identity={}, learning_rate=0.1, seed=0, steps=commits, commit_seconds=0.0,
        eigenpairs=5, cadences={"snapshots": Cadence(every=5), "scalars": Cadence(every=1)},
    )  # fmt: skip
    with recorder:
        for step in recorder:
            loss = 0.5 * ((model(x) - y) ** 2).mean()
            recorder.record(step, loss=loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


EVERY = 10
LOOPS: dict[str, Callable[[str, int], Iterator[None]]] = {"writer": by_writer, "recorder": by_recorder}


def main(loop: str, root: str, commits: str) -> None:
    process = psutil.Process()
    # An fsync holds nothing. (A Mock in its place would: it remembers every call.)
    with patch("os.fsync", lambda handle: None):
        for number, _ in enumerate(LOOPS[loop](root, int(commits)), start=1):
            if number % EVERY == 0:
                gc.collect()
                held = [process.num_fds(), process.num_threads(), process.memory_info().rss]
                print(json.dumps([number, *held]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
