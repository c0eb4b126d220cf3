"""Many runs at once on the workers of a Dask scheduler: one task per run, each in a process of its own there.

The scheduler chooses the worker, and another when that one is lost. A run is committed as it goes and its lease has one
holder, so a task may begin again anywhere and ends with the same bits. A task goes on while some sweep waits for it:
two sweeps of one store share the tasks that they have in common, and a command that was killed leaves none behind.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from traceback import format_exception
from typing import TYPE_CHECKING, Any

from pipeline.cluster import (
    ALONE_SECONDS,
    ANSWER_SECONDS,
    GPU,
    LOOK_SECONDS,
    NO_GPU,
    NO_WORKER,
    TRAINING,
    check_reach,
    check_versions,
    connect,
    go_elsewhere_unless_fit,
    processing,
    versions,
    workers,
)
from pipeline.config import RunConfig
from pipeline.disk import door, location
from pipeline.errors import InputError, NtkEosError
from pipeline.single import LostProcess, job, train_apart
from pipeline.store import LEASE, RUNS, is_run, open_root, read_run, run_path
from pipeline.sweep import ATTEMPTS, POLL_SECONDS, Outcome

if TYPE_CHECKING:
    from distributed import Client, Future


def sweep_on(
    scheduler: str,
    runs: Iterable[RunConfig],
    root: str,
    *,
    attrs: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    on_poll: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Train all runs on the workers of a Dask scheduler, and yield how each ended, as `pipeline.sweep.sweep` does.

    A run whose worker is lost goes on elsewhere from its last commit, as often as it takes while it gets on.

    Args:
        scheduler: address, such as `tcp://host:8786`.
        runs: points of a study's grid.
        root: store, which all workers must reach under this name.
        attrs: further root attributes of each run.
        imports: folders in which workers look for a user's own model.
        on_poll: called about twice a second, for progress displays; True asks the sweep to stop.

    Raises:
        InputError: for a root in the memory of this process, or something that is no address.
        NtkEosError: if the scheduler does not answer, or workers are missing, have other versions, do not reach the
            root, or offer no GPU where a run needs one; what has begun then commits and stops.
    """
    if root.startswith("memory://"):
        raise InputError(f"{root} is in the memory of one process, and runs are trained in others: give a folder")
    root = root if "://" in root else os.path.abspath(root)
    with connect(scheduler, TRAINING) as client:
        yield from _Sweep(client, root, attrs, imports, on_poll).outcomes(list(runs))


@dataclass(frozen=True)
class _Task:
    """A task that the scheduler has.

    Attributes:
        run: what it trains.
        future: its result.
        number: of the tasks that the run has had.
        commits: of the run when the task before was lost.
        losses: tasks lost in a row without a commit between.
    """

    run: RunConfig
    future: "Future"
    number: int
    commits: int
    losses: int


