"""The kernels of infinitely wide fully connected networks: NNGP and NTK, in closed form.

The finite network that has them as its limits, with φ the activation, L = `depth` hidden layers and h^0 = x:

    z^l = W_std / √m_l · W^l h^(l-1) + b_std · b^l,    h^l = φ(z^l),    f = z^(L+1),    l = 1 … L+1

where m_l is the number of inputs of layer l; every entry of every W^l and b^l, read-out included, is drawn from N(0, 1)
and trained. As the hidden widths go to infinity, the NNGP is the covariance of an output over
initialisations and the NTK the sum Σ_θ ∂f(x)/∂θ ∂f(x')/∂θ at each of them; for c outputs the trace kernel is c times
the NTK here. The standard parametrisation with PyTorch's default initialisation is another network: its weights and
biases have other gradients, and its NTK grows with the width.

With Σ and Θ the two kernels of the preactivations of a layer, and u, v jointly Gaussian with covariance Σ,

    Σ^1 = Θ^1 = b_std² + W_std² x·x' / d,
    Σ^(l+1) = b_std² + W_std² E[φ(u) φ(v)],    Θ^(l+1) = Σ^(l+1) + W_std² Θ^l E[φ'(u) φ'(v)].

Let g = Σ_uu Σ_vv - Σ_uv² be the determinant of that covariance. The expectations are

    ReLU:  E[φφ] = (√g + (π - θ) Σ_uv) / 2π,        E[φ'φ'] = (π - θ) / 2π,    θ = atan2(√g, Σ_uv)
    erf:   E[φφ] = 2/π · atan2(2 Σ_uv, r),          E[φ'φ'] = 4 / (π r),       r² = 1 + 2 (Σ_uu + Σ_vv) + 4g

which are the published arccos and arcsin in a form that divides by no norm and is exact where x = x'. For x close to
but not x', g cancels: the ReLU kernels then lose half of the digits, an absolute error of about 1e-8 of the diagonal.

Source: Lee et al. (2018), arXiv 1711.00165, section 2.3, for Σ; Jacot, Gabriel, Hongler (2018), arXiv 1806.07572,
proposition 1 and theorem 1, for Θ; Lee et al. (2019), arXiv 1902.06720, appendix on computing both kernels, for this
parametrisation; Cho and Saul (2009), equations 3, 5 and 6, for ReLU; Williams (1997), equation 11, for E[φφ] of erf.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError

Activation = Literal["relu", "erf"]


class InfiniteKernels(NamedTuple):
    """Both kernels of one infinitely wide network, float64."""

    nngp: Tensor  # (n1, n2)
    ntk: Tensor  # (n1, n2), of one output


def infinite_kernels(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    depth: int,
    activation: Activation = "relu",
    weight_std: float = 1.0,
    bias_std: float = 0.0,
) -> InfiniteKernels:
    """NNGP and NTK of an infinitely wide fully connected network on given examples.

    Args:
        x1: (n1, *features), any real dtype and device; each example is flattened.
        x2: (n2, *features), or None for x1, which gives exactly symmetric kernels.
        depth: number of hidden layers.
        activation: "relu" or "erf", after every hidden layer.
        weight_std: W_std of every layer, read-out included.
        bias_std: b_std of every layer, read-out included.

    Returns:
        float64 on the device of x1; on the CPU for MPS, which has no float64.

    Raises:
        InputError: if an argument is out of range, the examples do not fit or are not finite, or a kernel overflows.
    """
    if activation not in LAYER_MAPS:
        raise InputError(f"activation = {activation!r}: must be one of {', '.join(map(repr, LAYER_MAPS))}")
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"depth = {depth!r}: must be a whole number of hidden layers, 1 or more")
    for name, std in (("weight_std", weight_std), ("bias_std", bias_std)):
        if not (math.isfinite(std) and std >= 0):
            raise InputError(f"{name} = {std!r}: must be a finite number, 0 or more")
    rows1 = _rows("x1", x1)
    rows2 = rows1 if x2 is None else _rows("x2", x2)
    if x2 is not None and x2.shape[1:] != x1.shape[1:]:
        raise InputError(
            f"x1 and x2 have examples of shape {tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}: must be the same"
        )
    kernels = _recursion(*_input_products(rows1, rows2), depth, LAYER_MAPS[activation], weight_std**2, bias_std**2)
    if not all(kernel.isfinite().all() for kernel in kernels):
        raise InputError(
            f"a kernel overflows float64 at depth = {depth}, weight_std = {weight_std:g}, bias_std = {bias_std:g}: "
            "use a smaller standard deviation or smaller inputs"
        )
    # Vectorised functions may round an entry and its mirror image differently.
    return kernels if x2 is not None else InfiniteKernels(*((kernel + kernel.T) / 2 for kernel in kernels))


def _rows(name: str, x: Tensor) -> Tensor:
    """The examples as rows (n, d) of float64."""
    if x.ndim < 2 or x.numel() == 0 or x.is_complex():
        raise InputError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: must be (n, features...), real and not empty"
        )
    x = x.detach()
    rows = (x.cpu() if x.device.type == "mps" else x).double().flatten(1)
    if bad := int((~rows.isfinite()).sum()):
        raise InputError(f"{name} has {bad} of {rows.numel()} values that are not finite: leave those examples out")
    return rows


def _input_products(rows1: Tensor, rows2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x·x' / d for all pairs, (n1, n2), and |x|² / d of each set, (n1, 1) and (1, n2), for rows (n, d).

    A matrix product rounds a pair of equal examples and a norm each in its own way, and the square root of g would
    turn that into an angle of 1e-8. Equal examples are therefore found, and get one norm, also as their product.
    """
    d = rows1.shape[1]
    distinct, place = torch.unique(torch.cat([rows1, rows2]), dim=0, return_inverse=True)
    squares = (distinct.square().sum(1) / d)[place]
    place1, place2 = place[: len(rows1), None], place[None, len(rows1) :]
    squares1, squares2 = squares[: len(rows1), None], squares[None, len(rows1) :]
    return torch.where(place1 == place2, squares1, rows1 @ rows2.T / d), squares1, squares2


