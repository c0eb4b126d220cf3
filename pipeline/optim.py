"""Update rules: pure functions of parameters, gradients and a state that is passed in and out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

State = dict[str, Tensor]


class UpdateRule(ABC):
    """A way to turn gradients into new parameters."""

    @abstractmethod
    def init(self, parameters: Sequence[Tensor]) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> tuple[list[Tensor], State]:
        """New parameters and state, without a graph; what was passed in is left as it was."""

    @abstractmethod
    def stability_line(self, learning_rate: float) -> float | None:
        """The sharpness above which the rule is unstable on a quadratic; None where there is no such number."""


@final
class GradientDescent(UpdateRule):
    """θ ← θ - η ∇L(θ), unstable above the sharpness 2/η.

    Source: Cohen et al. (2021), arXiv 2103.00065, section 2.
    """

    def init(self, parameters: Sequence[Tensor]) -> State:
        """No state."""
        return {}

    @torch.no_grad()
    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float
    ) -> tuple[list[Tensor], State]:
        """θ - η ∇L(θ)."""
        return [torch.sub(p, g, alpha=learning_rate) for p, g in zip(parameters, gradients, strict=True)], state

    def stability_line(self, learning_rate: float) -> float:
        """2/η."""
        return 2 / learning_rate


UPDATES: dict[str, UpdateRule] = {"gd": GradientDescent()}
