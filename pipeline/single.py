"""One run in a process of its own, for a parent that may be killed at any moment.

`python -m pipeline.single` reads a job from its standard input, one line of JSON, and prints how the run ended. When
its input ends it commits and stops. The kernel ends the input also where the parent was killed, and then this process
has `GRACE_SECONDS` to commit and give its lease back: so long, and not longer, a run outlives whoever waited for it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO, cast

from pipeline.config import RunConfig
from pipeline.disk import door
from pipeline.errors import NtkEosError
from pipeline.objects import LEASE_SECONDS
from pipeline.store import LEASE, run_path
from pipeline.sweep import POLL_SECONDS, THREAD_VARIABLES, Outcome, outcome

GRACE_SECONDS = 20.0
# The lease of a killed process ends by then: it had its grace, and a lease on an object store its time.
LEASE_PATIENCE = GRACE_SECONDS + LEASE_SECONDS + 10.0


class LostProcess(NtkEosError):
    """The process of a run ended without a word."""


def job(run: RunConfig, root: str, attrs: Mapping[str, Any] | None, imports: Sequence[str]) -> str:
    """What `train_apart` is to do, as one line of JSON.

    Args:
        run: point of a study's grid.
        root: folder of the store, as the process will find it.
        attrs: further root attributes of the run.
        imports: folders in which a model of the user's own is looked for, behind everything else.
    """
    config = run.model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps({"run": config, "root": root, "attrs": attrs, "imports": list(imports)})


def train_apart(job: str, threads: int, should_stop: Callable[[], bool]) -> Outcome:
    """Train one run in a process of its own.

    Args:
        job: from the function of that name.
        threads: of the run; BLAS reads its count when it is loaded.
        should_stop: asked about twice a second; True lets the run commit and end.

    Raises:
        LostProcess: if the process was killed.
    """
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    # -P: a user's own pipeline.py in the current folder is not ours. A session of its own: Ctrl-C is for the parent.
    command = [sys.executable, "-P", "-m", "pipeline.single"]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, env=environment, text=True, start_new_session=True
        ) as process,
    ):
        lifeline = cast(TextIO, process.stdin)
        with suppress(BrokenPipeError):  # it is dead already, and how it ended tells more
            print(job, os.getpid(), sep="\n", file=lifeline, flush=True)
        while process.poll() is None:
            if should_stop():
                lifeline.close()
            time.sleep(POLL_SECONDS / 5)
        with suppress(BrokenPipeError):
            lifeline.close()
        said.seek(0)
        answer = said.read()
    if not answer:
        raise LostProcess(f"its process ended with code {process.returncode}")
    ended = json.loads(answer)
    return Outcome(**ended | {"warnings": tuple(ended["warnings"])})


def main() -> None:
    """Be that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a model prints is not how it ended
    job, parent = json.loads(sys.stdin.readline()), int(sys.stdin.readline())
    threading.Thread(target=_follow, args=(parent, stop), daemon=True).start()
    sys.path += job["imports"]
    run = RunConfig.model_validate(job["run"])
    with warnings.catch_warnings(record=True) as caught:
        _wait_for_lease(job["root"], run.run_id, stop)
        ended = outcome(run, job["root"], job["attrs"], stop.is_set)
    ended = replace(ended, warnings=tuple(dict.fromkeys(str(one.message) for one in caught)))
    print(json.dumps(vars(ended)), file=said, flush=True)


def _follow(parent: int, stop: threading.Event) -> None:
    """Stop when the input ends; end at last if nobody is there any more."""
    sys.stdin.read()
    stop.set()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _wait_for_lease(root: str, run_id: str, stop: threading.Event) -> None:
    """Wait until a process that was killed gives the run free; a writer that lives keeps it, and the run says so."""
    patience = time.monotonic() + LEASE_PATIENCE
    while door(run_path(root, run_id)).leased(LEASE) and time.monotonic() < patience and not stop.is_set():
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
