"""What is asked of a replay, checked: a run and its snapshots, a kernel, examples, and where the result lies."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import schema, zarr3
from pipeline.config import File, RunConfig, config_of
from pipeline.data import load_data, read_arrays
from pipeline.disk import Location, door
from pipeline.errors import InputError, MissingError
from pipeline.measure import KernelChoice, named
from pipeline.record import Probe
from pipeline.store import FINAL, Run, blake, chain_seed, is_run, read_run, run_path

FOLDER = Path("analysis", "kernel")


@dataclass(frozen=True)
class Examples:
    """The examples of a replay as its store keeps them, and what tells them from others in the store's name."""

    label: str
    digest: str | None  # None where each run has its own
    arrays: dict[str, NDArray[Any]]
    targets: bool


@dataclass(frozen=True)
class Request:
    """A replay, checked.

    Attributes:
        source: the run.
        kernel: name and options.
        examples: on which the kernel is taken.
        rows: position and step of each snapshot.
        layers: as of `replay`.
        matrix_free: as of `replay`.
        identity: of the result.
        path: where it lies.
    """

    source: Run
    kernel: dict[str, Any]
    examples: Examples
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
    def last_step(self) -> int:
        """Of the rows that the result has; -1 if there are none, or they are of an earlier state of the run."""
        found = self._found()
        step = found.attrs["last_step"] if found else None
        return -1 if step is None else step

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        found = self._found()
        if found is None:
            return False
        closed = found.attrs["status"] in FINAL or self.source.attrs["status"] not in FINAL
        return closed and found.attrs["last_step"] == max(self.rows.values())

    def remove_stale(self) -> None:
        """Remove a result of an earlier state of the run."""
        if is_run(self.path) and self._found() is None:
            door(self.path.parent).delete(self.path.name)

    def _found(self) -> Run | None:
        """The result, if there is one and it is of the run as it is now."""
        if not is_run(self.path):
            return None
        found, seed = read_run(self.path), chain_seed(zarr3.as_stored(self.identity), self.examples.arrays)
        return found if found.attrs["seed_digest"] == seed.hex() else None


def ask(
    run: str | Location,
    kernel: KernelChoice,
    probe: str | Path | Probe,
    layers: bool,
    at: str | Iterable[int],
    matrix_free: float | None,
) -> Request:
    """Look at what is asked for, before anything is computed; the arguments are those of `pipeline.replay.replay`.

    Raises:
        MissingError: if there is no such run, file of examples, or snapshot at a step.
        InputError: if the run stored no parameters, or the kernel, the examples or the steps cannot be had of it.
    """
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
    return Request(source, table, examples, rows, layers, matrix_free, identity, path)


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


def _examples(source: Run, config: RunConfig | None, probe: str | Path | Probe) -> Examples:
    own = {name: source.read(f"probe/{name}") for name in schema.PROBE}
    if probe == "train":
        return Examples("train", None, own, True)
    if probe == "test":
        return Examples("test", None, _rest(source, config, own), True)
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
    return Examples(label, blake(*(array.tobytes() for array in arrays.values())).hex(), arrays, targets)


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
