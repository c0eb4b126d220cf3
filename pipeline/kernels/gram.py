"""Products of gradients, added to a kernel tile by tile.

On the CPU, in one thread, they go through numpy and scipy, whose BLAS forms Gram matrices in half the time that torch's
needs; the arrays share the tensors' memory. With more threads products are torch's, whose threads are at work here
anyhow: two pools that wait for each other by spinning cost more than they save. Of a symmetric kernel only the lower
triangle is computed, and mirrored at the end.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk
from threadpoolctl import ThreadpoolController
from torch import Tensor

TILE = 384  # rows: enough for fast products, few enough that little above the diagonal is computed
GRAM_TILE = 128  # the same for sums over so many columns that the product is fast with fewer rows
PAIR_BYTES = 16 * 2**20  # of the products of all pairs of positions of a tile


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A bᵀ (m, n) of (m, d) and (n, d)."""
    if a.device.type != "cpu" or torch.get_num_threads() > 1:
        return torch.mm(a, b.T, out=out)
    # The kernel of a diverged model overflows; whoever asked for it looks whether it is finite.
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.matmul(a.numpy(), b.numpy().T, out=None if out is None else out.numpy())
    return torch.from_numpy(result) if out is None else out


def add_gram(kernel: Tensor, one: Tensor, two: Tensor, scale: float = 1.0) -> None:
    """K += scale · G Hᵀ; of the lower triangle alone where G is H.

    Args:
        kernel: (m, n), changed.
        one: G (m, q), contiguous.
        two: H (n, q), contiguous.
        scale: factor.
    """
    if kernel.device.type != "cpu" or torch.get_num_threads() > 1:
        for rows, columns in tiles(len(one), len(two), two is one, GRAM_TILE):
            kernel[rows, columns].addmm_(one[rows], two[columns].T, alpha=scale)
        return
    if two is not one:
        kernel.add_(product(one, two), alpha=scale)
        return
    # f2py takes Fortran order without a copy: the transposes are in it, and their upper triangle is our lower one.
    rank_k = ssyrk if kernel.dtype == torch.float32 else dsyrk
    target = kernel.numpy().T
    result = rank_k(scale, one.numpy().T, beta=1.0, c=target, trans=1, lower=0, overwrite_c=1)
    if not np.shares_memory(result, target):
        target[...] = result


def tiles(m: int, n: int, lower: bool, step: int) -> Iterator[tuple[slice, slice]]:
    """Bands of rows and the columns that they need: all, or those up to the diagonal."""
    for start in range(0, m, step):
        rows = slice(start, min(m, start + step))
        yield rows, slice(0, rows.stop if lower else n)


def add_hadamard(kernel: Tensor, inputs: "Tensor | tuple[Tensor, Tensor]", b1: Tensor, b2: Tensor, c: int) -> None:
    """K += (A A'ᵀ) ∘ (B B'ᵀ), of one position per example.

    Args:
        kernel: (m c, n c), changed; of the lower triangle alone where b1 is b2.
        inputs: A (m, d) and A' (n, d), or their product (m, n).
        b1: B (m c, e).
        b2: B' (n c, e).
        c: rows of B per row of A.
    """
    lower = b2 is b1
    m, n = (len(b1) // c, len(b2) // c)
    step = max(1, TILE // c)
    buffers = [b1.new_empty(step * n), b1.new_empty(step * c * n * c)]
    for rows, columns in tiles(m, n, lower, step):
        height, width = rows.stop - rows.start, columns.stop
        q = buffers[1][: height * c * width * c].view(height * c, width * c)
        product(b1[rows.start * c : rows.stop * c], b2[: width * c], q)
        if isinstance(inputs, Tensor):
            p = inputs[rows, columns]
        else:
            p = product(inputs[0][rows], inputs[1][columns], buffers[0][: height * width].view(height, width))
        if c > 1:
            p = p.repeat_interleave(c, dim=1)  # an inner loop of c numbers would be a slow one
        q.view(height, c, width * c).mul_(p[:, None])
        kernel[rows.start * c : rows.stop * c, : width * c] += q


def add_diagonal(kernel: Tensor, a1: Tensor, a2: Tensor, c: int) -> None:
    """K[(i, a), (j, a)] += (A A'ᵀ)_ij for each of c outputs: the model's last linear map has the identity as B.

    Args:
        kernel: (m c, n c), changed; of the lower triangle alone where a1 is a2.
        a1: A (m, d).
        a2: A' (n, d).
        c: outputs.
    """
    m, n = len(a1), len(a2)
    diagonal = kernel.view(m, c, n, c).diagonal(dim1=1, dim2=3)  # (m, n, c)
    for rows, columns in tiles(m, n, a2 is a1, TILE):
        diagonal[rows, columns] += product(a1[rows], a2[columns])[:, :, None]


def add_pairs(kernel: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> None:
    """K_ij += Σ_ts (A_it · A'_js) (B_it · B'_js): all pairs of T positions of two examples.

    Args:
        kernel: (m c, n c), changed; of the lower triangle alone where b1 is b2.
        a1: A (m, T, d).
        a2: A' (n, T, d).
        b1: B (m, c, T, e).
        b2: B' (n, c, T, e).
    """
    (m, t, d), n, c = a1.shape, len(a2), b1.shape[1]
    step = max(1, PAIR_BYTES // (n * (c * t) ** 2 * a1.element_size()))
    for rows, columns in tiles(m, n, b2 is b1, step):
        height, width = rows.stop - rows.start, columns.stop
        p = product(a1[rows].reshape(-1, d), a2[columns].reshape(-1, d)).view(height, 1, t, width, 1, t)
        q = product(b1[rows].reshape(height * c * t, -1), b2[columns].reshape(width * c * t, -1))
        q = q.view(height, c, t, width, c, t).mul_(p)
        kernel[rows.start * c : rows.stop * c, : width * c] += q.sum((2, 5)).view(height * c, width * c)


def mirror(kernel: Tensor) -> None:
    """Copy the lower triangle to the upper one, in blocks that fit in the cache."""
    n = len(kernel)
    for start in range(0, n, TILE):
        rows = slice(start, min(n, start + TILE))
        square = kernel[rows, rows]
        square.copy_(square.tril() + square.tril(-1).T)
        kernel[:start, rows] = kernel[rows, :start].T


@functools.cache
def _pools() -> ThreadpoolController:
    """The thread pools of BLAS, found once: looking for them takes longer than a small kernel."""
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold numpy's and scipy's BLAS to one thread."""
    with _pools().limit(limits=1, user_api="blas"):
        yield
