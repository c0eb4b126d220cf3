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
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import NtkEosError
from pipeline.kernels import KERNELS, NTK, BlockPairs
from pipeline.spectra import NonFiniteKernel, krylov_bytes
from pipeline.store import InChunks
from pipeline.sweep import THREAD_VARIABLES, begin_worker, blocked_signals, environment
from pipeline.train import computing

# To work in, beside examples and tile. It decides in which parts a tile is computed, and with that its last bits.
MEMORY = 2**28
POLL_SECONDS = 0.02

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
        # Without BLAS, the threads of which a process of somebody else's may have set.
        exact = block.astype(np.float64, copy=False)
        diagonal, energy = rows == columns, 0.0
        if self._y is not None:
            energy = np.sum(self._y[rows] * np.einsum("nm,mc->nc", exact, self._y[columns], optimize=False))
        times = 1.0 if diagonal else 2.0
        return np.array([times * np.sum(np.square(exact)), np.trace(exact) if diagonal else 0.0, times * energy])


Build = Callable[[], TileMaker]


class Elsewhere(Protocol):
    """Other processes that make tiles, from `with` to its end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def places(self) -> int:
        """How many chunks are made at a time."""

    def submit(self, task: Task) -> Any:
        """A future of what `TileMaker.make` returns."""

    def result(self, future: Any) -> Array | None:
        """What a future holds that is done; None if it was lost and is being made again."""


def made(tasks: Iterable[Task], elsewhere: Elsewhere) -> Iterator[tuple[Task, Array]]:
    """Make chunks in other processes, and yield each with what `make` returned, as they are done.

    Raises:
        NtkEosError: if a process was killed, or a cluster cannot do it.
        NonFiniteKernel: as `TileMaker.make`.
    """
    waiting = deque(tasks)
    pending: dict[Any, Task] = {}
    with elsewhere:
        while waiting or pending:
            room = 2 * elsewhere.places()
            while waiting and len(pending) < room:
                task = waiting.popleft()
                pending[elsewhere.submit(task)] = task
            done = [future for future in pending if future.done()]
            for future in done:
                if (sums := elsewhere.result(future)) is not None:
                    yield pending.pop(future), sums
            if not done:
                time.sleep(POLL_SECONDS)


class Processes:
    """Processes of this machine.

    Args:
        count: how many.
        threads: of torch and BLAS in each.
        build: gives a maker; it is sent there.
    """

    def __init__(self, count: int, threads: int, build: Build) -> None:
        self._count, self._threads = count, threads
        self._make = partial(make_elsewhere, uuid.uuid4().hex, threads, build)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(environment(dict.fromkeys(THREAD_VARIABLES, str(self._threads))))
        self._pool = ProcessPoolExecutor(self._count, get_context("spawn"), begin_worker, (None,))
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def places(self) -> int:
        """As many as there are."""
        return self._count

    def submit(self, task: Task) -> Future[Array]:
        """Put it into the queue; the first time all processes start, and leave the signals to this one."""
        with blocked_signals():
            return self._pool.submit(self._make, task)

    def result(self, future: Future[Array]) -> Array:
        """Raise NtkEosError if a process was killed."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise NtkEosError(
                "a process that computed tiles was ended; is there enough memory? The same command goes on from the "
                "last commit"
            ) from error


# In a process that makes tiles: the maker that was last asked for, by its name, and those that are over. One tile at a
# time, for torch's settings are those of a process.
_makers: dict[str, TileMaker] = {}
_over: set[str] = set()
_one_at_a_time = threading.Lock()


def make_elsewhere(name: str, threads: int, build: Build, task: Task) -> Array:
    """Make one chunk in another process, with a maker that is kept for the next one.

    Args:
        name: of the maker.
        threads: of torch and BLAS.
        build: gives it.
        task: as of `TileMaker.make`.
    """
    with _one_at_a_time, computing(threads):
        if name in _over:
            raise NtkEosError("the command that wanted this tile has ended")
        if name not in _makers:
            _makers.clear()
            _makers[name] = build()
        return _makers[name].make(task)


def forget(name: str) -> None:
    """Wait for the chunk that is being made, give back what the maker holds, and make no further ones."""
    with _one_at_a_time:
        _over.add(name)
        _makers.pop(name, None)


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


def peak_bytes(n: int, k: int, side: int, processes: int, held: int, *, elsewhere: bool = False) -> int:
    """The most that all processes of this machine hold together, about, from their start to the eigenpairs.

    Args:
        n: examples.
        k: eigenpairs.
        side: of a tile.
        processes: that make tiles.
        held: by this process before it begins, the examples included; by each further one as much.
        elsewhere: the tiles are made on other machines, and `processes` are threads of the products.
    """
    tile = 4 * min(n, side) ** 2
    making = MEMORY + 8 * tile  # the tile, its mirror, both encoded, and a copy in float64
    solving = krylov_bytes(n, k) + processes * (4 * tile + 16 * n * k)
    if elsewhere:
        return held + solving
    if processes == 1:
        return held + max(making, solving)
    return held + max(processes * (held + making), solving)
