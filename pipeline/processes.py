"""Processes: what moves a model from the row of one step to the row of the next.

    discrete        θ_{t+1} = rule(θ_t, ∇L(θ_t), η)
    midpoint        θ*_t = (θ_{t-1} + 2 θ_t + θ_{t+1}) / 4,    θ*_0 = θ_0
    gradient_flow   θ(t),    dθ/dt = -η ∇L(θ)
    central_flow    θ(t),    dθ/dt = -η [∇L(θ) + ½ ∇⟨H(θ), Σ(t)⟩]

The flows are those of gradient descent, whose step is their unit of time: row t describes time t.

Whatever a process is, the model holds the parameters of the row that is being measured: kernel, loss and sharpness are
taken there. What else its next rows depend on are tensors of its state, which a checkpoint keeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from pipeline import flows
from pipeline.errors import InputError
from pipeline.gradient import FullBatch, FullGradient, MiniBatches
from pipeline.losses import Loss
from pipeline.operators import flat
from pipeline.optim import State, UpdateRule, listed, numbered


@dataclass(frozen=True)
class Problem:
    """What is trained, on which examples, and how.

    Attributes:
        model: treats examples independently.
        criterion: a mean over examples, of predictions and targets (n, c).
        x: the examples (n, ...).
        y: their targets (n, c).
        rule: the update rule.
        learning_rate: step size η.
        seed: of the run.
    """

    model: nn.Module
    criterion: Loss
    x: Tensor
    y: Tensor
    rule: UpdateRule
    learning_rate: float
    seed: int


class Row(NamedTuple):
    """What a process knows of the row at which the model stands."""

    at: FullGradient
    columns: dict[str, float]  # what `schema.GIVEN_BY` says of the process


class Process(ABC):
    """Moves a model from row to row; `row` is called at each of them before `advance`.

    Args:
        problem: its model is moved, and stands at the first row.

    Attributes:
        parameters: those of the model that are trained.
        batch: gives the full gradient at the parameters as they are.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parameters = [tensor for tensor in problem.model.parameters() if tensor.requires_grad]
        self.batch = FullBatch(problem.model, problem.criterion, problem.x, problem.y)

    @abstractmethod
    def row(self) -> Row:
        """Loss, predictions and gradient where the model stands, and the columns of the process.

        Raises:
            NonFiniteKernel: if the process has diverged.
        """

    @abstractmethod
    def advance(self, step: int) -> None:
        """Move the model from the row of `step` to that of `step` + 1.

        Raises:
            NonFiniteKernel: if the process diverges.
        """

    def preconditioner(self) -> Tensor:
        """The diagonal P (p,) by which the rule's step from this row divides.

        Raises:
            InputError: if there is none.
        """
        raise InputError(f"{type(self).__name__} has no preconditioner")

    @abstractmethod
    def state(self) -> State:
        """The tensors beside the model's that continue the process from this row."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Go on where `state` was taken; the model has been put there."""


class _Stepping(Process):
    """What the processes share that take the steps of the update rule."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        rule = problem.rule
        self._batches = MiniBatches(len(problem.x), rule.batch_size, problem.seed) if rule.batch_size else None
        self._state = rule.init(self.parameters)

    def _step(self, step: int, full: FullGradient | None = None) -> tuple[list[Tensor], State]:
        """Parameters and state of the rule after the step from θ_t, t = `step`, where the model stands.

        Args:
            step: t.
            full: the full gradient there, if it is known.
        """
        if self._batches is not None:
            full = self.batch.gradient(self.parameters, self._batches.examples(step))
        elif full is None:
            full = self.batch.gradient(self.parameters)
        return self.problem.rule.step(self.parameters, full.gradients, self._state, self.problem.learning_rate)


@final
class Discrete(_Stepping):
    """The steps of the update rule."""

    def row(self) -> Row:
        """The iterate θ_t."""
        self._here = self.batch.gradient(self.parameters)
        return Row(self._here, {})

    def advance(self, step: int) -> None:
        """θ_{t+1} from θ_t."""
        moved, self._state = self._step(step, self._here)
        put(self.parameters, moved)

    def preconditioner(self) -> Tensor:
        """That of the step which the rule is about to take."""
        rule = self.problem.rule
        _, after = rule.step(self.parameters, self._here.gradients, self._state, self.problem.learning_rate)
        return _preconditioner(rule.preconditioner(after))

    def state(self) -> State:
        """That of the rule."""
        return self._state

    def restore(self, state: State) -> None:
        """The rule's state."""
        self._state = state


