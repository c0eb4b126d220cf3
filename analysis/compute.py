"""Where lazy results are computed: by threads within a budget of memory, or by the workers of a Dask cluster.

    with analysis.computing(memory="2GiB"):
        alignments = analysis.alignment(analysis.open_sweep(root)).compute()

The blocks of an array do not depend on where they are computed, and a task is single-threaded, so the bits do not
either: not on the scheduler, the number of workers, or which of them were lost on the way.

A task holds a block of a stored array, 16 MiB, with float64 copies and the intermediates of what is measured of it: at
most `TASK_BYTES`. Where all eigenvalues of a larger kernel are taken, it holds the kernel and LAPACK's copies of it.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import InputError, NtkEosError
from pipeline.schema import TILED
from pipeline.store import Run

if TYPE_CHECKING:  # imported where something is computed
    from distributed import Client, WorkerPlugin

# 20 blocks, with what the allocator keeps: docs/reliability.md has what was measured of it (R22).
TASK_BYTES = 320 * 2**20
# Per entry of a kernel in more than one block whose eigenvalues are taken: float32 twice, while it is joined, float64
# twice, as LAPACK works on a copy.
WHOLE_KERNEL = 24

BUDGET = "ntk-eos.memory"


@contextmanager
def computing(scheduler: str | None = None, memory: int | str | None = None) -> Iterator["Client | None"]:
    """Compute here what is computed meanwhile: `.compute()`, `.load()`, `.values`, and the results of a store.

    Args:
        scheduler: address of a Dask scheduler, such as "tcp://host:8786"; threads of this process by default.
        memory: budget of these threads in bytes, or as "2GiB", beside the 300 MiB or so of the process itself; half of
            what is free by default. That of a cluster's workers is theirs: `dask worker --memory-limit`.

    Yields:
        The client of the cluster, or None.

    Raises:
        InputError: for a budget that is no number of bytes or too small for one task, or given with a scheduler.
        NtkEosError: if the scheduler cannot be reached or is lost, a task has lost all workers that it was given to, or
            a worker has other versions.
    """
    import dask

    if scheduler is None:
        with dask.config.set({BUDGET: in_bytes(memory)}), threads_for(TASK_BYTES):
            yield None
        return
    if memory is not None:
        raise InputError("memory: the workers of a cluster have their own, given by `dask worker --memory-limit`")
    from pipeline.cluster import ANALYSIS, connect

    with connect(scheduler, ANALYSIS) as client:
        client.register_plugin(_one_thread(), name="ntk-eos: one BLAS thread per task")
        with _one_line_for_what_is_lost(scheduler), dask.config.set(scheduler=client):
            yield client


@contextmanager
def threads_for(task: int) -> Iterator[None]:
    """Threads for tasks of so many bytes, as many as the cores and the budget have room for; a cluster stays one.

    Raises:
        InputError: if the budget that was given has room for none.
    """
    import dask
    from dask.system import cpu_count
    from dask.utils import format_bytes
    from threadpoolctl import threadpool_limits

    given = dask.config.get(BUDGET, None)
    fit = (psutil.virtual_memory().available // 2 if given is None else given) // task
    if given is not None and not fit:
        raise InputError(
            f"memory = {format_bytes(given)}: a task takes up to {format_bytes(task)} here; give at least as much"
        )
    # BLAS threads below Dask's threads would fight for the cores.
    with dask.config.set(num_workers=max(1, min(fit, cpu_count()))), threadpool_limits(1):
        yield


def in_bytes(given: int | str | None) -> int | None:
    """Bytes of a number or a text such as 1.5GiB; None stays None.

    Raises:
        InputError: if it is no number of bytes above 0.
    """
    from dask.utils import parse_bytes

    if given is None:
        return None
    try:
        found = parse_bytes(given)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise InputError(f"memory = {given}: must be a number of bytes above 0, such as 800MiB or 1.5GiB")
    return found


def task_bytes(runs: Iterable[Run]) -> int:
    """What a task takes at most that measures one of these runs."""
    sizes = [run.node("snapshots/ntk")["shape"][1] for run in runs if "ntk" in run.arrays("snapshots")]
    return max([TASK_BYTES, *(WHOLE_KERNEL * n**2 for n in sizes if n < TILED)])


def tasks_at_once() -> int:
    """How many tasks are computed at a time."""
    import dask
    from dask.system import cpu_count

    client = _client()
    return dask.config.get("num_workers", cpu_count()) if client is None else max(1, sum(client.nthreads().values()))


def dashboard() -> str | None:
    """Where one can watch the cluster that computes, if there is one."""
    client = _client()
    return None if client is None else client.dashboard_link


def _client() -> "Client | None":
    dask = sys.modules.get("dask")
    if dask is None:  # then nobody has chosen where to compute, and to say so need not import it
        return None
    chosen = dask.config.get("scheduler", None)
    if chosen in ("dask.distributed", "distributed"):  # by a client of the caller's own
        from distributed import default_client

        return default_client()
    return chosen if type(chosen).__name__ == "Client" else None


def _one_thread() -> "WorkerPlugin":
    """What each worker of a cluster does before its first task, those that come later too."""
    from distributed import WorkerPlugin

    class OneThread(WorkerPlugin):
        def setup(self, worker: object) -> None:
            import numpy  # noqa: F401 - limits hold for libraries that are loaded
            from threadpoolctl import threadpool_limits

            threadpool_limits(1)

    return OneThread()


@contextmanager
def _one_line_for_what_is_lost(scheduler: str) -> Iterator[None]:
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except KilledWorker as error:
        raise NtkEosError(
            f"a task has lost {error.allowed_failures + 1} workers: is their memory too small (`dask worker "
            "--memory-limit`), or their time over?"
        ) from error
    except (CommClosedError, FutureCancelledError) as error:
        raise NtkEosError(
            f"the Dask scheduler at {scheduler} is gone; start it again and repeat the command"
        ) from error
