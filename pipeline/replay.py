"""Kernels of a recorded run on any examples, from its stored parameters: nothing is trained again.

    replay("data/stores/digits/runs/lr-0.1_seed-0_3fa9c1d2.zarr", probe="test")

The result is a run of a store of its own, written and committed as every run is,

    <root>/analysis/kernel/<kernel>-<probe>-<hash>/runs/<run_id>.zarr

whose group `snapshots` has the asked kernel under the names of the NTK, and whose group `probe` has the examples, so
that `analysis.open_sweep` and every measure read it. With other examples than the training set it also has the kernel
between the two, `ntk_train_cross`. It is computed again only where the run has changed since.

On the training examples a replayed NTK has the bits of the stored one: it is the same code on the same numbers.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline import matrix_free as products
from pipeline import memory as memory_module
from pipeline import schema, zarr3
from pipeline.config import File, Imported, RunConfig, config_of
from pipeline.console import bytes_text
from pipeline.data import load_data, read_arrays
from pipeline.disk import Directory, Location, door
from pipeline.errors import InputError, MissingError
from pipeline.kernels import KERNELS
from pipeline.measure import KernelChoice, Measure, named, trained_names
from pipeline.models import build_model
from pipeline.plan import kernel_bytes
from pipeline.provenance import provenance
from pipeline.record import MEMORY_BUDGET, Probe
from pipeline.spectra import GUARDS, NonFiniteKernel, krylov_bytes, leading_pairs
from pipeline.store import FINAL, InChunks, NonFiniteRow, Run, Writer, blake, chain_seed, is_run, read_run, run_path
from pipeline.tiles import Ledger, Pool, TileMaker, made, peak_bytes, product, tasks_of
from pipeline.train import computing, find_device

FOLDER = Path("analysis", "kernel")
COMMIT_SECONDS = 5.0
# Of what the budget of memory leaves, at most so much is used to capture fewer examples twice.
SPARE = 2**30
# What is computed in chunks where the kernel is too large for memory, and the share of the time that it takes.
IN_CHUNKS, TILES = ("ntk", "ntk_train_cross"), 0.8

# A model built again must predict what the run did, up to the rounding of another machine.
AGREEMENT = 1e-3

COPIED = ("title", "study", "paper", "learning_rate", "seed", "axes", "family", "loss_convention", "stop")


@dataclass(frozen=True)
class _Examples:
    """The examples of a replay as its store keeps them, and what tells them from others in the store's name."""

    label: str
    digest: str | None  # None where each run has its own
    arrays: dict[str, NDArray[Any]]
    targets: bool


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
        workers: processes that compute a kernel in tiles, each with the threads of the run; the bits are the same.
        memory: bytes that all processes together may take; what is available here by default.
        matrix_free: never form the kernel: eigenpairs to this relative residual from products J (Jᵀ v), and an estimate
            of ‖K‖ with its standard error.
        progress: told the share done and the step that comes next.

    Returns:
        Folder of the run that holds the result.

    Raises:
        MissingError: if there is no such run, or no snapshot at a step.
        InputError: if the run has no parameters, its model cannot be built, the examples do not fit it, a given model
            or a store in memory are to be shared with other processes, or there is not enough memory or room on disk.
        RunLocked: if another process is at it.
    """
    asked = _ask(run, kernel, probe, layers, at, matrix_free)
    if asked.is_done:
        return asked.path
    if workers > 1 and (model is not None or str(asked.path).startswith("memory://")):
        what = "a model that is given" if model is not None else f"{asked.path}"
        raise InputError(f"workers = {workers}: {what} is in the memory of one process; leave workers out")
    with computing(_threads(asked.source, asked.config)):
        network = _network(asked.source, asked.config, allow_imports) if model is None else model
        _check_parameters(asked.source, network)
        spare = min(SPARE, _Room(asked, workers).check(memory) // 2) // workers
        build = partial(
            _maker_elsewhere, asked.source.path, asked.path, asked.kernel, asked.examples.targets, allow_imports, spare
        )
        pool = Pool(workers, _threads(asked.source, asked.config), build)
        _measure_into(asked, network, pool, spare, progress)
    return asked.path


@dataclass(frozen=True)
class _Asked:
    """A replay, checked.

    Attributes:
        source: the run.
        config: of its study, if it has one.
        kernel: name and options.
        examples: on which the kernel is taken.
        rows: position and step of each snapshot.
        layers: as of `replay`.
        matrix_free: as of `replay`.
        identity: of the result.
        path: where it lies.
    """

    source: Run
    config: RunConfig | None
    kernel: dict[str, Any]
    examples: _Examples
    rows: Mapping[int, int]
    layers: bool
    matrix_free: float | None
    identity: dict[str, Any]
    path: Location

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.examples.arrays["input"])

    @property
    def pairs(self) -> int:
        """K."""
        return min(self.n, self.source.node("snapshots/eigenvalue")["shape"][1])

    @property
    def in_tiles(self) -> bool:
        """Whether the kernel goes into the store tile by tile."""
        return self.n >= schema.TILED and self.matrix_free is None

    @property
    def is_done(self) -> bool:
        """Whether the result is there; one of an earlier state of the run is removed."""
        return _is_done(self.path, self.source, self.identity, self.examples, self.rows)


def _ask(
    run: str | Location,
    kernel: KernelChoice,
    probe: str | Path | Probe,
    layers: bool,
    at: str | Iterable[int],
    matrix_free: float | None,
) -> _Asked:
    """Look at what is asked for, before anything is computed."""
    source = read_run(run)
    table = named(kernel)
    if layers and table["name"] != "ntk":
        raise InputError(f"layers: of the kernel ntk only, not of {table['name']}")
    if matrix_free is not None and (table != {"name": "ntk"} or layers):
        raise InputError("matrix_free: of the kernel ntk only, without its layers")
    if matrix_free is not None and not 0 < matrix_free < 1:
        raise InputError(f"tolerance = {matrix_free}: must be above 0 and below 1")
    rows = _chosen(source, at)
    config = config_of(source.attrs["identity"])
    examples = _examples(source, config, probe)
    if layers and len(examples.arrays["input"]) >= schema.TILED:
        raise InputError(f"layers: for fewer than {schema.TILED} examples, not {len(examples.arrays['input'])}")
    asked = {
        "kernel": table,
        "probe": examples.digest or examples.label,
        "layers": layers,
        "at": at if isinstance(at, str) else [int(step) for step in rows.values()],
        **({} if matrix_free is None else {"matrix_free": matrix_free}),
    }
    identity = {**source.attrs["identity"], "replay": {**asked, "source_head": source.head}}
    key = hashlib.blake2b(zarr3.to_json(asked), digest_size=4).hexdigest()
    root = source.path.parent.parent / FOLDER / f"{table['name']}-{examples.label}-{key}"
    path = run_path(root, source.run_id)
    return _Asked(source, config, table, examples, rows, layers, matrix_free, identity, path)


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
    asked = _ask(run, kernel, probe, layers, at, matrix_free)
    there = is_run(asked.path)
    steps = list(asked.rows.values())
    last = read_run(asked.path).attrs["last_step"] if there else None
    left = [step for step in steps if last is None or step > last]
    side = min(asked.n, schema.TILE) if asked.in_tiles else asked.n
    tiles = 0 if asked.matrix_free is not None else (-(-asked.n // side)) ** 2
    room = _Room(asked, workers)
    if not left:
        return Forecast(asked.source.run_id, asked.n, 0, tiles, room.nbytes, room.memory, None)
    room.check(memory)
    with computing(_threads(asked.source, asked.config)):
        network = _network(asked.source, asked.config, allow_imports) if model is None else model
        _check_parameters(asked.source, network)
        _load(asked.source, network, next(row for row, step in asked.rows.items() if step == left[0]))
        seconds = len(left) * _seconds_per_row(asked, network, workers)
    return Forecast(asked.source.run_id, asked.n, len(left), tiles, room.nbytes, room.memory, seconds)


class _Room:
    """What a replay needs.

    Attributes:
        memory: bytes that all processes hold together, at most.
        nbytes: of the result on disk.
    """

    def __init__(self, asked: _Asked, workers: int) -> None:
        n, trained, rows = asked.n, asked.source.node("probe/input")["shape"][0], len(asked.rows)
        c = asked.examples.arrays["target"].shape[1]
        self._asked, self._workers = asked, workers
        cross = 0 if asked.examples.label == "train" else 4 * n * trained
        small = sum(array.nbytes for array in asked.examples.arrays.values()) + rows * n * (4 * asked.pairs + 8 * c)
        if asked.matrix_free is not None:
            held = memory_module.held()
            p = asked.source.node("snapshots/parameter")["shape"][1]
            graphs = products.MEMORY + max(2**27, 8 * p) + 16 * p
            self.memory, self.nbytes = held + graphs + krylov_bytes(n, asked.pairs), small
        elif asked.in_tiles:
            self.memory = peak_bytes(n, asked.pairs, schema.TILE, workers, memory_module.held())
            self.nbytes = rows * (4 * n * n + cross) + small
        else:
            pairs = c if asked.kernel["name"] == "ntk" else 1  # of outputs are measured together
            self.memory = memory_module.held() + kernel_bytes(n, pairs) + 2 * cross
            self.nbytes = rows * (4 * n * n + cross) + small

    def check(self, limit: int | None) -> int:
        """Raise InputError for what does not fit.

        Args:
            limit: bytes that may be taken, or None for what is available.

        Returns:
            Bytes that are left.
        """
        allowed = memory_module.available() if limit is None else limit
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


def _seconds_per_row(asked: _Asked, model: nn.Module, workers: int) -> float:
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


def _threads(source: Run, config: RunConfig | None) -> int:
    return config.compute.threads if config else source.attrs["provenance"]["threads"]


# --- what is asked for ------------------------------------------------------------------------------------------------


def _chosen(source: Run, at: str | Iterable[int]) -> dict[int, int]:
    """Position and step of the snapshots that are asked for, in order."""
    if "parameter" not in source.arrays("snapshots"):
        raise InputError(f"run {source.run_id} stored no parameters, so there is nothing to compute a kernel from")
    steps = source.read("snapshots/step")
    if not len(steps):
        raise MissingError(f"run {source.run_id} has no committed snapshot yet")
    if at in ("final", "all"):
        return {i: int(steps[i]) for i in range(0 if at == "all" else len(steps) - 1, len(steps))}
    if isinstance(at, str):
        raise InputError(f"at = {at!r}: must be 'final', 'all' or steps")
    wanted = sorted(set(at))
    for step in wanted:
        if step not in steps:
            near = sorted(steps[np.argsort(np.abs(steps - step), kind="stable")[:2]].tolist())
            raise MissingError(
                f"run {source.run_id} has no snapshot at step {step}; the nearest are at {' and '.join(map(str, near))}"
            )
    return {int(np.flatnonzero(steps == step)[0]): step for step in wanted}


def _examples(source: Run, config: RunConfig | None, probe: str | Path | Probe) -> _Examples:
    own = {name: source.read(f"probe/{name}") for name in schema.PROBE}
    if probe == "train":
        return _Examples("train", None, own, True)
    if probe == "test":
        return _Examples("test", None, _rest(source, config, own), True)
    if isinstance(probe, Probe):
        label, arrays, targets = "given", probe.arrays(), True
    else:
        label = "".join(c if c.isalnum() else "-" for c in Path(probe).stem)
        found = read_arrays(Path(probe), "probe", ("x",))
        targets = "y" in found
        y = found["y"] if targets else np.full((len(found["x"]), own["target"].shape[1]), np.nan)
        arrays = {"sample_index": np.arange(len(y)), "input": found["x"], "target": y}
    for name, what in {"input": "features", "target": "outputs"}.items():
        got, expected = arrays[name].shape[1:], own[name].shape[1:]
        if got != expected:
            raise InputError(f"probe = {label}: {what} of shape {got}; run {source.run_id} has {expected}")
    arrays = {name: array.astype(own[name].dtype) for name, array in arrays.items()}
    return _Examples(label, blake(*(array.tobytes() for array in arrays.values())).hex(), arrays, targets)


def _rest(source: Run, config: RunConfig | None, own: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The examples of the run's dataset that it did not choose."""
    if config is None:
        raise InputError(
            f"run {source.run_id} was recorded by a loop of its own, whose dataset is not known here; give the "
            "examples in a file: probe = FILE.npz"
        )
    options = config.data
    if isinstance(options, File):
        options = options.model_copy(update={"file": source.attrs.get("data_file", options.file)})
    chosen = load_data(options, config.seed)
    if not np.array_equal(chosen.x.astype(own["input"].dtype), own["input"]):
        raise InputError(
            f"the data of run {source.run_id} are not those that it was recorded on; give the examples in a file: "
            "probe = FILE.npz"
        )
    rest = load_data(options, config.seed, rest=True)
    found = {"sample_index": rest.sample_index, "input": rest.x, "target": rest.y}
    return {name: array.astype(own[name].dtype) for name, array in found.items()}


