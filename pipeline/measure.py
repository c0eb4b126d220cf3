"""What one row of each group holds: a model, seen through its kernels on fixed examples.

    kernel K -> ‖K‖, tr K, Σ_c y_cᵀ K y_c, λ_1 / n          `scalars`
             -> λ_i, v_i, and f on the examples              `spectra`
             -> K itself, its parts, and the parameters      `snapshots`
    loss L   -> largest eigenvalues of ∂²L/∂θ²               `hessian`
    held out -> L and the accuracy                           `scalars`
             -> J_test J_testᵀ, J_test Jᵀ, and f             `snapshots`

Kernels come in the model's dtype. Sums over one run in float64, from the kernel before it is rounded for storage, and
so do its eigenpairs. An eigensolver starts where it ended at the row before, so what a row holds depends on the rows
before it; `state` is all of that.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import schema
from pipeline.errors import InputError
from pipeline.kernels import KERNELS, NTK
from pipeline.losses import Loss, accuracy
from pipeline.operators import HessianOperator, Preconditioned, flat
from pipeline.spectra import NonFiniteKernel, as_matrix, eigenpairs, lanczos, top_eigenvalue

PARTS = ("kernel", "eigenpairs", "scalars", "other_kernels", "hessian", "test")

# Kernels that do not depend on the model: what they are is measured once.
CONSTANT = ("nngp", "infinite_ntk")

# A kernel as a study file spells it: its name, or a table of its name and options.
KernelChoice = str | Mapping[str, Any]


@dataclass
class _Watched:
    """A kernel that is measured at every row.

    Attributes:
        prefix: stands in front of the names of its variables.
        evaluate: model -> kernel (n, n), or (n, n, c, c) for all pairs of outputs.
        constant: whether it is the same for every model.
        start: where its eigensolver goes on.
        known: what was measured of a constant kernel.
    """

    prefix: str
    evaluate: Callable[[nn.Module], Tensor]
    constant: bool
    start: NDArray[np.float64] | None = None
    known: dict[str, Any] | None = None


@dataclass
class _HeldOut:
    """Examples that the model is not trained on.

    Attributes:
        x: (m, ...).
        y: their targets (m, c).
        criterion: the loss (prediction, target) -> scalar.
        labels: whether the targets are class labels.
        kernel: model -> J_test J_testᵀ (m, m).
        cross: model -> J_test Jᵀ (m, n), with the examples that kernels are taken on.
    """

    x: Tensor
    y: Tensor
    criterion: Loss
    labels: bool
    kernel: NTK
    cross: NTK

    @property
    def variables(self) -> list[str]:
        """What is measured."""
        return [name for name in schema.HELD_OUT if self.labels or name != "test_accuracy"]

    def measured(self, model: nn.Module, kernels: bool) -> dict[str, Any]:
        """The scalars by name; with `kernels` also those and the outputs."""
        with torch.no_grad():
            prediction = model(self.x)
            values: dict[str, Any] = {"test_loss": self.criterion(prediction, self.y).item()}
        if self.labels:
            values["test_accuracy"] = accuracy(prediction, self.y)
        if kernels:
            values["prediction_test"] = prediction.numpy(force=True)
            values["ntk_test"] = self.kernel(model).numpy(force=True)
            values["ntk_cross"] = self.cross(model).numpy(force=True)
        return values


class Measure:
    """Turns a model into the rows of the groups that are due.

    Args:
        x: the examples on which kernels are taken (n, ...).
        y: their targets (n, c), or None: there is then no target energy.
        eigenpairs: k, leading eigenpairs of each kernel.
        kernels: the kernels that are measured. The variables of the first one have no prefix.
        layers: measure the parts of the NTK by tensor as well.
        full: keep the NTK of all pairs of outputs.
        criterion: the loss (prediction, target) -> scalar, for the group `hessian` and the held-out examples.
        hessian_eigenpairs: leading eigenvalues of the Hessian.
        preconditioned: measure the sharpness of the preconditioned Hessian as well.
        test: held-out examples (m, ...) and their targets (m, c), whose kernels with `x` are then measured as well.
        labels: whether targets are class labels, so that there is an accuracy.
        outputs: c, if there are no targets to tell.

    Attributes:
        seconds: what each part of the last rows took.

    Raises:
        InputError: if the arguments do not fit each other.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        eigenpairs: int,
        *,
        kernels: Sequence[KernelChoice] = ("ntk",),
        layers: bool = False,
        full: bool = False,
        criterion: Loss | None = None,
        hessian_eigenpairs: int = 1,
        preconditioned: bool = False,
        test: tuple[Tensor, Tensor] | None = None,
        labels: bool = False,
        outputs: int | None = None,
    ) -> None:
        self._x, self._y, self._k = x, y, eigenpairs
        self._n = len(x)
        self._c = outputs or (1 if y is None else y.shape[1])
        first, *others = [named(kernel) for kernel in kernels]
        self._main = self._watched(first, "")
        self._others = [self._watched(kernel, f"{kernel['name']}_") for kernel in others]
        self._layers = NTK(x, layers=True) if layers else None
        self._criterion, self._hessian_k = criterion, hessian_eigenpairs
        self._hessian_start: Tensor | None = None
        self._preconditioned_start: Tensor | None = None
        if full and self._c == 1:
            raise InputError(
                "ntk_full: a network of one output has one pair of outputs, whose kernel is ntk: leave it out"
            )
        self._test: _HeldOut | None = None
        if test is not None:
            if criterion is None:
                raise InputError("test: needs the loss; give criterion=, a function (prediction, target) -> loss")
            self._test = _HeldOut(*test, criterion, labels, NTK(test[0]), NTK(test[0], x))
        held_out = self._test.variables if self._test else ()
        self.variables = schema.recorded([kernel["name"] for kernel in others], layers, full, preconditioned, held_out)
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def dims(self) -> dict[str, int]:
        """Lengths of the dimensions that do not depend on the model."""
        n, c, m = self._n, self._c, 0 if self._test is None else len(self._test.x)
        return {
            "sample": n, "sample2": n, "output": c, "output2": c, "eig": self._k, "hessian_eig": self._hessian_k,
            "test_sample": m, "test_sample2": m,
        }  # fmt: skip

    def _watched(self, kernel: Mapping[str, Any], prefix: str) -> _Watched:
        options = {name: value for name, value in kernel.items() if name != "name"}
        if kernel["name"] == "ntk":
            options = {"outputs": "trace" if self._c == 1 else "full", **options}
        return _Watched(prefix, KERNELS[kernel["name"]](self._x, **options), kernel["name"] in CONSTANT)

    def rows(
        self, model: nn.Module, due: Iterable[str], preconditioner: Callable[[], Tensor] | None = None
    ) -> dict[str, dict[str, Any]]:
        """The variables of the groups that are due, but for those of every row.

        Arrays may be memory that the next call overwrites.

        Args:
            model: as it is now; left as it was.
            due: of `hessian`, `scalars`, `snapshots` and `spectra`.
            preconditioner: gives the diagonal P (p,) by which the step from here divides, if that is measured.

        Raises:
            NonFiniteKernel: if a kernel or a product with the Hessian is not finite.
        """
        wanted = set(due)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        values: dict[str, Any] = {}
        if wanted & {"scalars", "snapshots", "spectra"}:
            values |= self._of_kernel(self._main, model, wanted, ("kernel", "eigenpairs", "scalars"))
            for other in self._others:
                values |= self._of_kernel(other, model, wanted, 3 * ("other_kernels",))
        if wanted & {"snapshots", "spectra"}:
            with self._timed("scalars"), torch.no_grad():
                known = getattr(self._main.evaluate, "predictions", None)
                values["prediction"] = (model(self._x) if known is None else known).numpy(force=True)
        if "snapshots" in wanted:
            values |= self._of_parameters(model)
        if "hessian" in wanted:
            values |= self._of_hessian(model, values, preconditioner)
        if self._test is not None and wanted & {"scalars", "snapshots"}:
            with self._timed("test"):
                values |= self._test.measured(model, kernels="snapshots" in wanted)
        return {group: {name: values[name] for name in self.variables[group] if name in values} for group in wanted}

    def state(self) -> dict[str, Tensor]:
        """What the next rows depend on beside the model: where the eigensolvers go on."""
        starts = {f"start.{kernel.prefix}ntk": torch.from_numpy(kernel.start)
                  for kernel in (self._main, *self._others) if kernel.start is not None}  # fmt: skip
        of_hessian = {"start.hessian": self._hessian_start, "start.preconditioned": self._preconditioned_start}
        return starts | {name: start for name, start in of_hessian.items() if start is not None}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for kernel in (self._main, *self._others):
            start = state.get(f"start.{kernel.prefix}ntk")
            kernel.start = None if start is None else start.numpy()
        self._hessian_start = state.get("start.hessian")
        self._preconditioned_start = state.get("start.preconditioned")

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def _of_kernel(
        self, watched: _Watched, model: nn.Module, due: set[str], parts: tuple[str, str, str]
    ) -> dict[str, Any]:
        """What is measured of one kernel, by name of variable."""
        if watched.known is not None:
            return watched.known
        if watched.constant:
            due = {"scalars", "snapshots", "spectra"}
        evaluating, solving, summing = parts
        values: dict[str, Any] = {}
        with self._timed(evaluating):
            measured = watched.evaluate(model).numpy(force=True)
        with self._timed(summing):
            pairs_of_outputs = measured.ndim == 4
            kernel = np.einsum("abcc->ab", measured, dtype=np.float64) if pairs_of_outputs else measured
            exact = kernel.astype(np.float64, copy=False)
            values |= self._sums(exact)
        if not math.isfinite(values["frobenius_norm"]):
            raise NonFiniteKernel("a kernel is not finite: the run diverged")
        with self._timed(solving):
            if due & {"spectra", "snapshots"}:
                pairs = eigenpairs(exact, self._k, start=watched.start)
                watched.start = None if watched.constant else pairs.start
                values |= {"eigenvalue": pairs.values, "eigenvector": pairs.vectors}
                values |= {"eigenvalue_residual": pairs.residuals, "solver_iterations": pairs.iterations}
            if due & {"scalars", "snapshots"}:
                known = "eigenvalue" in values and not pairs_of_outputs
                full = as_matrix(measured) if pairs_of_outputs else exact
                values["ntk_sharpness"] = (values["eigenvalue"][0] if known else top_eigenvalue(full)) / self._n
        values["ntk"] = kernel
        if pairs_of_outputs:
            values["ntk_full"] = measured.swapaxes(1, 2)
        found = {f"{watched.prefix}{name}": value for name, value in values.items()}
        watched.known = found if watched.constant else None
        return found

    def _sums(self, kernel: NDArray[np.float64]) -> dict[str, Any]:
        # Sums over a kernel that is about to diverge may overflow: its row is then refused as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            sums = {"frobenius_norm": np.linalg.norm(kernel), "trace": np.trace(kernel)}
            if self._y is not None:
                y = self._y.numpy(force=True).astype(np.float64)
                sums["target_energy"] = np.einsum("nc,nc->", y, kernel @ y)
        return sums

    def _of_parameters(self, model: nn.Module) -> dict[str, Any]:
        """The parameters, and the parts of the NTK by tensor."""
        values: dict[str, Any] = {}
        with self._timed("kernel"):
            if self._layers is not None:
                parts = self._layers(model)
                values["ntk_layer"] = np.stack([parts[name].numpy(force=True) for name in trained_names(model)])
        with self._timed("scalars"):
            flat = [tensor.detach().reshape(-1) for tensor in model.parameters()]
            values["parameter"] = torch.cat(flat).numpy(force=True)
        return values

    def _of_hessian(
        self, model: nn.Module, values: Mapping[str, Any], preconditioner: Callable[[], Tensor] | None
    ) -> dict[str, Any]:
        """Leading eigenvalues of the Hessian; the first search starts at Jᵀ u_1, u_1 the NTK's first eigenvector."""
        if self._criterion is None or self._y is None:
            raise InputError(
                "the group hessian needs the loss: give criterion=, a function (prediction, target) -> loss"
            )
        with self._timed("hessian"):
            if self._hessian_start is None and "ntk" in values:
                self._hessian_start = self._pulled_back(model, values)
            operator = HessianOperator(model, self._criterion, self._x, self._y)
            found = lanczos(operator, self._hessian_k, start=self._hessian_start)
            self._hessian_start = found.vectors
            measured = {
                "hessian_eigenvalue": found.values.numpy(force=True),
                "hessian_residual": found.residuals.numpy(force=True),
                "hessian_products": found.products,
            }
            if preconditioner is not None:
                scaled = Preconditioned(operator, preconditioner())
                found = lanczos(scaled, self._hessian_k, start=self._preconditioned_start)
                self._preconditioned_start = found.vectors
                measured["preconditioned_sharpness"] = found.values[0].item()
        return measured

    def _pulled_back(self, model: nn.Module, values: Mapping[str, Any]) -> Tensor:
        """Jᵀ u_1 (p,), the top eigenvector of the Gauss-Newton matrix of a quadratic loss."""
        full = values["ntk"] if self._c == 1 else as_matrix(values["ntk_full"].swapaxes(1, 2))
        top = eigenpairs(full, 1).vectors.reshape(self._n, self._c)
        parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
        with torch.enable_grad():
            prediction = model(self._x)
        pulled = torch.autograd.grad(
            prediction, parameters, torch.from_numpy(top).to(prediction), materialize_grads=True
        )
        return flat(pulled)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the trained tensors, in the order of the dimension `layer`."""
    return [name for name, tensor in model.named_parameters() if tensor.requires_grad]


def named(kernel: KernelChoice) -> dict[str, Any]:
    """A kernel as a table.

    Raises:
        InputError: if there is no kernel of that name.
    """
    table = {"name": kernel} if isinstance(kernel, str) else dict(kernel)
    if table.get("name") not in KERNELS:
        raise InputError(f"kernel {table.get('name')!r}: must be one of {', '.join(KERNELS)}")
    return table
