"""A process that commits hundreds of times holds no more files, threads or memory than it did after the first few."""

import json
import subprocess
import sys

import many_commits
import numpy as np
from sizes import sizes

# The allocator settles within this many commits; a leak of one page, 4096 bytes, per commit would be a leak indeed:
# a day of commits every five seconds would then take 70 MB.
WARM_UP = 100
PAGE = 4096


def held(loop, root, commits):
    """Commits made, files, threads and bytes held, at every tenth commit of another process."""
    command = [sys.executable, many_commits.__file__, loop, str(root), str(commits)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return np.array([json.loads(line) for line in said.splitlines()]).T


def growth(commits, held):
    """What is held more per commit, fitted after the warm-up."""
    late = commits > WARM_UP
    return np.polyfit(commits[late], held[late], 1)[0] if late.sum() > 2 else 0.0


def look(measured, case, loop, root, commits):
    number, files, threads, memory = held(loop, root, commits)
    assert number[-1] == commits
    assert files[-1] == files[0]
    assert threads[-1] == threads[0]
    slope = growth(number, memory)
    assert slope < PAGE
    figures = {"files_gained": int(files[-1] - files[0]), "threads_gained": int(threads[-1] - threads[0])}
    if commits > WARM_UP:
        figures |= {"bytes_gained_per_commit": round(float(slope)), "tolerated_bytes_per_commit": PAGE}
    measured("R23", case, commits=commits, files=int(files[-1]), **figures)


@sizes("commits", short=40, full=500, soak=10_000)
def test_a_writer_keeps_nothing_of_its_commits(tmp_path, measured, commits):
    look(measured, "commits of the writer in one process", "writer", tmp_path, commits)


@sizes("commits", full=500, soak=5000)
def test_a_training_loop_keeps_nothing_of_its_commits(tmp_path, measured, commits):
    look(measured, "training steps with a commit each in one process", "recorder", tmp_path, commits)


def test_a_leak_would_be_seen():
    commits = np.arange(10, 510, 10)
    settling = 1e8 + 1e6 * np.minimum(commits, 80)
    assert growth(commits, settling) < PAGE
    assert growth(commits, settling + 2 * PAGE * commits) > PAGE
