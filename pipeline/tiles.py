"""A kernel larger than memory: computed tile by tile into the store, and multiplied tile by tile from there.

    K = | K_11            |     One task computes K_IJ, I ≥ J, and writes it and its mirror K_JI = K_IJᵀ: no chunk
        | K_21  K_22      |     has two writers, and half of the products are saved.
        | K_31  K_32  K_33|

A tile depends on the model and its own examples alone. What is summed on the way,

    ‖K‖² = Σ_IJ ‖K_IJ‖²,    tr K = Σ_I tr K_II,    Σ_c y_cᵀ K y_c = Σ_IJ Σ_c y_Icᵀ K_IJ y_Jc,

is kept for each tile and added at the end, rounded once. So no bit depends on the order of the tiles, on how many
processes made them, or on how often they were killed.
"""

import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.cluster import ALONE_SECONDS, LOOK_SECONDS, workers
from pipeline.errors import NtkEosError
from pipeline.kernels import KERNELS, NTK, BlockPairs
from pipeline.spectra import NonFiniteKernel, krylov_bytes
from pipeline.store import InChunks
from pipeline.sweep import THREAD_VARIABLES, begin_worker, blocked_signals, environment
from pipeline.train import computing

if TYPE_CHECKING:
    from distributed import Client

# To work in, beside examples and tile. It decides in which parts a tile is computed, and with that its last bits.
MEMORY = 2**28

# One chunk to compute: the variable, and the index of the chunk in its value.
Task = tuple[str, tuple[int, ...]]
Array = NDArray[np.float64]


def tasks_of(arrays: Mapping[str, InChunks]) -> list[Task]:
    """All chunks that are to be computed: of `ntk` the lower triangle, whose mirrors come with it."""
    return [(name, index) for name, array in arrays.items() for index in array.grid()
            if name != "ntk" or index[1] <= index[0]]  # fmt: skip


