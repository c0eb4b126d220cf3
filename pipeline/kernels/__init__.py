"""Kernels of models on examples: exact, at finite and infinite width.

`NTK` evaluates the empirical kernel of a model that changes on examples that do not; `empirical_ntk` does it once, and
`BlockPairs` between blocks of many examples.
`KERNELS` holds, by name, what a study can record: each entry is called as `entry(x1, x2=None, **options)` and gives an
object that takes a model to its kernel (n1, n2).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.kernels.conjugate import ConjugateKernel
from pipeline.kernels.empirical import NTK, BlockPairs, empirical_ntk
from pipeline.kernels.infinite import infinite_kernels

__all__ = ["KERNELS", "NTK", "BlockPairs", "ConjugateKernel", "empirical_ntk", "infinite_kernels"]

Kernel = Callable[[nn.Module], Tensor]


def nngp(x1: Tensor, x2: Tensor | None = None, **options: Any) -> Kernel:
    """The NNGP of an infinitely wide network, the same for every model; options as of `infinite_kernels`."""
    kernel = infinite_kernels(x1, x2, **options).nngp
    return lambda model: kernel


def infinite_ntk(x1: Tensor, x2: Tensor | None = None, **options: Any) -> Kernel:
    """The NTK of an infinitely wide network, the same for every model; options as of `infinite_kernels`."""
    kernel = infinite_kernels(x1, x2, **options).ntk
    return lambda model: kernel


KERNELS: dict[str, Callable[..., Kernel]] = {
    "ntk": NTK,
    "weighted": NTK,  # with the option `weights`
    "conjugate": ConjugateKernel,
    "nngp": nngp,
    "infinite_ntk": infinite_ntk,
}
