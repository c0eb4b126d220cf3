"""The Recorder: measures a model's neural tangent kernel while it trains and commits the rows.

It works in any training loop; the built-in one (`pipeline.train`) is a client like any other:

    recorder = Recorder("stores/mine", model, Probe(x, y), identity={"model": "my net"}, learning_rate=0.1, seed=0,
                        steps=1000, loss_levels=[0.1, 0.01])
    with recorder:
        for step in recorder:
            loss = criterion(model(x), y)
            recorder.record(step, loss=loss.item())
            ...  # update the model

`for step in recorder` starts at step 0, or at the last committed step with the model restored to it, and ends after
`steps` updates or when the run has diverged. Recording a step that is committed already does nothing, so a loop that
is killed and started again ends with the same rows.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from traceback import format_exception
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline import schema, zarr3
from pipeline.cadence import Cadence, row_capacity
from pipeline.errors import DamagedStore, InputError
from pipeline.losses import Loss
from pipeline.measure import KernelChoice, Measure, named, trained_names
from pipeline.provenance import environment_changes, provenance
from pipeline.spectra import NonFiniteKernel
from pipeline.store import FINAL, NonFiniteRow, Writer, blake

MEMORY_BUDGET = 256 * 2**20
TRACEBACK_LETTERS = 20_000  # its end says most
DEFAULT_CADENCES = {"snapshots": Cadence(log=8), "spectra": Cadence(every=10), "scalars": Cadence(every=1)}
GROUPS = (*DEFAULT_CADENCES, "hessian")
EVERY_STEP = schema.TRAIN | schema.OF_PROCESS
TOLD = tuple(name for name, variable in EVERY_STEP.items() if not variable.volatile)


@dataclass(frozen=True)
class Probe:
    """The fixed examples on which kernels are taken.

    Attributes:
        input: x, shape (n, ...), on the model's device and in its dtype.
        target: y, shape (n, c).
        sample_index: rows of the dataset that these examples came from, shape (n,); 0, 1, ... by default.
    """

    input: Tensor
    target: Tensor
    sample_index: NDArray[np.int64] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The probe as the store keeps it."""
        index = np.arange(len(self.input)) if self.sample_index is None else self.sample_index
        return {
            "sample_index": index.astype(np.int64),
            "input": self.input.numpy(force=True),
            "target": self.target.numpy(force=True),
        }


@dataclass
class _Checkpoint:
    """What continues a run after a commit: the model and update state at `step`, and the lowest loss so far."""

    step: int = 0
    lowest_loss: float = math.inf
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return save_tensors(self.tensors, {"step": str(self.step), "lowest_loss": self.lowest_loss.hex()})


