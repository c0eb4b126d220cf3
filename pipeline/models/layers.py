"""The layers that the networks share, in each parametrisation and from each initialisation.

With d the fan-in of a layer (of a convolution: channels times places), h what it takes and z what it gives:

    pytorch       z = W h + b         W and b from PyTorch's default, uniform on ±1/√d, or W from `init` and b = 0
    ntk           z = W h / √d + b    W from N(0, 1), b = 0
    mean_field    as ntk; but the last layer z = W h / d + b

They give the same functions and differ in what a gradient step does. As the width grows, the kernel of `ntk` stays
where it is at a given learning rate; with `mean_field`, and learning rates in proportion to the width, it moves as much
as at any other width. Beside that, `init_scale` multiplies the initial W and b of every layer, and `output_scale` α
what the network gives, f = α g(θ): α → ∞ is lazy training, with learning rates in proportion to 1/α².

Source: Jacot, Gabriel, Hongler (2018), arXiv 1806.07572 (`ntk`; their β is 1 here, and the biases start at 0); Mei,
Montanari, Nguyen (2018), arXiv 1804.06561, and for any depth Bordelon and Pehlevan (2022), arXiv 2205.09653, with their
γ_0 = 1 (`mean_field`); Chizat, Oyallon, Bach (2019), arXiv 1812.07956 (α).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

# Variance of a weight, times its fan-in, from its fan-in and fan-out: LeCun et al. 1998; He et al. 2015, equation 10;
# Glorot and Bengio 2010, equation 12.
INITS = {
    "lecun_normal": lambda fan_in, fan_out: 1.0,
    "he_normal": lambda fan_in, fan_out: 2.0,
    "xavier_normal": lambda fan_in, fan_out: 2 * fan_in / (fan_in + fan_out),
}


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Attributes:
        parametrisation: "ntk", "mean_field", or None for PyTorch's.
        init: one of `INITS`, or None for PyTorch's default; not used by the other parametrisations.
        init_scale: multiplies the initial weights and biases.
        output_scale: α, multiplies the network.
    """

    parametrisation: str | None
    init: str | None
    init_scale: float
    output_scale: float

    @classmethod
    def of(cls, options: Any, init: str | None = None) -> "Layers":
        """Those that a study asks for, where it says nothing with the initialisation `init`."""
        scales = options.init_scale or 1.0, options.output_scale or 1.0
        return cls(options.parametrisation, options.init or init, *scales)

    def linear(self, inputs: int, outputs: int, *, bias: bool = True, last: bool = False) -> nn.Linear:
        """A linear map; `last` if the network gives what it gives."""
        layer = nn.Linear(inputs, outputs, bias)
        self._start(layer, last)
        return layer

    def conv(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
        """A convolution of images, padded with zeros so that stride 1 keeps their size; `kernel` is odd."""
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
        self._start(layer)
        return layer

    def network(self, *modules: nn.Module) -> nn.Sequential:
        """The modules one after the other, times α."""
        scale = [] if self.output_scale == 1 else [Multiplied(self.output_scale)]
        return nn.Sequential(*modules, *scale)

    @torch.no_grad()
    def _start(self, layer: nn.Linear | nn.Conv2d, last: bool = False) -> None:
        """Draw the initial weights, and put the factor of the parametrisation before the layer."""
        fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel()
        if self.parametrisation is not None:
            nn.init.normal_(layer.weight)
            power = 1 if last and self.parametrisation == "mean_field" else 0.5
            # Before it and not after, so that the bias is spared and the layer is still the only call with its weight.
            layer.register_forward_pre_hook(partial(_multiply_input, fan_in**-power))
        elif self.init is not None:
            nn.init.normal_(layer.weight, std=(INITS[self.init](fan_in, fan_out) / fan_in) ** 0.5)
        if layer.bias is not None and (self.parametrisation or self.init):
            layer.bias.zero_()
        for tensor in layer.parameters():
            tensor.mul_(self.init_scale)


def _multiply_input(factor: float, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0] * factor


class Multiplied(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return x * self.factor


class Residual(nn.Module):
    """shortcut(x) + branch(x)."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of branch(x)."""
        return self.shortcut(x) + self.branch(x)


class Mean(nn.Module):
    """The mean over some axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Without those axes."""
        return x.mean(self.axes)
