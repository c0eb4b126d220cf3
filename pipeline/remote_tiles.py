"""Tiles of a kernel on the workers of a Dask scheduler: one task per tile, which puts it straight into the store."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Self

from pipeline.cluster import (
    ALONE_SECONDS,
    ANSWER_SECONDS,
    GPU,
    LOOK_SECONDS,
    NO_GPU,
    NO_WORKER,
    TRAINING,
    ask_workers,
    check_reach,
    check_versions,
    go_elsewhere_unless_fit,
    versions,
    workers,
)
from pipeline.disk import Location
from pipeline.errors import NtkEosError
from pipeline.tiles import Array, Build, Task, forget, make_elsewhere

if TYPE_CHECKING:
    from distributed import Client, Future


class Workers:
    """Workers that make tiles, as `pipeline.tiles.Elsewhere`.

    Args:
        client: of their scheduler.
        threads: of torch and BLAS for each tile.
        build: gives a maker; it is sent there.
        folder: of the store, which all must reach under this name.
        gpu: whether only those will do that offer a GPU.

    Raises:
        NtkEosError: from its methods, if the scheduler is gone or does not answer, or workers are missing, have other
            versions, do not reach the store, or were lost again and again with one tile.
    """

    def __init__(self, client: "Client", threads: int, build: Build, folder: Location, gpu: bool) -> None:
        self._client, self._folder, self._resources = client, folder, GPU if gpu else {}
        self._name = uuid.uuid4().hex
        self._make = partial(make_elsewhere, self._name, threads, build)
        self._expected = versions(TRAINING)()
        self._known: set[str] = set()
        self._pending: set[Future] = set()
        self._looked, self._served, self._places = -math.inf, -math.inf, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """No tile is written any more when this is left, unless the scheduler or the worker does not answer."""
        with suppress(NtkEosError):
            for future in self._pending:
                future.cancel()
            ask_workers(self._client, forget_on_worker, self._name)

    def places(self) -> int:
        """How many workers there are: each makes a tile at a time."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return self._places
        there = workers(self._client)
        if new := there.keys() - self._known:
            check_versions(self._client, TRAINING)
            check_reach(self._client, self._folder)
            self._known |= new
        fit = sum(1 for worker in there.values() if not self._resources or worker["resources"].get("GPU"))
        self._looked, self._served, self._places = now, now if fit else self._served, max(1, fit)
        if now - self._served > ALONE_SECONDS:
            raise NtkEosError(f"{NO_GPU if there else NO_WORKER}; then the same command goes on")
        return self._places

    def submit(self, task: Task) -> "Future":
        """A task that the scheduler gives to another worker when the first is lost."""
        future = self._client.submit(
            make_on_worker, self._make, task, self._expected, str(self._folder),
            key=f"tile-{self._name}-{task[0]}-{'.'.join(map(str, task[1]))}", resources=self._resources, pure=False,
        )  # fmt: skip
        self._pending.add(future)
        return future

    def result(self, future: "Future") -> Array | None:
        """The sums of a tile; None if its worker is lost, so that it is computed again."""
        from distributed import KilledWorker

        if future.status == "finished":
            try:
                sums = future.result(timeout=ANSWER_SECONDS)
            except TimeoutError:
                return None
            self._pending.discard(future)
            return sums
        if future.status != "error":
            raise NtkEosError(
                "the connection to the Dask scheduler was lost; what was computed is saved, the same command goes on"
            )
        error = future.exception(timeout=ANSWER_SECONDS)
        if isinstance(error, KilledWorker):
            raise NtkEosError(
                f"a tile has lost {error.allowed_failures + 1} workers: is their memory too small (`dask worker "
                "--memory-limit`), or their time over? The same command goes on from the last commit"
            ) from error
        raise error


# --- on the workers ---------------------------------------------------------------------------------------------------


def make_on_worker(make: Callable[[Task], Array], task: Task, expected: Mapping[str, str], folder: str) -> Array:
    """Make one tile; the task.

    Args:
        make: `pipeline.tiles.make_elsewhere` of all but the task.
        task: which tile.
        expected: the versions of the command.
        folder: of the store.
    """
    go_elsewhere_unless_fit(expected, folder)
    return make(task)


async def forget_on_worker(name: str) -> None:
    """Wait for the tile that is being made, beside everything else that the worker does."""
    await asyncio.to_thread(forget, name)