class Recorder:
    """Measures a model on a probe at the steps of its cadences and commits the rows to one run of a store.

    What a row holds is `pipeline.measure.Measure`'s; this class decides when there is one, and keeps it.

    Args:
        root: folder of the store; created if absent.
        model: the network; any `nn.Module` that treats examples independently.
        probe: the examples on which kernels are taken.
        identity: JSON-able description of what determines the run's numbers, beside what the other arguments say.
        learning_rate: step size η.
        seed: seed of the run.
        steps: updates planned; the row at this step closes the run.
        run_id: name of the run; made from learning rate, seed and a hash of `identity` by default.
        cadences: steps at which each of `snapshots`, `spectra`, `scalars` and `hessian` gets a row, beside the first
            step, the last one and the loss levels; a group that is left out is not recorded.
        loss_levels: every group gets a row at the first step with loss <= level.
        eigenpairs: k, leading eigenpairs kept.
        kernels: kernels to record, "ntk" among them: names, or tables of a name and options, as in a study file.
        layers: record the part of the NTK of each trained tensor, `ntk_layer`.
        ntk_full: record the NTK of all pairs of outputs, `ntk_full`.
        criterion: the loss as a function (prediction, target) -> scalar; needed for a cadence of `hessian`, and for
            `test`.
        hessian_eigenpairs: leading eigenvalues of the Hessian kept.
        test: held-out examples: their kernels `ntk_test` and `ntk_cross` and outputs are recorded with the snapshots,
            their `test_loss` with the scalars too, and so is their `test_accuracy` where `train` has the accuracy.
            Needs `criterion`.
        train: what `record` is told at every step, of `loss`, `accuracy`, `grad_norm`, `oscillation` and `critical`.
        state: returns the tensors beside the model's that continue the loop (momentum, generator states); what they
            were at the last commit is in `restored_state` after `with`.
        preconditioner: returns the diagonal P (p,) of the trained parameters by which the update divides the gradient;
            where `hessian` has a cadence, `preconditioned_sharpness` is then recorded too.
        attrs: further root attributes of the run (title, study, axes, family, loss_convention).
        threads: threads that torch may use here, for the provenance.
        commit_seconds: rows wait in memory for at most about this long.

    Raises:
        InputError: for a cadence of an unknown group, too many eigenpairs, something to record that does not fit the
            model, or a run that holds other data.
        RunLocked: on entering, if another process writes the run.
    """

    def __init__(
        self,
        root: str,
        model: nn.Module,
        probe: Probe,
        *,
        identity: Mapping[str, Any],
        learning_rate: float,
        seed: int,
        steps: int,
        run_id: str | None = None,
        cadences: Mapping[str, Cadence] = DEFAULT_CADENCES,
        loss_levels: Sequence[float] = (),
        eigenpairs: int = 20,
        kernels: Sequence[KernelChoice] = ("ntk",),
        layers: bool = False,
        ntk_full: bool = False,
        criterion: Loss | None = None,
        hessian_eigenpairs: int = 1,
        test: Probe | None = None,
        train: Sequence[str] = ("loss",),
        state: Callable[[], Mapping[str, Tensor]] | None = None,
        preconditioner: Callable[[], Tensor] | None = None,
        attrs: Mapping[str, Any] | None = None,
        threads: int | None = None,
        commit_seconds: float = 5.0,
    ) -> None:
        if strange := set(train) - set(TOLD):
            raise InputError(f"train = {min(strange)!r}: the group train has {', '.join(TOLD)}")
        if unknown := set(cadences) - set(GROUPS):
            raise InputError(f"cadence of {min(unknown)!r}: groups are {', '.join(GROUPS)}")
        if "hessian" in cadences and criterion is None:
            raise InputError(
                "cadence of 'hessian': needs the loss; give criterion=, a function (prediction, target) -> loss"
            )
        if not 1 <= eigenpairs <= len(probe.input):
            raise InputError(f"eigenpairs = {eigenpairs}: must be from 1 to n = {len(probe.input)}")
        if hessian_eigenpairs < 1:
            raise InputError(f"hessian_eigenpairs = {hessian_eigenpairs}: must be at least 1")
        self.model, self.probe, self.test, self.root, self.steps = model, probe, test, root, steps
        chosen = _chosen(kernels)
        recorded = {"eigenpairs": eigenpairs, "loss_levels": list(loss_levels)} | {
            group: {name: value for name, value in vars(cadence).items() if value is not None}
            for group, cadence in cadences.items()
        }
        # What is not asked for is left out, so that it changes the name of no run.
        requests = {
            "kernels": chosen if len(chosen) > 1 else None,
            "layers": layers or None,
            "ntk_full": ntk_full or None,
            "hessian_eigenpairs": hessian_eigenpairs if hessian_eigenpairs > 1 else None,
            "preconditioned": True if preconditioner and "hessian" in cadences else None,
            "test": None if test is None else len(test.input),
        }
        recorded |= {name: value for name, value in requests.items() if value is not None}
        self.identity = {"record": recorded, **identity, "learning_rate": learning_rate, "seed": seed}
        self.run_id = run_id or f"lr-{learning_rate!r}_seed-{seed}_{blake(zarr3.to_json(self.identity)).hex()[:8]}"
        self.restored_state: dict[str, Tensor] = {}
        self._row = {"learning_rate": learning_rate, "seed": seed}
        self._cadences, self._levels = dict(cadences), tuple(loss_levels)
        self._told = {name for name in train if name != "loss"}
        self._state, self._preconditioner = state or dict, preconditioner
        self._attrs = dict(attrs or {})
        self._threads = threads or torch.get_num_threads()
        self._commit_seconds = commit_seconds
        self._checkpoint = _Checkpoint()
        self._writer: Writer | None = None
        if probe.target.ndim != 2 or len(probe.target) != len(probe.input):
            shapes = f"{tuple(probe.input.shape)} and {tuple(probe.target.shape)}"
            raise InputError(f"probe of shapes {shapes}: must be (n, ...) and (n, c) with one n")
        if test is not None:
            got, like = ((one.input.shape[1:], one.target.shape[1:]) for one in (test, probe))
            if got != like or len(test.input) != len(test.target) or not len(test.input):
                shapes = f"{tuple(test.input.shape)} and {tuple(test.target.shape)}"
                raise InputError(
                    f"test of shapes {shapes}: must be (m, ...) and (m, c) with one m, and examples of shape "
                    f"{tuple(like[0])} and {tuple(like[1])} as the probe has them"
                )
        self._measure = Measure(
            probe.input,
            probe.target,
            eigenpairs,
            kernels=chosen,
            layers=layers,
            full=ntk_full,
            criterion=criterion,
            hessian_eigenpairs=hessian_eigenpairs,
            preconditioned=preconditioner is not None,
            test=None if test is None else (test.input, test.target),
            labels="accuracy" in train,
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        parameters = dict(self.model.named_parameters())
        dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        arrays = self.probe.arrays()
        if self.test is not None:
            arrays |= {f"test_{name}": array for name, array in self.test.arrays().items()}
        now = provenance(
            torch=torch.__version__,
            threads=self._threads,
            device=str(self.probe.input.device),
            dataset_digest=hashlib.blake2b(b"".join(a.tobytes() for a in arrays.values()), digest_size=16).hexdigest(),
        )
        trained = trained_names(self.model)
        names = {"names": list(parameters), "shapes": [list(tensor.shape) for tensor in parameters.values()]}
        not_told = set(TOLD) - {"loss"} - self._told
        groups = {group: self._measure.variables[group] for group in self._cadences}
        self._writer = Writer.open(
            self.root,
            self.run_id,
            identity=self.identity,
            attrs={
                "title": self.run_id,
                **self._row,
                "axes": dict(self._row),
                **self._attrs,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "provenance": now,
                "environment_changes": [],
            },
            dims=self._measure.dims
            | {
                "parameter_index": sum(tensor.numel() for tensor in parameters.values()),
                "layer": len(trained),
            },
            groups=groups | {"train": [name for name in EVERY_STEP if name not in not_told]},
            capacity=row_capacity(self._cadences, len(self._levels), self.steps),
            probe=arrays,
            dtype=dtype,
            attributes={"snapshots/parameter": names, "snapshots/ntk_layer": {"names": trained}},
        )
        self._started = self._committed = self._beat = time.monotonic()
        self._checkpoint, self._spent = _Checkpoint(), 0.0
        self._measure.restore({})
        try:
            self._restore(now)
        except BaseException:
            self._writer.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        writer = self._open_writer()
        try:
            if not self.finished:
                # Whatever happened, the model may be past the last row: only what is committed can be continued.
                failed = kind is not None and issubclass(kind, Exception)
                said = f"{kind.__name__}: {error}" if kind else None
                where = "".join(format_exception(error))[-TRACEBACK_LETTERS:] if failed else None
                writer.heartbeat("failed" if failed else "interrupted", error=said, traceback=where)
        finally:
            writer.close()
            self._writer = None

    def __iter__(self) -> Iterator[int]:
        """Steps from where the run stands to `steps`; ends early when the run is finished."""
        first = self._checkpoint.step
        # A run that is past the steps now asked for still gets the chance to be closed.
        for step in range(first, max(first, self.steps) + 1):
            if self.finished:
                return
            yield step

    @property
    def finished(self) -> bool:
        """Whether the run is complete or diverged."""
        return self._open_writer().status in FINAL

    @property
    def status(self) -> str:
        """running, complete or diverged."""
        return self._open_writer().status

    @property
    def last_step(self) -> int:
        """Newest step that has a row; -1 if there is none."""
        last = self._open_writer().last_step
        return -1 if last is None else last

    @property
    def lowest_loss(self) -> float:
        """Smallest loss recorded so far."""
        return self._checkpoint.lowest_loss

    def extend(self) -> None:
        """Take up a complete run again, to go on to `steps`."""
        self._open_writer().reopen(row_capacity(self._cadences, len(self._levels), self.steps))

    def record(self, step: int, *, loss: float, last: bool = False, **train: float) -> bool:
        """Measure the model as it is at `step`, before its update.

        Args:
            step: updates made so far.
            loss: training loss L at this step.
            last: this row closes the run (the loss is small enough).
            train: the other values named by `train=` at construction.

        Returns:
            Whether to go on: False once the run is complete or has diverged.
        """
        writer = self._open_writer()
        if self.finished:
            return False
        if set(train) != self._told:
            given, wanted = ", ".join(sorted(train)) or "none", ", ".join(sorted(self._told)) or "none"
            raise InputError(f"values beside the loss at step {step}: got {given}, declared by train= were {wanted}")
        last = last or step >= self.steps
        if writer.last_step is None or step > writer.last_step:
            try:
                writer.append(step, self._rows(step, loss, last, train))
            except (NonFiniteKernel, NonFiniteRow) as error:
                self.diverge(step, str(error))
                return False
        self._checkpoint.lowest_loss = min(self._checkpoint.lowest_loss, loss)
        now = time.monotonic()
        # The first row is committed at once: from then on a loop that dies finds its initial weights again.
        first = writer.attrs["commits"] == 0
        if first or last or now - self._committed > self._commit_seconds or writer.pending_bytes > MEMORY_BUDGET:
            self._commit(step, loss=loss, steps=self.steps)
        elif now - self._beat > writer.directory.beat_seconds:
            writer.heartbeat("running", loss=loss, steps=self.steps)
            self._beat = now
        if last:
            writer.finish("complete", "steps" if step >= self.steps else "loss")
        return not last

    def interrupt(self, step: int) -> None:
        """Commit everything up to `step`; to be called between `record(step, ...)` and the update that follows."""
        self._commit(step)

    def diverge(self, step: int, reason: str) -> None:
        """End the run as diverged at `step`; what has a row stays.

        Args:
            step: at which there is nothing finite to record.
            reason: one line for people.
        """
        self._commit(step)
        self._open_writer().finish("diverged", reason)

    # --- measuring --------------------------------------------------------------------------------------------------

    def _rows(self, step: int, loss: float, last: bool, train: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Rows of all groups that are due at `step`."""
        row = {**self._row, "step": step, "loss": loss}
        if not math.isfinite(loss):
            raise NonFiniteRow(f"loss at step {step} is {loss}")
        crossed = any(loss <= level < self._checkpoint.lowest_loss for level in self._levels)
        always = step == 0 or last or crossed
        due = {group for group, cadence in self._cadences.items() if always or cadence.due(step)}
        rows = self._measure.rows(self.model, due, self._preconditioner)
        costs = {f"seconds_{part}": seconds for part, seconds in self._measure.seconds.items()}
        costs["seconds_commit"], self._spent = self._spent, 0.0
        rows["train"] = {**train, **costs, "wall_time": time.monotonic() - self._started}
        return {group: {**row, **values} for group, values in rows.items()}

    # --- committing and resuming ------------------------------------------------------------------------------------

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise InputError("this Recorder is not open: use it as `with recorder: ...`")
        return self._writer

    def _commit(self, step: int, **facts: float) -> None:
        started = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"state.{name}": tensor for name, tensor in self._state().items()}
        tensors |= {f"measure.{name}": tensor for name, tensor in self._measure.state().items()}
        self._checkpoint.tensors = {name: _plain(tensor) for name, tensor in tensors.items()}
        self._checkpoint.step = step
        self._open_writer().commit(self._checkpoint.to_bytes(), **facts)
        self._committed = self._beat = time.monotonic()
        self._spent += self._committed - started

    def _restore(self, now: dict[str, Any]) -> None:
        """Put model and state back to the last commit, and say so if the environment is another one."""
        writer = self._open_writer()
        data = writer.checkpoint()
        if data is None:
            return
        try:
            tensors = load_tensors(data)
            metadata = _metadata(data)
            self.model.load_state_dict(_below("model.", tensors))
            self._checkpoint.step = int(metadata["step"])
            self._checkpoint.lowest_loss = float.fromhex(metadata["lowest_loss"])
        except (SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            # Its digest is right: it was committed like this, by another program or for another model.
            raise DamagedStore(f"the checkpoint of {self.run_id} does not continue this model: {error}") from error
        self.restored_state = _below("state.", tensors)
        self._measure.restore(_below("measure.", tensors))
        if self.finished:
            return
        writer.note(**self._attrs)  # a title or a goal may have changed since
        changes = environment_changes(writer.attrs["provenance"], now)
        if changes:
            warnings.warn(
                f"{self.run_id} goes on in another environment ({'; '.join(changes)}): equal bits are not promised",
                stacklevel=3,
            )
            writer.note(environment_changes=list(dict.fromkeys([*writer.attrs["environment_changes"], *changes])))


def _chosen(kernels: Sequence[KernelChoice]) -> list[dict[str, Any]]:
    """The kernels to record as tables, the NTK first."""
    tables = [named(kernel) for kernel in kernels]
    names = [table["name"] for table in tables]
    if "ntk" not in names:
        raise InputError(f"kernels = {names}: must have 'ntk' among them; the others are recorded beside it")
    if len(set(names)) < len(names):
        raise InputError(f"kernels = {names}: each at most once, as its variables are called by its name")
    return sorted(tables, key=lambda table: (table["name"] != "ntk", table["name"]))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(tensor: Tensor) -> Tensor:
    """A copy that safetensors takes: tied tensors apart, none of them strided."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _metadata(data: bytes) -> dict[str, str]:
    """The `__metadata__` of safetensors bytes: a little-endian length, then a JSON header."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]
