"""Vision transformers, in operations whose derivatives of every order are PyTorch's own: no fused attention or norm."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.images import image_shape
from pipeline.models.layers import ACTIVATIONS, Layers, Mean, Residual
from pipeline.models.norm import LayerNorm


def vit(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A linear map of each patch, its position, `depth` blocks, a norm, the mean over patches and a linear head.

    A block is h ← h + Attention(LN(h)), then h ← h + W_2 φ(W_1 LN(h) + b_1) + b_2.

    Args:
        options: `patch`, side of the square patches; `dim` of the tokens; `depth`; `heads`; `mlp_ratio`, hidden width
            over `dim`; `activation` φ, one of `ACTIVATIONS`; `position`, "sincos" (fixed) or "learned"; `head_scale`,
            which multiplies the head's initial weights and bias, 1 if None; and what `Layers` takes, by default
            PyTorch's initialisation.
        input_shape: (channels, height, width) of one example.
        outputs: c.

    Raises:
        InputError: if the examples are no images, or cannot be cut into such patches.

    Source: Dosovitskiy et al. (2021), arXiv 2010.11929, equations 1 to 4; Beyer, Zhai, Kolesnikov (2022), arXiv
    2205.01580, for the fixed positions and the mean in place of a class token.
    """
    make, patch, dim = Layers.of(options), options.patch, options.dim
    channels, height, width = image_shape(options.name, input_shape, patch=patch)
    rows, columns = height // patch, width // patch
    embed = make.linear(channels * patch**2, dim)
    position = sincos(rows, columns, dim) if options.position == "sincos" else None
    modules: list[nn.Module] = [Patches(patch), embed, Position(rows * columns, dim, position)]
    for _ in range(options.depth):
        hidden = options.mlp_ratio * dim
        attention = nn.Sequential(LayerNorm(dim), Attention(make, dim, options.heads))
        dense = [make.linear(dim, hidden), ACTIVATIONS[options.activation](), make.linear(hidden, dim)]
        branches = attention, nn.Sequential(LayerNorm(dim), *dense)
        modules += [Residual(branch, nn.Identity()) for branch in branches]
    head = make.linear(dim, outputs, last=True)
    if options.head_scale is not None:
        with torch.no_grad():
            for tensor in head.parameters():
                tensor.mul_(options.head_scale)
    return make.network(*modules, LayerNorm(dim), Mean(1), head)


class Patches(nn.Module):
    """Images (n, channels, height, width) -> patches (n, T, channels · patch²), row by row."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """The patches of each image."""
        tiles = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # n, channels, rows, p, columns, p
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Position(nn.Module):
    """Adds to each token what tells its place: a fixed table (T, d), or a learned one drawn from N(0, 0.02²)."""

    def __init__(self, tokens: int, dim: int, fixed: Tensor | None) -> None:
        super().__init__()
        if fixed is None:
            self.table = nn.Parameter(0.02 * torch.randn(tokens, dim))
        else:
            self.register_buffer("table", fixed)

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, d), of the shape of x."""
        return x + self.table


def sincos(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed positions (rows · columns, dim): sines and cosines of the column, then of the row, a quarter of dim each.

    With q = dim / 4, of frequency 10000^(-i/q), i = 0 … q-1.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class Attention(nn.Module):
    """Self-attention: softmax(Q Kᵀ / √(d / heads)) V in each head, then a linear map of all heads.

    The maps to Q, K and V have no bias: that of K has no effect, as softmax takes no notice of a shift.

    Source: Vaswani et al. (2017), arXiv 1706.03762, equation 1.
    """

    def __init__(self, make: Layers, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = make.linear(dim, 3 * dim, bias=False), make.linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, d), of the shape of x."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each n, heads, T, d / heads
        weight = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        return self.out((weight @ v).transpose(1, 2).flatten(2))
