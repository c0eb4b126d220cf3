"""[loss], [update], [stop] and [compute]: how a run is trained, when it ends, on what it is computed."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.tables import Count, Positive, Table


class Mse(Table):
    """L = (1/2n) ‖f - y‖²."""

    name: Literal["mse"] = "mse"


class GradientDescent(Table):
    """θ <- θ - η ∇L(θ), on all examples."""

    name: Literal["gd"] = "gd"


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
