"""Layer normalisation in plain operations.

PyTorch's own is one fused function whose first two derivatives are right and whose third is not (torch 2.13): the
gradient of an eigenvalue of the Hessian, which flows at the Edge of Stability need, comes out wrong.
"""

import torch
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """g ∘ (x - mean(x)) / √(var(x) + ε) + b over the last axis; var divides by its length d.

    Source: Ba, Kiros, Hinton (2016), arXiv 1607.06450, section 3.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d), of the shape of x."""
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return normal * self.weight + self.bias