@final
class Midpoint(_Stepping):
    """The iterates of the update rule, averaged so that an oscillation of period two cancels.

    The iterates are those of the process `discrete`, computed again beside the rows. The first row has no iterate
    before it and stays at θ_0. A row gives `oscillation`, ‖θ_t - θ*_t‖², summed in float64.

    Source: Cohen et al. (2024), arXiv 2410.24206; θ*_0 = θ_0 is a choice of this project.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._iterate = [tensor.detach().clone() for tensor in self.parameters]  # θ_t
        self._following, self._state = self._step(0)  # θ_{t+1}

    def row(self) -> Row:
        """The midpoint θ*_t."""
        return Row(self.batch.gradient(self.parameters), {"oscillation": self._oscillation()})

    def advance(self, step: int) -> None:
        """θ*_{t+1} from θ_t, θ_{t+1} and the step after them."""
        before, self._iterate = self._iterate, self._following
        put(self.parameters, self._iterate)
        self._following, self._state = self._step(step + 1)
        three = zip(before, self._iterate, self._following, strict=True)
        put(self.parameters, [(a + 2 * b + c) / 4 for a, b, c in three])

    def preconditioner(self) -> Tensor:
        """That of the step from θ_t to θ_{t+1}."""
        return _preconditioner(self.problem.rule.preconditioner(self._state))

    def state(self) -> State:
        """The rule's, and the iterates θ_t and θ_{t+1}."""
        return self._state | numbered("iterate", self._iterate) | numbered("following", self._following)

    def restore(self, state: State) -> None:
        """All that `state` gives."""
        self._iterate, self._following = listed("iterate", state), listed("following", state)
        self._state = {name: state[name] for name in self._state}

    def _oscillation(self) -> float:
        pairs = zip(self._iterate, self.parameters, strict=True)
        return sum(float((a - b.detach()).double().reshape(-1).square().sum()) for a, b in pairs)


@final
class GradientFlow(Process):
    """Gradient flow."""

    def row(self) -> Row:
        """The flow at time t."""
        return Row(self.batch.gradient(self.parameters), {})

    def advance(self, step: int) -> None:
        """The flow a unit of time later."""
        flows.gradient_flow(self.batch, self.parameters, self.problem.learning_rate)

    def state(self) -> State:
        """No state."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing to restore."""


@final
class CentralFlow(Process):
    """The central flow. A row gives `oscillation`, tr Σ, and `critical`, the critical eigenvalues of the Hessian."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._flow = flows.CentralFlow(problem.model, problem.criterion, problem.x, problem.y, problem.learning_rate)
        self._start: Tensor | None = None

    def row(self) -> Row:
        """The flow at time t, and its Σ there."""
        here = self.batch.gradient(self.parameters)
        self._rate = self._flow.rate(self._start)
        return Row(here, {"oscillation": self._rate.variance, "critical": self._rate.critical})

    def advance(self, step: int) -> None:
        """The flow a unit of time later."""
        self._start = self._flow.advance(self._rate)

    def state(self) -> State:
        """The eigenvectors from which those of this row were sought, so that it can be measured again."""
        return {} if self._start is None else {"vectors": self._start}

    def restore(self, state: State) -> None:
        """The eigenvectors."""
        self._start = state["vectors"]


@torch.no_grad()
def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give the parameters other values, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _preconditioner(tensors: Sequence[Tensor] | None) -> Tensor:
    """That of an update rule as one vector (p,)."""
    if tensors is None:
        raise InputError("the update rule has no preconditioner")
    return flat(tensors)


PROCESSES: Mapping[str, type[Process]] = {
    "discrete": Discrete,
    "midpoint": Midpoint,
    "gradient_flow": GradientFlow,
    "central_flow": CentralFlow,
}
