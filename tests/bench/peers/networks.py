"""The networks of the kernel benchmark in torch; `with_neural_tangents.py` has the same ones in JAX."""

import math

import numpy as np
import torch
from torch import Tensor, nn

IMAGE = (3, 32, 32)
PATCH, WIDTH, HEADS, HIDDEN, BLOCKS = 8, 64, 4, 128, 2
TOKENS = (IMAGE[1] // PATCH) * (IMAGE[2] // PATCH)


def build(name: str, outputs: int, weights: dict[str, np.ndarray] | None = None) -> nn.Module:
    """A network of 3 x 32 x 32 images, in torch's own initialisation from seed 0 or with the weights given.

    Args:
        name: mlp, cnn or vit.
        outputs: c.
        weights: "param/<name>" -> array, as `exported` gives them; other keys are not looked at.
    """
    torch.manual_seed(0)
    model = {"mlp": mlp, "cnn": cnn, "vit": Vit}[name](outputs)
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(weights[f"param/{name}"]) for name in model.state_dict()})
    return model


def exported(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights under the names that `build` and the other environments look for."""
    return {f"param/{name}": tensor.detach().numpy().copy() for name, tensor in model.named_parameters()}


def mlp(outputs: int) -> nn.Module:
    """3072-200-200-c, tanh."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(IMAGE), 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(),
        nn.Linear(200, outputs),
    )  # fmt: skip


def cnn(outputs: int) -> nn.Module:
    """Twice 3 x 3 convolution to 32 channels, tanh, average pooling by 2; then linear."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(2048, outputs),
    )  # fmt: skip


class Block(nn.Module):
    """Pre-LayerNorm attention and a tanh network; q, k, v are the thirds of `qkv`, each split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), dim=-1)
        x = x + self.project((weights @ v).transpose(1, 2).reshape(n, tokens, WIDTH))
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Patches of 8 x 8 pixels, learned positions, two blocks, the mean over tokens, then linear."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(IMAGE[0] * PATCH**2, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        patches = x.view(n, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        tokens = self.embed(patches.reshape(n, TOKENS, -1)) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def descend(model: nn.Module, x: Tensor, y: Tensor, learning_rate: float, steps: int) -> None:
    """Full-batch gradient descent on (1/2n) |f - y|^2, in place."""
    parameters = list(model.parameters())
    for _ in range(steps):
        loss = (model(x) - y).square().sum() / (2 * len(x))
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= learning_rate * gradient
