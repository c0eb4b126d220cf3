"""Networks of linear maps: with activations between them, or without."""

import itertools
from typing import Any

import torch
from torch import nn

from pipeline.models.layers import ACTIVATIONS, Layers


def mlp(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A fully connected network, f = W_(L+1) h_L + b_(L+1), h_l = φ(W_l h_(l-1) + b_l), h_0 = x.

    Args:
        options: `width` and `depth` L of the hidden layers; `activation`, one of `ACTIVATIONS`; `bias`, False for
            none; and what `Layers` takes, by default PyTorch's initialisation.
        input_shape: shape of one example; flattened if it has more than one axis.
        outputs: c.
    """
    make, bias = Layers.of(options), options.bias is not False
    modules, features = _flat(input_shape)
    for _ in range(options.depth):
        modules += [make.linear(features, options.width, bias=bias), ACTIVATIONS[options.activation]()]
        features = options.width
    return make.network(*modules, make.linear(features, outputs, bias=bias, last=True))


def two_layer_linear(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Two linear layers without biases, f = a W x; for one output K = ‖a‖² X Xᵀ + X Wᵀ W Xᵀ.

    First a (c, m), then W (m, d) is drawn from N(0, init_std² / m). With `rank_one`, a and W keep of these draws
    their signs and their first row: a = (init_std / √m) ε with ε = sign a, W = εᵀ qᵀ, for one output a form that
    gradient descent keeps. No product is rounded, so W is of rank one in float64 too.

    Args:
        options: `width`, m; `init_std`; `rank_one`.
        input_shape: shape of one example; flattened if it has more than one axis.
        outputs: c.

    Source: Atanasov, Bordelon, Pehlevan (2021), arXiv 2111.00034, equation 5 (the kernel); Li, Wang, Li (2022), arXiv
    2207.12678 (gradient descent on it at the Edge of Stability).
    """
    modules, features = _flat(input_shape)
    inner, outer = nn.Linear(features, options.width, bias=False), nn.Linear(options.width, outputs, bias=False)
    for layer in (outer, inner):
        nn.init.normal_(layer.weight, std=options.init_std / options.width**0.5)
    if options.rank_one:
        with torch.no_grad():
            signs = outer.weight.sign()
            outer.weight.copy_(signs * (options.init_std / options.width**0.5))
            inner.weight.copy_(torch.outer(signs[0], inner.weight[0]))
    return nn.Sequential(*modules, inner, outer)


def deep_linear(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Linear layers without biases, f = W_L … W_1 x.

    Args:
        options: `depth`, L matrices; `width` between them; and what `Layers` takes, by default Xavier's
            W ~ N(0, 2 / (fan_in + fan_out)).
        input_shape: shape of one example; flattened if it has more than one axis.
        outputs: c.

    Source: Cohen, Kaur, Li, Kolter, Talwalkar (2021), arXiv 2103.00065, where L = 20 and all widths are 50.
    """
    make = Layers.of(options, init="xavier_normal")
    modules, features = _flat(input_shape)
    sizes = [features, *[options.width] * (options.depth - 1)]
    maps = [make.linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    return make.network(*modules, *maps, make.linear(sizes[-1], outputs, bias=False, last=True))


def _flat(input_shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    """What flattens the examples, if they need it, and their number of features."""
    return [] if len(input_shape) == 1 else [nn.Flatten()], int(torch.Size(input_shape).numel())