class _Sweep:
    """The tasks of one sweep, from the first to the last."""

    def __init__(
        self,
        client: "Client",
        root: str,
        attrs: Mapping[str, Any] | None,
        imports: Sequence[str],
        on_poll: Callable[[], bool],
    ) -> None:
        self._client, self._root, self._attrs, self._imports, self._on_poll = client, root, attrs, imports, on_poll
        self._pending: dict[str, _Task] = {}
        self._known: set[str] = set()
        self._runs = location(root) / RUNS

    def outcomes(self, runs: Sequence[RunConfig]) -> Iterator[Outcome]:
        """How each run ended, as they end."""
        open_root(self._root)
        if lacking := self._look(runs):
            raise NtkEosError(lacking)
        for run in runs:
            self._send(run)
        looked = served = time.monotonic()
        while self._pending:
            time.sleep(POLL_SECONDS)
            if self._on_poll():
                yield from self._stop()
                return
            for task in list(self._pending.values()):
                if task.future.done() and (ended := self._ended(task)):
                    del self._pending[task.run.run_id]
                    yield ended
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked = now
                lacking = self._look([task.run for task in self._pending.values()])
                served = served if lacking else now
                if now - served > ALONE_SECONDS:
                    raise NtkEosError(f"{lacking}, for {ALONE_SECONDS:.0f} s now; then the same command goes on")

    def _send(self, run: RunConfig, number: int = 1, commits: int = 0, losses: int = 0) -> None:
        """Submit a task under a name that says what it does: who submits the same meanwhile shares it."""
        what = f"{self._root}\0{run.model_dump_json(exclude={'axes'})}"
        name = f"train-{hashlib.blake2b(what.encode(), digest_size=4).hexdigest()}-{run.run_id}"
        future = self._client.submit(
            train_on_worker,
            job(run, self._root, self._attrs, self._imports),
            run.compute.threads,
            versions(TRAINING)(),
            str(self._runs),
            key=name if number == 1 else f"{name}-{number}",
            resources=_needs(run),
            retries=ATTEMPTS - 1,
            pure=False,
        )
        self._pending[run.run_id] = _Task(run, future, number, commits, losses)

    def _ended(self, task: _Task) -> Outcome | None:
        """How a run ended; None if it was sent again."""
        from distributed import KilledWorker

        run_id = task.run.run_id
        if task.future.status == "finished":
            try:
                ended = task.future.result(timeout=ANSWER_SECONDS)
            except TimeoutError:
                return None  # its worker is lost, and with it the result: it is being computed again
            return ended if ended.status != "interrupted" else self._again(task, "its process was asked to end")
        if task.future.status != "error":
            raise NtkEosError(
                "the connection to the Dask scheduler was lost; what was measured is saved, the same command goes on"
            )
        error = task.future.exception(timeout=ANSWER_SECONDS)
        if isinstance(error, KilledWorker):
            return self._again(task, f"{error.allowed_failures + 1} workers were lost with it")
        if isinstance(error, LostProcess):
            return self._again(task, str(error))
        detail = "".join(format_exception(error))
        return Outcome(run_id, "failed", f"{type(error).__name__}: {error}", detail, 1)

    def _again(self, task: _Task, what: str) -> Outcome | None:
        """Send a lost run again, unless it does not get on."""
        path = run_path(self._root, task.run.run_id)
        commits = read_run(path).attrs["commits"] if is_run(path) else 0
        losses = 1 if commits > task.commits else task.losses + 1
        if losses >= ATTEMPTS:
            said = f"{what}, {losses} times without a commit between; is there enough memory?"
            return Outcome(task.run.run_id, "failed", said, None, 1)
        self._send(task.run, task.number + 1, commits, losses)
        return None

    def _look(self, runs: Iterable[RunConfig]) -> str:
        """Refuse new workers that do not fit; what no worker offers, if there is such a thing."""
        there = workers(self._client)
        if new := there.keys() - self._known:
            check_versions(self._client, TRAINING)
            check_reach(self._client, self._runs)
            self._known |= new
        if any(_needs(run) for run in runs) and not any(worker["resources"].get("GPU") for worker in there.values()):
            return NO_GPU
        return "" if there else NO_WORKER

    def _stop(self) -> Iterator[Outcome]:
        """Wait for no task any more, but until those that had begun have committed."""
        begun = processing(self._client)
        left = {run_id: task.future.key for run_id, task in self._pending.items() if task.future.key in begun}
        for task in self._pending.values():
            task.future.release()
        while left:
            time.sleep(POLL_SECONDS)
            self._on_poll()
            shared = processing(self._client)  # another sweep waits for these, and they go on
            left = {
                run_id: key for run_id, key in left.items()
                if key not in shared and door(run_path(self._root, run_id)).leased(LEASE)
            }  # fmt: skip
        yield from (Outcome(run_id, "interrupted") for run_id in self._pending)


def _needs(run: RunConfig) -> dict[str, int]:
    return GPU if run.compute.device.startswith("cuda") else {}


# --- on the workers ---------------------------------------------------------------------------------------------------


def train_on_worker(job: str, threads: int, expected: Mapping[str, str], folder: str) -> Outcome:
    """Train one run; the task.

    Args:
        job: as of `pipeline.single.job`.
        threads: of the run.
        expected: the versions of the command.
        folder: where the store keeps its runs.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    go_elsewhere_unless_fit(expected, folder)

    def unwanted() -> bool:
        # The scheduler cannot end a thread: it only notes in the worker's state that nobody waits for the task.
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status.name in ("closing", "closed")

    return train_apart(job, threads, unwanted)