def _recursion(
    products: Tensor, squares1: Tensor, squares2: Tensor, depth: int, layer_map: "LayerMap", weight: float, bias: float
) -> InfiniteKernels:
    """Both kernels of the output from the products of the inputs; `weight` and `bias` are variances."""
    nngp, own1, own2 = (bias + weight * each for each in (products, squares1, squares2))
    ntk = nngp
    for _ in range(depth):
        values, slopes = layer_map(nngp, own1, own2)
        nngp = bias + weight * values
        ntk = nngp + weight * ntk * slopes
        own1, own2 = (bias + weight * layer_map(own, own, own)[0] for own in (own1, own2))
    return InfiniteKernels(nngp, ntk)


def _root_determinant(cross: Tensor, own1: Tensor, own2: Tensor) -> Tensor:
    """√g of each pair; variances far from 1, as of a deep network, have no product in float64, but their roots have."""
    one1, one2 = (torch.where(own > 0, own, 1) for own in (own1, own2))
    # Equal examples give 1 - 1 exactly; only rounding can make any other pair negative.
    sine = (1 - (cross / one1) * (cross / one2)).clamp_(min=0).sqrt_()
    return own1.sqrt() * own2.sqrt() * sine


def _relu(cross: Tensor, own1: Tensor, own2: Tensor) -> tuple[Tensor, Tensor]:
    root = _root_determinant(cross, own1, own2)
    # An example of zeros has no angle to others: whatever atan2 gives for it multiplies only zeros.
    rest = math.pi - torch.atan2(root, cross)
    return (root + rest * cross) / (2 * math.pi), rest / (2 * math.pi)


def _erf(cross: Tensor, own1: Tensor, own2: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.hypot((1 + 2 * (own1 + own2)).sqrt(), 2 * _root_determinant(cross, own1, own2))
    return 2 / math.pi * torch.atan2(2 * cross, r), 4 / math.pi / r


# E[φ(u) φ(v)] and E[φ'(u) φ'(v)] for Gaussian u, v of covariance `cross` and variances `own1` and `own2`.
LayerMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LAYER_MAPS: dict[str, LayerMap] = {"relu": _relu, "erf": _erf}
