"""Many runs at once on one machine: one single-threaded process per core, one run as the unit of work.

Runs share nothing, so a sweep is a pool of processes over a list of them. Their progress is read from the heartbeats
in the store, where `status` and other machines see the same.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import NtkEosError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        run_id: which run.
        status: complete, diverged, interrupted or failed.
        error: one line if it failed.
        detail: the traceback of a failure that has no one-line explanation.
        exit_code: what the command returns for this failure alone.
    """

    run_id: str
    status: str
    error: str | None = None
    detail: str | None = None
    exit_code: int = 0


def sweep(
    runs: Iterable[RunConfig],
    root: str,
    *,
    attrs: Mapping[str, Any] | None = None,
    workers: int | None = None,
    on_poll: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Train all runs, as many at a time as fit on the cores, and yield how each ended.

    A sweep that is asked to stop lets its runs commit what they have; their outcomes are then `interrupted`, and the
    next call goes on from there.

    Args:
        runs: points of a study's grid.
        root: folder of the store.
        attrs: further root attributes of each run.
        workers: runs at a time; cores divided by the threads of a run by default.
        on_poll: called about twice a second, for progress displays; True asks the sweep to stop.
    """
    waiting = list(runs)
    if not waiting:
        return
    threads = max(run.compute.threads for run in waiting)
    count = workers or max(1, (os.cpu_count() or 1) // threads)
    context = get_context("spawn")
    stop = context.Event()
    with (
        _environment(dict.fromkeys(THREAD_VARIABLES, str(threads))),
        ProcessPoolExecutor(min(count, len(waiting)), context, _begin, (stop,)) as pool,
    ):
        pending: dict[Future[Outcome], str] = {pool.submit(_one, run, root, attrs): run.run_id for run in waiting}
        while pending:
            done, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            if on_poll():
                stop.set()
            for future in done:
                run_id = pending.pop(future)
                error = future.exception()
                yield Outcome(run_id, "failed", f"its process ended: {error}", None, 1) if error else future.result()


_stop: Any = None


def _begin(stop: Any) -> None:
    """Set up a worker: it ends with its parent, and lets the parent decide what a signal means."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process with its parent: nobody waits for the run any more, and what it committed is safe."""
    connection.wait([parent])
    os._exit(1)


def _one(run: RunConfig, root: str, attrs: Mapping[str, Any] | None) -> Outcome:
    """Train one run in a worker; failures come back as outcomes, so that the others go on."""
    from pipeline.train import train

    if _stop.is_set():
        return Outcome(run.run_id, "interrupted")
    try:
        return Outcome(run.run_id, train(run, root, attrs=attrs, should_stop=_stop.is_set))
    except NtkEosError as error:
        return Outcome(run.run_id, "failed", str(error), None, error.exit_code)
    except Exception as error:
        return Outcome(run.run_id, "failed", f"{type(error).__name__}: {error}", traceback.format_exc(), 1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that child processes inherit: BLAS reads its thread count when it is loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
