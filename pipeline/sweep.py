"""Many runs at once on one machine: one single-threaded process per core, one run as the unit of work.

Runs share nothing, so a sweep is a pool of processes over a list of them. Their progress is read from the heartbeats
in the store, where `status` and other machines see the same.
"""

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import InputError, NtkEosError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
POLL_SECONDS = 0.5
ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        run_id: which run.
        status: complete, diverged, interrupted or failed.
        error: one line if it failed.
        detail: the traceback of a failure that has no one-line explanation.
        exit_code: what the command returns for this failure alone.
        warnings: what its process warned of, where that cannot write to the terminal itself.
    """

    run_id: str
    status: str
    error: str | None = None
    detail: str | None = None
    exit_code: int = 0
    warnings: tuple[str, ...] = ()


def default_workers(runs: Iterable[RunConfig]) -> int:
    """Runs at a time: the cores this process may use over the threads of a run; one on an accelerator."""
    from dask.system import cpu_count  # what a worker process need not import

    compute = [run.compute for run in runs]
    if any(one.device != "cpu" for one in compute):
        return 1
    return max(1, cpu_count() // max((one.threads for one in compute), default=1))


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
    next call goes on from there. Runs whose process was killed (out of memory, say) are taken up again twice.

    Args:
        runs: points of a study's grid.
        root: folder of the store.
        attrs: further root attributes of each run.
        workers: runs at a time; `default_workers` by default.
        on_poll: called about twice a second, for progress displays; True asks the sweep to stop.

    Raises:
        InputError: for a root in the memory of this process.
    """
    if root.startswith("memory://"):
        raise InputError(f"{root} is in the memory of one process, and runs are trained in others: give a folder")
    waiting = list(runs)
    for _ in range(ATTEMPTS):
        if waiting:
            waiting = yield from _attempt(waiting, root, attrs, workers or default_workers(waiting), on_poll)
    for run in waiting:
        yield Outcome(run.run_id, "failed", f"its process ended {ATTEMPTS} times; is there enough memory?", None, 1)


def _attempt(
    waiting: list[RunConfig],
    root: str,
    attrs: Mapping[str, Any] | None,
    workers: int,
    on_poll: Callable[[], bool],
) -> Generator[Outcome, None, list[RunConfig]]:
    """One pool of processes over the runs; returns those that lost their process, or their turn with another's."""
    threads = max(run.compute.threads for run in waiting)
    context = get_context("spawn")
    stop = context.Event()
    lost: list[RunConfig] = []
    with (
        environment(dict.fromkeys(THREAD_VARIABLES, str(threads))),
        ProcessPoolExecutor(min(workers, len(waiting)), context, begin_worker, (stop,)) as pool,
    ):
        pending: dict[Future[Outcome], RunConfig] = {}
        try:
            with blocked_signals():
                for run in waiting:
                    pending[pool.submit(_one, run, root, attrs)] = run
            while pending:
                done, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                if on_poll():
                    stop.set()
                for future in done:
                    run = pending.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        lost.append(run)
                    else:
                        yield future.result()
        except BrokenProcessPool:  # while submitting
            lost += [run for run in waiting if run not in pending.values()]
            lost += pending.values()
        finally:
            # However this ends: what has begun commits and returns, what has not begun never does.
            stop.set()
            pool.shutdown(cancel_futures=True)
    return lost


_stop: Any = None


def begin_worker(stop: Any) -> None:
    """Set up a worker: it ends with its parent, and lets the parent decide what a signal means."""
    global _stop
    _stop = stop
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
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
    """Train one run in a worker."""
    return outcome(run, root, attrs, _stop.is_set)


def outcome(run: RunConfig, root: str, attrs: Mapping[str, Any] | None, should_stop: Callable[[], bool]) -> Outcome:
    """Train one run; a failure comes back as an outcome, so that the others go on.

    Args:
        run: point of a study's grid.
        root: folder of the store.
        attrs: further root attributes of the run.
        should_stop: as for `pipeline.train.train`; asked before anything is done as well.
    """
    from pipeline.train import train

    if should_stop():
        return Outcome(run.run_id, "interrupted")
    try:
        return Outcome(run.run_id, train(run, root, attrs=attrs, should_stop=should_stop))
    except NtkEosError as error:
        return Outcome(run.run_id, "failed", str(error), None, error.exit_code)
    except OSError as error:  # a full disk, a folder that was removed
        return Outcome(run.run_id, "failed", str(error), None, 1)
    except Exception as error:
        return Outcome(run.run_id, "failed", f"{type(error).__name__}: {error}", traceback.format_exc(), 1)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Processes started meanwhile never see the signals of a terminal, not even before they can set a handler.

    They inherit the mask of this thread. Here a signal that comes meanwhile is handled at the end. (The process that
    tracks multiprocessing's resources, whose start would unblock them, was started with the event `stop`.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
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
