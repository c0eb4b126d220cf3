"""What a replay would take, before anything is computed: memory, room on disk, and seconds."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from pipeline import matrix_free as products
from pipeline import schema
from pipeline.console import bytes_text
from pipeline.disk import Directory, Location, door
from pipeline.errors import InputError
from pipeline.measure import KernelChoice, Measure
from pipeline.plan import kernel_bytes
from pipeline.rebuild import check_parameters, load_snapshot, network_of, threads_of
from pipeline.record import Probe
from pipeline.request import Request, ask
from pipeline.spectra import GUARDS, krylov_bytes
from pipeline.store import InChunks, is_run
from pipeline.tiles import TileMaker, peak_bytes, product, tasks_of
from pipeline.train import computing


@dataclass(frozen=True)
class Forecast:
    """What a replay would take, before anything is computed.

    Attributes:
        run: name of the run.
        n: examples.
        rows: snapshots that are left to do.
        tiles: of each, half of which are computed; 1 where the kernel is in memory, 0 where it is not formed.
        nbytes: of the result on disk, before compression, which saves a tenth.
        memory: bytes that all processes hold together, at most.
        seconds: measured on a few examples; None where there is nothing to do.
    """

    run: str
    n: int
    rows: int
    tiles: int
    nbytes: int
    memory: int
    seconds: float | None


def forecast(
    run: str | Location,
    *,
    kernel: KernelChoice = "ntk",
    probe: str | Path | Probe = "test",
    layers: bool = False,
    at: str | Iterable[int] = "final",
    model: nn.Module | None = None,
    allow_imports: bool = False,
    workers: int = 1,
    memory: int | None = None,
    matrix_free: float | None = None,
) -> Forecast:
    """What `replay` with the same arguments would take; nothing is written.

    The time is that of one tile of each kind and of one product, on as many examples, times their number.

    Raises:
        InputError: as `replay`, also if there is not enough memory or room on disk.
    """
    asked = ask(run, kernel, probe, layers, at, matrix_free)
    done = asked.last_step
    left = [step for step in asked.rows.values() if step > done]
    side = min(asked.n, schema.TILE) if asked.in_tiles else asked.n
    tiles = 0 if asked.matrix_free is not None else (-(-asked.n // side)) ** 2
    room = Room(asked, workers)
    if not left:
        return Forecast(asked.source.run_id, asked.n, 0, tiles, room.nbytes, room.memory, None)
    room.check(memory)
    with computing(threads_of(asked.source)):
        network = network_of(asked.source, allow_imports) if model is None else model
        check_parameters(asked.source, network)
        load_snapshot(asked.source, network, next(row for row, step in asked.rows.items() if step == left[0]))
        seconds = len(left) * _seconds_per_row(asked, network, workers)
    return Forecast(asked.source.run_id, asked.n, len(left), tiles, room.nbytes, room.memory, seconds)


class Room:
    """What a replay needs on this machine.

    Args:
        asked: the replay.
        workers: processes that make tiles, and threads of the products.
        elsewhere: the tiles are made on other machines.

    Attributes:
        memory: bytes that all processes hold together, at most.
        nbytes: of the result on disk.
    """

    def __init__(self, asked: Request, workers: int, *, elsewhere: bool = False) -> None:
        n, trained, rows = asked.n, asked.source.node("probe/input")["shape"][0], len(asked.rows)
        c = asked.examples.arrays["target"].shape[1]
        self._asked, self._workers = asked, workers
        cross = 0 if asked.examples.label == "train" else 4 * n * trained
        small = sum(array.nbytes for array in asked.examples.arrays.values()) + rows * n * (4 * asked.pairs + 8 * c)
        if asked.matrix_free is not None:
            held = psutil.Process().memory_info().rss
            p = asked.source.node("snapshots/parameter")["shape"][1]
            graphs = products.MEMORY + max(2**27, 8 * p) + 16 * p
            self.memory, self.nbytes = held + graphs + krylov_bytes(n, asked.pairs), small
        elif asked.in_tiles:
            held = psutil.Process().memory_info().rss
            self.memory = peak_bytes(n, asked.pairs, schema.TILE, workers, held, elsewhere=elsewhere)
            self.nbytes = rows * (4 * n * n + cross) + small
        else:
            pairs = c if asked.kernel["name"] == "ntk" else 1  # of outputs are measured together
            self.memory = psutil.Process().memory_info().rss + kernel_bytes(n, pairs) + 2 * cross
            self.nbytes = rows * (4 * n * n + cross) + small

    def check(self, limit: int | None) -> int:
        """Raise InputError for what does not fit.

        Args:
            limit: bytes that may be taken, or None for what is available.

        Returns:
            Bytes that are left.
        """
        allowed = psutil.virtual_memory().available if limit is None else limit
        what = f"the kernel {self._asked.kernel['name']} of n = {self._asked.n} examples"
        if self.memory > allowed:
            whose = "are available here" if limit is None else "are allowed"
            fewer = "workers" if self._workers > 1 else "examples"
            raise InputError(
                f"{what}: up to {bytes_text(self.memory)} of memory are needed, with workers = {self._workers}, and "
                f"{bytes_text(allowed)} {whose}: allow more, or take fewer {fewer}"
            )
        free = _free_bytes(self._asked.path)
        there = door(self._asked.path)
        written = sum(entry.size for entry in there.entries("snapshots")) if is_run(self._asked.path) else 0
        if free is not None and self.nbytes - written > free:
            more = bytes_text(self.nbytes - written)
            raise InputError(
                f"{what}: up to {more} of disk are needed, and {bytes_text(free)} are free at "
                f"{self._asked.source.path.parent.parent}: make room, take fewer examples, or do not form it "
                "(matrix_free)"
            )
        return allowed - self.memory


def _free_bytes(path: Location) -> int | None:
    """Room on the file system where a result will lie; None of a bucket."""
    if not isinstance(path, Path):
        return None
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


def _seconds_per_row(asked: Request, model: nn.Module, workers: int) -> float:
    """From a kernel of few examples, computed as that of all would be."""
    device = next(model.parameters()).device
    x, train = (
        torch.as_tensor(array, device=device)
        for array in (asked.examples.arrays["input"], asked.source.read("probe/input"))
    )
    n, k, started = asked.n, asked.pairs, time.perf_counter()
    if asked.matrix_free is not None:
        few = min(n, products.EXAMPLES)
        operator = products.products_in_float64(model, x[:few])
        started = time.perf_counter()
        operator.traced(torch.ones(k + GUARDS, few, dtype=torch.float64, device=operator.like.device))
        return (time.perf_counter() - started) * n / few * products.PRODUCTS
    if not asked.in_tiles:
        few = min(n, 1000)
        Measure(x[:few], None, min(k, few), kernels=[asked.kernel]).rows(model, {"snapshots"})
        return (time.perf_counter() - started) * (n / few) ** 2
    side = schema.TILE
    few = min(n, 2 * side)
    with tempfile.TemporaryDirectory() as folder:
        arrays = {"ntk": InChunks(Directory(folder), "snapshots/ntk", 0, (few, few), (side, side), np.dtype("f4"))}
        maker = TileMaker(model, asked.kernel, x[:few], None, train, arrays)
        tasks = tasks_of(arrays)
        maker.make(tasks[-1])  # the first takes longer
        started = time.perf_counter()
        for task in tasks:
            maker.make(task)
        making = time.perf_counter() - started
        started = time.perf_counter()
        product(arrays["ntk"])(np.ones((k + GUARDS, few)))
        multiplying = time.perf_counter() - started
        started = time.perf_counter()
        for band in arrays["ntk"].bands():
            hashlib.blake2b(band.data)
        hashing = time.perf_counter() - started
    trained = 0 if asked.examples.label == "train" else 2 * n * len(train)
    ratio = (n / few) ** 2
    return ((making * (ratio + trained / few**2) + products.PRODUCTS * multiplying * ratio) / workers) + hashing * ratio