class TileMaker:
    """Computes chunks of a kernel from a model and puts them into the store.

    Args:
        model: as it is at the row.
        kernel: a name of `KERNELS` and its options.
        x: the examples of the kernel (n, ...).
        y: their targets (n, c), or None.
        train: the examples of the columns of `ntk_train_cross`, if there is one.
        arrays: `ntk`, and perhaps `ntk_train_cross`, in the row that is being written.
        spare: bytes in which more of an NTK's examples are kept captured; no bit depends on it.

    Attributes:
        arrays: the same.
    """

    def __init__(
        self,
        model: nn.Module,
        kernel: Mapping[str, Any],
        x: Tensor,
        y: Tensor | None,
        train: Tensor,
        arrays: Mapping[str, InChunks],
        spare: int = 0,
    ) -> None:
        self.arrays = arrays
        self._model, self._x, self._train = model, x, train
        self._y = None if y is None else y.numpy(force=True).astype(np.float64)
        self._kernel = KERNELS[kernel["name"]]
        self._options = {name: value for name, value in kernel.items() if name != "name"}
        self._pairs = None
        if self._kernel is NTK:
            self._options |= {"memory": MEMORY}
            self._pairs = BlockPairs(model, x, arrays["ntk"].chunks[0], spare=spare, **self._options)
            self._options |= {"keep": False}

    def ordered(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks in an order in which few examples go through the model again.

        Of panels of so many rows of tiles as can be kept beside the block of a column and the one before it.
        """
        panel = max(1, self._pairs.held - 2) if self._pairs else 1
        return sorted(tasks, key=lambda task: (task[0], task[1][0] // panel, task[1][1], task[1][0]))

    def make(self, task: Task) -> Array:
        """Compute one chunk and put it, with its mirror if it is a tile of `ntk`.

        Returns:
            What tile and mirror add to ‖K‖², tr K and Σ_c y_cᵀ K y_c; zeros for a chunk of another array.

        Raises:
            NonFiniteKernel: if it is not finite.
        """
        name, index = task
        array = self.arrays[name]
        rows, columns = array.region(index)
        others = self._x if name == "ntk" else self._train
        diagonal = name == "ntk" and rows == columns
        if name == "ntk" and self._pairs:
            kernel = self._pairs(rows, columns)
        else:
            kernel = self._kernel(self._x[rows], None if diagonal else others[columns], **self._options)(self._model)
        block = kernel.numpy(force=True)
        if not np.isfinite(block).all():
            raise NonFiniteKernel(
                f"{name} is not finite between the examples {rows.start} to {rows.stop - 1} and {columns.start} to "
                f"{columns.stop - 1}: the run diverged, or does on these examples"
            )
        array.put(index, block)
        if name == "ntk" and not diagonal:
            array.put(index[::-1], block.T)
        array.directory.sync()
        return self._sums(block, rows, columns) if name == "ntk" else np.zeros(3)

    def _sums(self, block: NDArray[Any], rows: slice, columns: slice) -> Array:
        exact = block.astype(np.float64, copy=False)
        diagonal = rows == columns
        energy = 0.0 if self._y is None else np.einsum("nc,nc->", self._y[rows], exact @ self._y[columns])
        times = 1.0 if diagonal else 2.0
        return np.array([times * np.vdot(exact, exact), np.trace(exact) if diagonal else 0.0, times * energy])


@dataclass(frozen=True)
class Pool:
    """Where tiles are made.

    Attributes:
        count: processes of this machine; with one, it is this one.
        threads: of torch and BLAS in each.
        client: of a Dask cluster, whose workers make them instead.
    """

    count: int
    threads: int
    client: "Client | None" = None


def made(
    tasks: Iterable[Task], maker: TileMaker, pool: Pool, build: Callable[[], TileMaker]
) -> Iterator[tuple[Task, Array]]:
    """Make chunks, by the maker or elsewhere, and yield each with what `make` returned, as they are done.

    Args:
        tasks: what to make.
        maker: for this process.
        pool: where.
        build: gives a maker of the same tiles in another process; it is sent there.

    Raises:
        NtkEosError: if a process was killed, or the cluster is lost or has no worker for long.
        NonFiniteKernel: as `TileMaker.make`.
    """
    if pool.count == 1 and pool.client is None:
        yield from ((task, maker.make(task)) for task in tasks)
        return
    make = partial(make_elsewhere, uuid.uuid4().hex, build, pool.threads)
    waiting = deque(tasks)
    pending: dict[Future[Array], Task] = {}
    with _processes(pool) if pool.client is None else _workers(pool.client) as (executor, places):
        try:
            while waiting or pending:
                room = 2 * places()
                with blocked_signals():  # a process that is started here leaves them to this one
                    while waiting and len(pending) < room:
                        task = waiting.popleft()
                        pending[executor.submit(make, task)] = task
                for future in wait(pending, LOOK_SECONDS, FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _processes(pool: Pool) -> Iterator[tuple[Executor, Callable[[], int]]]:
    """An executor on processes of this machine, and how many there are."""
    with environment(dict.fromkeys(THREAD_VARIABLES, str(pool.threads))):
        try:
            with ProcessPoolExecutor(pool.count, get_context("spawn"), begin_worker, (None,)) as executor:
                yield executor, lambda: pool.count
        except BrokenProcessPool as error:
            raise NtkEosError(
                "a process that computed tiles was ended; is there enough memory? The same command goes on from the "
                "last commit"
            ) from error


@contextmanager
def _workers(client: "Client") -> Iterator[tuple[Executor, Callable[[], int]]]:
    """An executor on the workers of a cluster, and how many threads they have."""
    from distributed import KilledWorker

    looked, served, threads = -math.inf, time.monotonic(), 1

    def places() -> int:
        nonlocal looked, served, threads
        now = time.monotonic()
        if now - looked > LOOK_SECONDS:
            there = workers(client)
            looked, served = now, now if there else served
            threads = max(1, sum(worker["nthreads"] for worker in there.values()))
            if now - served > ALONE_SECONDS:
                raise NtkEosError(
                    f"the scheduler had no worker for {ALONE_SECONDS:.0f} s: start one by `dask worker ADDRESS`; then "
                    "the same command goes on"
                )
        return threads

    try:
        # Whoever computes a tile also puts it into the store, so one that was computed once is not the same as another.
        yield client.get_executor(pure=False), places
    except KilledWorker as error:
        raise NtkEosError(
            f"a tile has lost {error.allowed_failures + 1} workers: is their memory too small (`dask worker "
            "--memory-limit`), or their time over? The same command goes on from the last commit"
        ) from error
    except CancelledError as error:
        raise NtkEosError(
            "the connection to the Dask scheduler was lost; what was computed is saved, the same command goes on"
        ) from error


# What a thread of another process has at hand: the name of what it was last asked for, the maker, and its settings.
_here = threading.local()


def make_elsewhere(name: str, build: Callable[[], TileMaker], threads: int, task: Task) -> Array:
    """Make one chunk in another process, with a maker that is kept for the next one.

    Args:
        name: of the maker.
        build: gives it.
        threads: of torch and BLAS.
        task: as of `TileMaker.make`.
    """
    if getattr(_here, "name", None) != name:
        vars(_here).clear()
        settings = computing(threads)
        settings.__enter__()  # until there is another: between tiles nothing else is computed in this thread
        _here.settings, _here.maker, _here.name = settings, build(), name
    return _here.maker.make(task)


class Ledger:
    """Which chunks of a row are in the store, and what each added to the sums; it is kept in the run's checkpoint.

    Args:
        step: of the row.
        arrays: as of `TileMaker`.
        kept: `tensors` of an earlier ledger, or of something else.

    Attributes:
        step: the same.
        tasks: all chunks of the row.
    """

    def __init__(self, step: int, arrays: Mapping[str, InChunks], kept: Mapping[str, Tensor]) -> None:
        self.step = step
        self.tasks = tasks_of(arrays)
        self._done = np.zeros(len(self.tasks), dtype=bool)
        self._sums = np.zeros((len(self.tasks), 3))
        if "tiles.step" in kept and kept["tiles.step"].item() == step:
            self._done[:], self._sums[:] = kept["tiles.done"].numpy() != 0, kept["tiles.sums"].numpy()
            for number in np.flatnonzero(self._done):
                name, index = self.tasks[number]
                both = {index, index[::-1]} if name == "ntk" else {index}
                # `repair` removes what no commit names.
                self._done[number] = all(arrays[name].directory.size(arrays[name].key(one)) for one in both)

    @property
    def left(self) -> list[Task]:
        """What is not in the store yet."""
        return [task for task, done in zip(self.tasks, self._done, strict=True) if not done]

    def enter(self, task: Task, sums: Array) -> None:
        """Note that a chunk is in the store."""
        number = self.tasks.index(task)
        self._done[number], self._sums[number] = True, sums

    def totals(self) -> tuple[float, float, float]:
        """‖K‖, tr K and Σ_c y_cᵀ K y_c."""
        squares, trace, energy = (math.fsum(column) for column in self._sums.T)
        return math.sqrt(squares), trace, energy

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {
            "tiles.step": torch.tensor(self.step),
            "tiles.done": torch.from_numpy(self._done.astype(np.uint8)),
            "tiles.sums": torch.from_numpy(self._sums),
        }


def product(kernel: InChunks, threads: int = 1) -> Callable[[Array], Array]:
    """V (b, n) -> V K in float64, from the tiles of the lower triangle alone.

    The parts are added in one order, so the bits do not depend on the threads.

    Args:
        kernel: K, all tiles of which are in the store.
        threads: rows of tiles that are read and multiplied at once.

    Raises:
        DamagedStore: from the product, if a tile cannot be read.
    """
    side = kernel.chunks[0]
    count = -(-kernel.shape[0] // side)

    def of_row(vectors: Array, i: int) -> tuple[Array, list[Array]]:
        """V_J K_IJᵀ summed over J ≤ I, and V_I K_IJ of each J < I."""
        rows = kernel.region((i, i))[0]
        own, mirrored = np.zeros((len(vectors), rows.stop - rows.start)), []
        for j in range(i + 1):
            tile = kernel.get((i, j)).astype(np.float64)
            own += vectors[:, j * side : (j + 1) * side] @ tile.T
            if j < i:
                mirrored.append(vectors[:, rows] @ tile)
        return own, mirrored

    def times(vectors: Array) -> Array:
        images = np.zeros_like(vectors)
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            every: Iterable[tuple[Array, list[Array]]]
            rows = range(count)
            every = pool.map(lambda i: of_row(vectors, i), rows) if pool else (of_row(vectors, i) for i in rows)
            for own, mirrored in every:
                for j, part in enumerate([*mirrored, own]):
                    images[:, j * side : (j + 1) * side] += part
        return images

    return times


def peak_bytes(n: int, k: int, side: int, processes: int, held: int) -> int:
    """The most that all processes hold together, about, from their start to the eigenpairs.

    Args:
        n: examples.
        k: eigenpairs.
        side: of a tile.
        processes: that make tiles.
        held: by this process before it begins, the examples included; by each further one as much.
    """
    tile = 4 * min(n, side) ** 2
    making = MEMORY + 8 * tile  # the tile, its mirror, both encoded, and a copy in float64
    solving = krylov_bytes(n, k) + processes * (4 * tile + 16 * n * k)
    if processes == 1:
        return held + max(making, solving)
    return held + max(processes * (held + making), solving)
