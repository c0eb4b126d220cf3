"""[loss], [update], [stop] and [compute]: how a run is trained, when it ends, on what it is computed."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.tables import Count, Positive, Table


class Mse(Table):
    """L = (1/2n) ‖f - y‖²."""

    name: Literal["mse"] = "mse"


class CrossEntropy(Table):
    """L = -(1/n) Σ y log softmax(f) of one-hot labels; (1/n) Σ log(1 + exp(-y f)) of one output and labels ±1."""

    name: Literal["cross_entropy"] = "cross_entropy"


Fraction = Annotated[float, Field(ge=0, lt=1)]


class Update(Table):
    """What the update rules share.

    Attributes:
        preconditioned: whether the rule divides by a diagonal P, so that its stability line is that of P^(-1/2) H
            P^(-1/2).
    """

    preconditioned: ClassVar[bool] = False


class GradientDescent(Update):
    """θ <- θ - η ∇L(θ), on all examples."""

    name: Literal["gd"] = "gd"


class StochasticGradientDescent(Update):
    """θ <- θ - η ∇L_B(θ), on `batch_size` examples B that are drawn anew, without replacement in each epoch."""

    name: Literal["sgd"] = "sgd"
    batch_size: Count


class HeavyBall(Update):
    """Polyak's momentum: m <- β m + ∇L(θ), θ <- θ - η m."""

    name: Literal["heavy_ball"] = "heavy_ball"
    momentum: Fraction = 0.9


class Nesterov(Update):
    """Nesterov's momentum: m <- β m + ∇L(θ), θ <- θ - η (∇L(θ) + β m)."""

    name: Literal["nesterov"] = "nesterov"
    momentum: Fraction = 0.9


class RmsProp(Update):
    """v <- β₂ v + (1 - β₂) ∇L(θ)², θ <- θ - η ∇L(θ) / (√v + ε)."""

    preconditioned: ClassVar[bool] = True
    name: Literal["rmsprop"] = "rmsprop"
    beta2: Fraction = 0.99
    epsilon: Positive = 1e-8


class Adam(Update):
    """θ <- θ - η m̂ / (√v̂ + ε), with m̂ and v̂ the moving averages of ∇L(θ) and ∇L(θ)² without their bias."""

    preconditioned: ClassVar[bool] = True
    name: Literal["adam"] = "adam"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8


class Stop(Table):
    """When a run ends: at the first step whose loss is below `loss`, at the latest after `steps` updates."""

    loss: Positive | None = None
    steps: Count

    def reached(self, loss: float) -> bool:
        """Whether a run may end at this loss."""
        return self.loss is not None and loss < self.loss

    def asks_for_more(self, last_step: int, lowest_loss: float) -> bool:
        """Whether a complete run is short of what its study asks for by now: a smaller loss, or more steps."""
        return last_step < self.steps and not self.reached(lowest_loss)


class Compute(Table):
    """How the numbers are computed (part of a run's identity) and how often rows are committed (not part of it)."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:[0-9]{1,3})?)$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    commit_seconds: Positive = 5.0
