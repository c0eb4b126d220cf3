"""What is measured of an NTK without forming it: by products J (Jᵀ v), some examples at a time.

    λ_i, v_i          block Krylov space, until ‖K v_i - λ_i v_i‖ is small; that is also the error bar of λ_i
    tr K              Σ_i K_ii, exactly
    Σ_c y_cᵀ K y_c    one product, exactly
    ‖K‖²              Σ_i≤k ‖K v_i‖² + ‖K P‖², P = I - V Vᵀ, the second part from random vectors

All of it runs in float64, on a copy of the model. A product with one vector costs as much as a few training steps,
whatever the structure of the model, and some hundred of them are needed.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.kernels import NTK
from pipeline.kernels.structure import structure
from pipeline.operators import BlockedNTK
from pipeline.spectra import frobenius_norm, lanczos, leading_pairs

MEMORY = 2**28  # of the graphs of one block of examples, about
EXAMPLES = 1024  # of a block at most
DIAGONAL = 64  # examples whose small kernel is formed for its diagonal
# Of each number that is captured of an example, about so many are in the two graphs of a Jacobian.
COPIES = 8
PRODUCTS = 10  # that the eigenpairs take, about: for progress


def matrix_free(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    k: int,
    tolerance: float,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> dict[str, Any]:
    """The variables of a snapshot that need no kernel in memory or on disk.

    Args:
        model: as it is at the row; left as it was.
        x: examples (n, ...).
        y: their targets (n, c), or None.
        k: eigenpairs.
        tolerance: bound on ‖K v_i - λ_i v_i‖ / λ_1.
        progress: told the share done and what is done.

    Raises:
        InputError: if k or the tolerance does not fit, or the model is none that has an NTK.
        NonFiniteKernel: if a product is not finite.
    """
    operator = products_in_float64(model, x)
    done = 0

    def product(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal done
        done += 1
        progress(1 - 0.8 ** (done / PRODUCTS), f"product {done}")
        return operator.traced(torch.from_numpy(rows).to(operator.like.device)).numpy(force=True)

    diagonal = trace(model, x)
    pairs = leading_pairs(product, len(x), k, diagonal, tolerance=tolerance)
    norm, error = frobenius_norm(product, pairs)
    values = {
        "eigenvalue": pairs.values,
        "eigenvector": pairs.vectors,
        "eigenvalue_residual": pairs.residuals,
        "solver_iterations": pairs.iterations,
        "frobenius_norm": norm,
        "frobenius_error": error,
        "trace": diagonal,
        "ntk_sharpness": sharpness(model, x, pairs.values[0]),
        "prediction": outputs(model, x),
    }
    if y is not None:
        targets = y.numpy(force=True).astype(np.float64).T
        values["target_energy"] = np.einsum("cn,cn->", targets, product(targets))
    return values


def products_in_float64(model: nn.Module, x: Tensor) -> BlockedNTK:
    """Products with the NTK of a copy of the model in float64."""
    held = structure(model, x).held
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
    exact = copy.deepcopy(model).to(device, torch.float64)
    examples = x.to(device, torch.float64 if x.is_floating_point() else x.dtype)
    return BlockedNTK(exact, examples, max(1, min(EXAMPLES, MEMORY // (8 * COPIES * max(held, 2**12)))))


def outputs(model: nn.Module, x: Tensor) -> NDArray[Any]:
    """f(x) (n, c)."""
    with torch.no_grad():
        return np.concatenate([model(few).numpy(force=True) for few in x.split(EXAMPLES)])


def trace(model: nn.Module, x: Tensor) -> float:
    """Tr K, summed over outputs."""
    kernels = (NTK(few, keep=False)(model) for few in x.split(DIAGONAL))
    return math.fsum(kernel.diagonal().double().sum().item() for kernel in kernels)


def sharpness(model: nn.Module, x: Tensor, top: float) -> float:
    """λ_1 / n of the kernel of all outputs.

    Args:
        model: as it is.
        x: examples (n, ...).
        top: λ_1 of the kernel summed over outputs, which is the same for one output.
    """
    with torch.no_grad():
        several = model(x[:1]).shape[1] > 1
    if several:
        top = lanczos(products_in_float64(model, x), tolerance=1e-6).values[0].item()
    return top / len(x)
