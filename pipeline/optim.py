"""Update rules: pure functions of parameters, gradients and a state that is passed in and out.

Each is a frozen dataclass whose fields are its options in a study. Names and conventions are those of `torch.optim`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Moved = tuple[list[Tensor], State]


class UpdateRule(ABC):
    """A way to turn gradients into new parameters.

    Attributes:
        batch_size: how many examples the gradient of a step is taken of; None for all.
    """

    batch_size: int | None = None

    def init(self, parameters: Sequence[Tensor]) -> State:
        """The state before the first step; empty by default."""
        return {}

    @abstractmethod
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """New parameters and state, without a graph; what was passed in is left as it was."""

    @abstractmethod
    def stability_line(self, learning_rate: float) -> float | None:
        """The sharpness above which the rule is unstable on a quadratic; None where there is no such number.

        Of a rule with a preconditioner, the line is for the largest eigenvalue of P^(-1/2) H P^(-1/2).
        """

    def preconditioner(self, state: State) -> list[Tensor] | None:
        """The diagonal P by which the step that led to `state` divided, in the shapes of the parameters; None for 1."""
        return None


class GradientDescent(UpdateRule):
    """θ ← θ - η ∇L(θ), unstable above the sharpness 2/η.

    Source: Cohen et al. (2021), arXiv 2103.00065, section 2.
    """

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """θ - η ∇L(θ)."""
        return _moved(parameters, gradients, learning_rate), state

    def stability_line(self, learning_rate: float) -> float | None:
        """2/η."""
        return 2 / learning_rate


@dataclass(frozen=True)
class StochasticGradientDescent(GradientDescent):
    """θ ← θ - η ∇L_B(θ), L_B the loss of `batch_size` examples that are others at every step.

    It has no stability line: its sharpness stays below 2/η by as much as the gradients of batches differ.
    """

    batch_size: int

    def stability_line(self, learning_rate: float) -> None:
        """None: what is stable depends on the noise as well."""


@dataclass(frozen=True)
class HeavyBall(UpdateRule):
    """Polyak's momentum: m ← β m + ∇L(θ), θ ← θ - η m, from m = 0; unstable above (2 + 2β)/η.

    Source: Polyak (1964); Cohen et al. (2021), arXiv 2103.00065, appendix B, for the line.
    """

    momentum: float

    def init(self, parameters: Sequence[Tensor]) -> State:
        """Momentum 0."""
        return _zeros("momentum", parameters)

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """θ - η m with the new m."""
        momentum = self._grown(gradients, state)
        return _moved(parameters, momentum, learning_rate), numbered("momentum", momentum)

    def stability_line(self, learning_rate: float) -> float:
        """(2 + 2β)/η."""
        return (2 + 2 * self.momentum) / learning_rate

    def _grown(self, gradients: Sequence[Tensor], state: State) -> list[Tensor]:
        """β m + ∇L(θ)."""
        old = listed("momentum", state)
        return [torch.add(g, m, alpha=self.momentum) for g, m in zip(gradients, old, strict=True)]


@dataclass(frozen=True)
class Nesterov(HeavyBall):
    """Nesterov's momentum: m ← β m + ∇L(θ), θ ← θ - η (∇L(θ) + β m); unstable above (2 + 2β)/(η (1 + 2β)).

    θ is the point that looks ahead, where the gradient is taken.

    Source: Sutskever et al. (2013), ICML; Cohen et al. (2021), arXiv 2103.00065, appendix B, for the line.
    """

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """θ - η (∇L(θ) + β m) with the new m."""
        momentum = self._grown(gradients, state)
        ahead = self._grown(gradients, numbered("momentum", momentum))
        return _moved(parameters, ahead, learning_rate), numbered("momentum", momentum)

    def stability_line(self, learning_rate: float) -> float:
        """(2 + 2β)/(η (1 + 2β))."""
        return super().stability_line(learning_rate) / (1 + 2 * self.momentum)


@dataclass(frozen=True)
class RmsProp(UpdateRule):
    """v ← β₂ v + (1 - β₂) ∇L(θ)², θ ← θ - η ∇L(θ) / (√v + ε), from v = 0.

    The preconditioner is P = diag(√v + ε); unstable above 2/η, as long as P changes slowly.

    Source: Tieleman and Hinton (2012), lecture 6.5; Cohen et al. (2022), arXiv 2207.14484, for the line.
    """

    beta2: float
    epsilon: float

    def init(self, parameters: Sequence[Tensor]) -> State:
        """Average 0."""
        return _zeros("second", parameters)

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """θ - η ∇L(θ) / P with the new P."""
        state = _second_moment(gradients, state, self.beta2)
        scaled = [g / p for g, p in zip(gradients, self.preconditioner(state), strict=True)]
        return _moved(parameters, scaled, learning_rate), state

    def stability_line(self, learning_rate: float) -> float:
        """2/η, of the preconditioned Hessian."""
        return 2 / learning_rate

    def preconditioner(self, state: State) -> list[Tensor]:
        """√v + ε."""
        return [second.sqrt() + self.epsilon for second in listed("second", state)]


@dataclass(frozen=True)
class Adam(UpdateRule):
    """m ← β₁ m + (1 - β₁) ∇L(θ), v ← β₂ v + (1 - β₂) ∇L(θ)², θ ← θ - η m̂ / (√v̂ + ε), from m = v = 0.

    m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) at the t-th step. This is gradient descent along the moving average m,
    preconditioned by P = (1 - β₁ᵗ) diag(√v̂ + ε), whose first factor soon is 1; unstable above (2 + 2β₁)/((1 - β₁) η),
    as long as P changes slowly.

    Source: Kingma and Ba (2015), arXiv 1412.6980, algorithm 1; Cohen et al. (2022), arXiv 2207.14484, for the line.
    """

    beta1: float
    beta2: float
    epsilon: float

    def init(self, parameters: Sequence[Tensor]) -> State:
        """Averages 0, and t = 0."""
        return _zeros("first", parameters) | _zeros("second", parameters) | {"updates": torch.tensor(0)}

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> Moved:
        """θ - η m / P with the new m and P."""
        old = listed("first", state)
        first = [self.beta1 * m + (1 - self.beta1) * g for g, m in zip(gradients, old, strict=True)]
        state = _second_moment(gradients, state, self.beta2)
        state |= numbered("first", first) | {"updates": state["updates"] + 1}
        scaled = [m / p for m, p in zip(first, self.preconditioner(state), strict=True)]
        return _moved(parameters, scaled, learning_rate), state

    def stability_line(self, learning_rate: float) -> float:
        """(2 + 2β₁)/((1 - β₁) η), of the preconditioned Hessian."""
        return (2 + 2 * self.beta1) / ((1 - self.beta1) * learning_rate)

    def preconditioner(self, state: State) -> list[Tensor]:
        """(1 - β₁ᵗ) (√v̂ + ε)."""
        updates = int(state["updates"])
        of_first, of_second = 1 - self.beta1**updates, 1 - self.beta2**updates
        return [of_first * ((second / of_second).sqrt() + self.epsilon) for second in listed("second", state)]


def numbered(name: str, tensors: Sequence[Tensor]) -> State:
    """A list of tensors as a state can hold it."""
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def listed(name: str, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The list of tensors that a state holds by that name."""
    return [state[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in state))]


def _zeros(name: str, parameters: Sequence[Tensor]) -> State:
    return numbered(name, [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters])


def _moved(parameters: Sequence[Tensor], directions: Sequence[Tensor], learning_rate: float) -> list[Tensor]:
    return [torch.sub(p, d, alpha=learning_rate) for p, d in zip(parameters, directions, strict=True)]


def _second_moment(gradients: Sequence[Tensor], state: State, beta2: float) -> State:
    """The state with β₂ v + (1 - β₂) ∇L(θ)² in the place of v."""
    old = listed("second", state)
    new = [beta2 * v + (1 - beta2) * g.square() for g, v in zip(gradients, old, strict=True)]
    return state | numbered("second", new)


UPDATES: dict[str, Callable[..., UpdateRule]] = {
    "gd": GradientDescent,
    "sgd": StochasticGradientDescent,
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
    "rmsprop": RmsProp,
    "adam": Adam,
}