def _is_done(
    path: Location, source: Run, identity: dict[str, Any], examples: _Examples, rows: Mapping[int, int]
) -> bool:
    """Whether the result is there; one of an earlier state of the run is removed."""
    if not is_run(path):
        return False
    found = read_run(path)
    if found.attrs["seed_digest"] != chain_seed(zarr3.as_stored(identity), examples.arrays).hex():
        door(path.parent).delete(path.name)
        return False
    closed = found.attrs["status"] in FINAL or source.attrs["status"] not in FINAL
    return closed and found.attrs["last_step"] == max(rows.values())


# --- the model --------------------------------------------------------------------------------------------------------


def _network(source: Run, config: RunConfig | None, allow_imports: bool) -> nn.Module:
    """The run's model, freshly built."""
    if config is None:
        raise InputError(
            f"run {source.run_id} was recorded by a loop of its own, which alone knows the model: "
            "pipeline.replay.replay(..., model=...)"
        )
    if isinstance(config.model, Imported) and not allow_imports:
        raise InputError(
            f"run {source.run_id}: its model {config.model.import_path} runs code from outside this package; "
            "pass --allow-imports if you trust it"
        )
    inputs, outputs = (source.node(f"probe/{name}")["shape"] for name in ("input", "target"))
    dtype = getattr(torch, config.compute.dtype)
    built = build_model(config.model, tuple(inputs[1:]), outputs[1], config.seed, dtype)
    return built.to(find_device(config.compute.device, otherwise="cpu"))


