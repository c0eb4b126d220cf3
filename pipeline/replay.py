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
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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

from pipeline import schema, zarr3
from pipeline.config import File, Imported, RunConfig, config_of
from pipeline.data import load_data, read_arrays
from pipeline.disk import Location, door
from pipeline.errors import InputError, MissingError
from pipeline.kernels import KERNELS
from pipeline.measure import KernelChoice, Measure, named, trained_names
from pipeline.models import build_model
from pipeline.provenance import provenance
from pipeline.record import MEMORY_BUDGET, Probe
from pipeline.spectra import NonFiniteKernel, leading_pairs
from pipeline.store import FINAL, NonFiniteRow, Run, Writer, blake, chain_seed, is_run, read_run, run_path
from pipeline.tiles import Ledger, TileMaker, product
from pipeline.train import computing, find_device

FOLDER = Path("analysis", "kernel")
COMMIT_SECONDS = 5.0
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
        progress: told the share done and the step that comes next.

    Returns:
        Folder of the run that holds the result.

    Raises:
        MissingError: if there is no such run, or no snapshot at a step.
        InputError: if the run has no parameters, its model cannot be built, or the examples do not fit it.
        RunLocked: if another process is at it.
    """
    source = read_run(run)
    table = named(kernel)
    if layers and table["name"] != "ntk":
        raise InputError(f"layers: of the kernel ntk only, not of {table['name']}")
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
    }
    identity = {**source.attrs["identity"], "replay": {**asked, "source_head": source.head}}
    key = hashlib.blake2b(zarr3.to_json(asked), digest_size=4).hexdigest()
    root = source.path.parent.parent / FOLDER / f"{table['name']}-{examples.label}-{key}"
    path = run_path(root, source.run_id)
    if _is_done(path, source, identity, examples, rows):
        return path
    threads = config.compute.threads if config else source.attrs["provenance"]["threads"]
    with computing(threads):
        network = _network(source, config, allow_imports) if model is None else model
        _check_parameters(source, network)
        _measure_into(root, source, network, identity, table, examples, rows, progress)
    return path


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
    root: Location,
    source: Run,
    model: nn.Module,
    identity: dict[str, Any],
    kernel: dict[str, Any],
    examples: _Examples,
    rows: Mapping[int, int],
    progress: Callable[[float, str], None],
) -> None:
    """Measure the rows that the result lacks, and commit them."""
    like = next(model.parameters())
    x, train = (torch.as_tensor(a, device=like.device) for a in (examples.arrays["input"], source.read("probe/input")))
    y = torch.as_tensor(examples.arrays["target"], device=like.device) if examples.targets else None
    n, outputs = examples.arrays["target"].shape
    pairs = source.node("snapshots/eigenvalue")["shape"][1]
    layers = identity["replay"]["layers"]
    measure = Measure(x, y, min(pairs, n), kernels=[kernel], layers=layers, outputs=outputs)
    options = {name: value for name, value in kernel.items() if name != "name"}
    in_tiles = n >= schema.TILED
    cross = None if examples.label == "train" or in_tiles else KERNELS[kernel["name"]](x, train, **options)
    left_out = {"parameter"} | (set() if examples.targets else {"target_energy"})
    names = [name for name in measure.variables["snapshots"] if name not in left_out]
    names += ["ntk_train_cross"] if examples.label != "train" else []
    trained = trained_names(model)
    now = provenance(
        torch=torch.__version__, threads=torch.get_num_threads(), device=str(like.device),
        dataset_digest=blake(*(array.tobytes() for array in examples.arrays.values())).hex(),
    )  # fmt: skip
    with Writer.open(
        root,
        source.run_id,
        identity=identity,
        attrs={
            **{name: source.attrs[name] for name in COPIED if name in source.attrs},
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": now,
            "environment_changes": [],
        },
        dims=measure.dims | {"layer": len(trained), "train_sample": len(train)},
        groups={"snapshots": names},
        capacity={"snapshots": len(rows)},
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
        left = {row: step for row, step in rows.items() if step > done}
        for number, (row, step) in enumerate(left.items()):
            _load(source, model, row)
            _check_predictions(source, model, row, train)
            share = partial(_share, progress, number, len(left), f"step {step}")
            share(0.0, "")
            if in_tiles:
                arrays = {name: writer.in_chunks("snapshots", name) for name in IN_CHUNKS if name in names}
                maker = TileMaker(model, kernel, x, y, train, arrays)
                values = _row_in_tiles(writer, maker, Ledger(step, arrays, kept), measure.dims["eig"], share)
            else:
                values = measure.rows(model, {"snapshots"})["snapshots"]
                if cross is not None:
                    values["ntk_train_cross"] = cross(model).numpy(force=True)
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


def _row_in_tiles(
    writer: Writer, maker: TileMaker, ledger: Ledger, k: int, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """What is measured of a kernel that is computed tile by tile; what is done is committed every few seconds."""
    count, tasks, committed = len(ledger.tasks), ledger.left, time.monotonic()
    for number, task in enumerate(tasks, count - len(tasks) + 1):
        try:
            ledger.enter(task, maker.make(task))
        except (NonFiniteKernel, NonFiniteRow) as error:
            raise type(error)(f"step {ledger.step}: {error}") from error
        progress(TILES * number / count, f"tile {number} of {count}")
        if time.monotonic() - committed > COMMIT_SECONDS or number == count:
            writer.commit(save_tensors(ledger.tensors()))
            committed = time.monotonic()
    norm, trace, energy = ledger.totals()
    kernel = maker.arrays["ntk"]
    pairs = leading_pairs(product(kernel), kernel.shape[0], k, norm)
    return {
        **maker.arrays,
        "eigenvalue": pairs.values,
        "eigenvector": pairs.vectors,
        "eigenvalue_residual": pairs.residuals,
        "solver_iterations": pairs.iterations,
        "prediction": maker.outputs(),
        "ntk_sharpness": maker.sharpness(pairs.values[0]),
        "frobenius_norm": norm,
        "trace": trace,
        "target_energy": energy,
    }
