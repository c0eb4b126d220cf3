"""Kernels of a recorded run on any examples, from its stored parameters: nothing is trained again.

    replay("data/stores/digits/runs/lr-0.1_seed-0_3fa9c1d2.zarr", probe="test")

The result is a run of a store of its own, written and committed as every run is,

    <root>/analysis/kernel/<kernel>-<probe>-<hash>/runs/<run_id>.zarr

whose group `snapshots` has the asked kernel under the names of the NTK, and whose group `probe` has the examples, so
that `analysis.open_sweep` and every measure read it. With other examples than the training set it also has the kernel
between the two, `ntk_train_cross`. It is computed again only where the run has changed since.

On the training examples a replayed NTK has the bits of the stored one: it is the same code on the same numbers.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline import matrix_free as products
from pipeline import schema
from pipeline.cluster import TRAINING, connect
from pipeline.disk import Location, door
from pipeline.errors import InputError
from pipeline.forecast import Room
from pipeline.kernels import KERNELS
from pipeline.measure import KernelChoice, Measure, trained_names
from pipeline.provenance import provenance
from pipeline.rebuild import check_parameters, check_predictions, load_snapshot, network_of, threads_of
from pipeline.record import MEMORY_BUDGET, Probe
from pipeline.remote_tiles import Workers
from pipeline.request import Request, ask
from pipeline.spectra import NonFiniteKernel, leading_pairs
from pipeline.store import FINAL, InChunks, NonFiniteRow, Writer, blake, read_run
from pipeline.tiles import Elsewhere, Ledger, Processes, TileMaker, made, product
from pipeline.train import computing, find_device

if TYPE_CHECKING:
    from distributed import Client

COMMIT_SECONDS = 5.0
# Of what the budget of memory leaves, at most so much is used to capture fewer examples twice.
SPARE = 2**30
# What is computed in chunks where the kernel is too large for memory, and the share of the time that it takes.
IN_CHUNKS, TILES = ("ntk", "ntk_train_cross"), 0.8

COPIED = ("title", "study", "paper", "learning_rate", "seed", "axes", "family", "loss_convention", "stop")


def replay(
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
    scheduler: str | None = None,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> Location:
    """Measure a kernel of a recorded run at its snapshots, on its own or on other examples.

    Args:
        run: folder of the run, `<root>/runs/<run_id>.zarr`.
        kernel: a name of `pipeline.kernels.KERNELS`, or a table of a name and options.
        probe: "train", the examples of the run; "test", those of its dataset that were not chosen, normalised as they
            were; a `Probe`; or the path of an .npz file with x (n, features...) as the network sees it and, if there
            are targets, y (n, c).
        layers: also the part of the NTK of each trained tensor.
        at: "final", the last snapshot; "all"; or steps that have one.
        model: the network, for a run that a loop of one's own recorded; its parameters are overwritten.
        allow_imports: import the model that the run's study names.
        workers: processes that compute a kernel in tiles, each with the threads of the run, and threads that multiply
            stored tiles; the bits are the same.
        memory: bytes that all processes of this machine may take together; what is available here by default.
        matrix_free: never form the kernel: eigenpairs to this relative residual from products J (Jᵀ v), and an estimate
            of ‖K‖ with its standard error.
        scheduler: address of a Dask scheduler, such as "tcp://host:8786", whose workers compute a kernel in tiles; they
            must reach the store under the same name. What is computed from the tiles is computed here.
        progress: told the share done and the step that comes next.

    Returns:
        Folder of the run that holds the result.

    Raises:
        MissingError: if there is no such run, or no snapshot at a step.
        InputError: if the run has no parameters, its model cannot be built, the examples do not fit it, a given model
            or a store in memory are to be shared with other processes, a kernel that is not in tiles is to be computed
            by a scheduler, or there is not enough memory or room on disk.
        NonFiniteKernel: naming the step and the examples, if a tile is not finite.
        NtkEosError: if the scheduler cannot be reached or is lost, or its workers cannot do it.
        RunLocked: if another process is at it.
    """
    asked = ask(run, kernel, probe, layers, at, matrix_free)
    if asked.is_done:
        return asked.path
    others = f"scheduler = {scheduler}" if scheduler else f"workers = {workers}" if workers > 1 else ""
    if others and (model is not None or str(asked.path).startswith("memory://")):
        what = "a model that is given" if model is not None else f"{asked.path}"
        raise InputError(f"{others}: {what} is in the memory of one process; leave {others.split()[0]} out")
    if scheduler and not asked.in_tiles:
        raise InputError(
            f"{others}: this kernel of n = {asked.n} examples is not computed in tiles, so it is computed here; leave "
            "scheduler out"
        )
    with computing(threads_of(asked.source)):
        network = network_of(asked.source, allow_imports) if model is None else model
        check_parameters(asked.source, network)
        left = Room(asked, workers, elsewhere=scheduler is not None).check(memory)
        imports = (os.getcwd(),) if allow_imports else ()
        with connect(scheduler, TRAINING) if scheduler else nullcontext() as client:
            asked.remove_stale()
            _measure_into(asked, network, _Makers(workers, min(SPARE, left // 2) // workers, imports, client), progress)
    return asked.path


@dataclass(frozen=True)
class _Makers:
    """Where tiles are made.

    Attributes:
        workers: processes of this machine, if there is no client; with one, it is this one. Threads of the products.
        spare: bytes in which each process keeps more examples captured.
        imports: folders in which other processes look for a user's own model.
        client: of a Dask cluster, whose workers make them instead.
    """

    workers: int
    spare: int
    imports: tuple[str, ...]
    client: "Client | None"

    def elsewhere(
        self, asked: Request, row: int, device: torch.device, arrays: dict[str, InChunks]
    ) -> Elsewhere | None:
        """Other processes for the tiles of a row; None if this one makes them."""
        if self.client is None and self.workers == 1:
            return None
        source, path, threads = _absolute(asked.source.path), _absolute(asked.path), threads_of(asked.source)
        build = partial(
            _maker_elsewhere, source, path, asked.kernel, asked.examples.targets, self.imports, str(device), row,
            {name: replace(array, directory=door(path)) for name, array in arrays.items()},
            0 if self.client else self.spare,
        )  # fmt: skip
        if self.client is None:
            return Processes(self.workers, threads, build)
        return Workers(self.client, threads, build, source.parent, device.type == "cuda")


def _absolute(path: Location) -> Location:
    return path.absolute() if isinstance(path, Path) else path


def _measure_into(
    asked: Request,
    model: nn.Module,
    makers: _Makers,
    progress: Callable[[float, str], None],
) -> None:
    """Measure the rows that the result lacks, and commit them."""
    source, examples, kernel = asked.source, asked.examples, asked.kernel
    like = next(model.parameters())
    x, train = (torch.as_tensor(a, device=like.device) for a in (examples.arrays["input"], source.read("probe/input")))
    y = torch.as_tensor(examples.arrays["target"], device=like.device) if examples.targets else None
    c = examples.arrays["target"].shape[1]
    measure = Measure(x, y, asked.pairs, kernels=[kernel], layers=asked.layers, outputs=c)
    options = {name: value for name, value in kernel.items() if name != "name"}
    left_out = {"parameter"} | (set() if examples.targets else {"target_energy"})
    left_out |= set() if asked.matrix_free is None else {"ntk"}
    names = [name for name in measure.variables["snapshots"] if name not in left_out]
    in_memory = asked.matrix_free is None and not asked.in_tiles
    cross = None
    if asked.matrix_free is not None:
        names.append("frobenius_error")
    elif examples.label != "train":
        names.append("ntk_train_cross")
        cross = KERNELS[kernel["name"]](x, train, **options) if in_memory else None
    trained = trained_names(model)
    now = provenance(
        torch=torch.__version__, threads=torch.get_num_threads(), device=str(like.device),
        dataset_digest=blake(*(array.tobytes() for array in examples.arrays.values())).hex(),
    )  # fmt: skip
    with Writer.open(
        asked.path.parent.parent,
        source.run_id,
        identity=asked.identity,
        attrs={
            **{name: source.attrs[name] for name in COPIED if name in source.attrs},
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": now,
            "environment_changes": [],
        },
        dims=measure.dims | {"layer": len(trained), "train_sample": len(train)},
        groups={"snapshots": names},
        capacity={"snapshots": len(asked.rows)},
        probe=examples.arrays,
        dtype=str(like.dtype).removeprefix("torch."),
        attributes={
            "snapshots/ntk_layer": {"names": trained},
            **({"snapshots/ntk": {"long_name": f"{kernel['name']} kernel"}} if kernel["name"] != "ntk" else {}),
        },
    ) as writer:
        data = writer.checkpoint()
        kept = load_tensors(data) if data else {}
        measure.restore(kept)
        committed = time.monotonic()
        done = -1 if writer.last_step is None else writer.last_step
        left = {row: step for row, step in asked.rows.items() if step > done}
        for number, (row, step) in enumerate(left.items()):
            load_snapshot(source, model, row)
            check_predictions(source, model, row, train)
            share = partial(_share, progress, number, len(left), f"step {step}")
            share(0.0, "")
            if in_memory:
                values = measure.rows(model, {"snapshots"})["snapshots"]
                if cross is not None:
                    values["ntk_train_cross"] = cross(model).numpy(force=True)
            elif asked.matrix_free is not None:
                values = products.matrix_free(model, x, y, asked.pairs, asked.matrix_free, share)
            else:
                arrays = {name: writer.in_chunks("snapshots", name) for name in IN_CHUNKS if name in names}
                elsewhere = makers.elsewhere(asked, row, like.device, arrays)
                maker = TileMaker(model, kernel, x, y, train, arrays, 0 if elsewhere else makers.spare)
                ledger = Ledger(step, arrays, kept)
                values = _row_in_tiles(writer, maker, elsewhere, ledger, asked.pairs, makers.workers, share)
                top = values["eigenvalue"][0]
                of_all = kernel["name"] == "ntk"  # other kernels are summed over outputs
                values["ntk_sharpness"] = products.sharpness(model, x, top) if of_all else top / asked.n
                values["prediction"] = products.outputs(model, x)
            known = {name: source.read(f"snapshots/{name}", row, row + 1)[0] for name in schema.ROW}
            writer.append(step, {"snapshots": {**values, **known}})
            if time.monotonic() - committed > COMMIT_SECONDS or writer.pending_bytes > MEMORY_BUDGET:
                writer.commit(save_tensors(measure.state()))
                committed = time.monotonic()
        if left:
            writer.commit(save_tensors(measure.state()))
        if source.attrs["status"] in FINAL:
            writer.finish(source.attrs["status"], source.attrs["stop_reason"])
        else:
            writer.heartbeat("interrupted")  # what the run is: not finished, so not to be taken for it


def _share(progress: Callable[[float, str], None], done: int, count: int, note: str, part: float, further: str) -> None:
    progress((done + part) / count, ", ".join(filter(None, [note, further])))


def _maker_elsewhere(
    source_path: Location,
    path: Location,
    kernel: dict[str, Any],
    targets: bool,
    imports: tuple[str, ...],
    device: str,
    row: int,
    arrays: dict[str, InChunks],
    spare: int,
) -> TileMaker:
    """In another process: what makes the tiles of a row, from the run and the result that is being written."""
    source, found = read_run(source_path), read_run(path)
    sys.path += [folder for folder in imports if folder not in sys.path]
    model = network_of(source, allow_imports=bool(imports)).to(find_device(device))
    load_snapshot(source, model, row)
    x, y, train = (
        torch.as_tensor(run.read(f"probe/{name}"), device=next(model.parameters()).device)
        for run, name in ((found, "input"), (found, "target"), (source, "input"))
    )
    check_predictions(source, model, row, train)  # a worker that lives on may have imported another model of that name
    return TileMaker(model, kernel, x, y if targets else None, train, arrays, spare)


def _row_in_tiles(
    writer: Writer,
    maker: TileMaker,
    elsewhere: Elsewhere | None,
    ledger: Ledger,
    k: int,
    threads: int,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """What is measured of a kernel that is computed tile by tile; what is done is committed every few seconds."""
    count, left, committed = len(ledger.tasks), maker.ordered(ledger.left), time.monotonic()
    chunks = made(left, elsewhere) if elsewhere else ((task, maker.make(task)) for task in left)
    try:
        for number, (task, sums) in enumerate(chunks, count - len(left) + 1):
            ledger.enter(task, sums)
            progress(TILES * number / count, f"tile {number} of {count}")
            if time.monotonic() - committed > COMMIT_SECONDS or number == count:
                writer.commit(save_tensors(ledger.tensors()))
                committed = time.monotonic()
    except (NonFiniteKernel, NonFiniteRow) as error:
        raise type(error)(f"step {ledger.step}: {error}") from error
    norm, trace, energy = ledger.totals()
    kernel = maker.arrays["ntk"]
    pairs = leading_pairs(product(kernel, threads), kernel.shape[0], k, norm)
    return {
        **maker.arrays,
        "eigenvalue": pairs.values,
        "eigenvector": pairs.vectors,
        "eigenvalue_residual": pairs.residuals,
        "solver_iterations": pairs.iterations,
        "frobenius_norm": norm,
        "trace": trace,
        "target_energy": energy,
    }