def _check_parameters(source: Run, model: nn.Module) -> None:
    stored = source.node("snapshots/parameter")["attributes"]
    shapes = dict(zip(stored["names"], map(tuple, stored["shapes"]), strict=True))
    built = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if list(built.items()) != list(shapes.items()):
        other = next((name for name in [*built, *shapes] if built.get(name) != shapes.get(name)), "their order")
        raise InputError(f"the model has other parameters than run {source.run_id} stored ({other}): is it the same?")


def _load(source: Run, model: nn.Module, row: int) -> None:
    """Put the parameters of a snapshot into the model."""
    flat = torch.from_numpy(source.read("snapshots/parameter", row, row + 1)[0])
    with torch.no_grad():
        parameters = list(model.parameters())
        for tensor, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _check_predictions(source: Run, model: nn.Module, row: int, x: torch.Tensor) -> None:
    """Refuse a model that is not what the run trained, as one whose imported code has changed."""
    if "prediction" not in source.arrays("snapshots"):
        return
    with torch.no_grad():
        now = model(x).numpy(force=True)
    then = source.read("snapshots/prediction", row, row + 1)[0]
    if np.abs(now - then).max() > AGREEMENT * max(1.0, np.abs(then).max()):
        raise InputError(
            f"the model with the parameters of run {source.run_id} predicts other values than were recorded: is it "
            "the same model, in the same mode?"
        )


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure_into(
    asked: _Asked, model: nn.Module, pool: Pool, spare: int, progress: Callable[[float, str], None]
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
            _load(source, model, row)
            _check_predictions(source, model, row, train)
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
                maker = TileMaker(model, kernel, x, y, train, arrays, spare if pool.count == 1 else 0)
                elsewhere = {name: replace(array, directory=door(asked.path)) for name, array in arrays.items()}
                of_row = replace(pool, build=partial(pool.build, row, elsewhere))
                values = _row_in_tiles(writer, maker, of_row, Ledger(step, arrays, kept), asked.pairs, share)
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
    allow_imports: bool,
    spare: int,
    row: int,
    arrays: dict[str, InChunks],
) -> TileMaker:
    """In a process of its own: what makes the tiles of a row, from the run and the result that is being written."""
    source, found = read_run(source_path), read_run(path)
    config = config_of(source.attrs["identity"])
    ExitStack().enter_context(computing(_threads(source, config)))  # until the process ends
    model = _network(source, config, allow_imports)
    _load(source, model, row)
    x, y, train = (
        torch.as_tensor(run.read(f"probe/{name}"), device=next(model.parameters()).device)
        for run, name in ((found, "input"), (found, "target"), (source, "input"))
    )
    return TileMaker(model, kernel, x, y if targets else None, train, arrays, spare)


def _row_in_tiles(
    writer: Writer, maker: TileMaker, pool: Pool, ledger: Ledger, k: int, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """What is measured of a kernel that is computed tile by tile; what is done is committed every few seconds."""
    count, left, committed = len(ledger.tasks), ledger.left, time.monotonic()
    try:
        for number, (task, sums) in enumerate(made(maker.ordered(left), maker, pool), count - len(left) + 1):
            ledger.enter(task, sums)
            progress(TILES * number / count, f"tile {number} of {count}")
            if time.monotonic() - committed > COMMIT_SECONDS or number == count:
                writer.commit(save_tensors(ledger.tensors()))
                committed = time.monotonic()
    except (NonFiniteKernel, NonFiniteRow) as error:
        raise type(error)(f"step {ledger.step}: {error}") from error
    norm, trace, energy = ledger.totals()
    kernel = maker.arrays["ntk"]
    pairs = leading_pairs(product(kernel, pool.count), kernel.shape[0], k, norm)
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
