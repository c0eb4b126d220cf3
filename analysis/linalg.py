"""Linear algebra on stacks of kernels: Frobenius products, centring, quadratic forms, eigenvalues.

    ⟨A, B⟩ = tr(AᵀB),   ‖A‖ = ⟨A, A⟩^(1/2),   P K P with P = I - 11ᵀ/n,   Σ_c y_cᵀ K y_c = ⟨K, YYᵀ⟩

Kernels carry the dimensions `sample` (n) and `sample2` (n), targets `sample` (n) and `output` (c), kernels of all
pairs of outputs all four; any other dimension is a stack. Dask arrays stay lazy and numpy arrays are computed at once.
Kernels are stored in float32; all sums run in float64, without a float64 copy of more than one block (pairs of kernels:
of two; eigenvalues: of one matrix). A kernel that comes in several blocks along `sample` or `sample2`, because it is
large, is summed block by block, and a task holds no more than that. Eigenvalues and eigenvectors, kernel regression,
what is taken of all pairs of outputs, and `centre` need the whole kernel, which is joined in one task.
BLAS threads are the caller's to set.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask import delayed
from numpy.typing import NDArray

Array = NDArray[np.float64]

KERNEL = ("sample", "sample2")
FULL = ("sample", "output", "sample2", "output2")
TARGET = ("sample", "output")
VECTORS = ("sample", "eig")


def frobenius_product(a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
    """⟨A, B⟩ = Σ_ij A_ij B_ij.

    Args:
        a: kernels (..., n, n).
        b: kernels (..., n, n).

    Returns:
        Float64 (...).
    """
    return _summed(_product, (a, KERNEL), (b, KERNEL))


def frobenius_norm(kernel: xr.DataArray) -> xr.DataArray:
    """‖K‖ = (Σ_ij K_ij²)^(1/2) of kernels (..., n, n), in float64 (...)."""
    return frobenius_product(kernel, kernel) ** 0.5


def centre(kernel: xr.DataArray) -> xr.DataArray:
    """P K P with P = I - 11ᵀ/n: rows and columns of kernels (..., n, n) sum to zero; float64."""
    return _on_stacks(_centre, (kernel, KERNEL), out=KERNEL)


def centred_norm(kernel: xr.DataArray) -> xr.DataArray:
    """‖P K P‖ of kernels (..., n, n), in float64 (...).

    Of a kernel in several blocks it is (‖K‖² - (‖K 1‖² + ‖Kᵀ 1‖²)/n + (1ᵀ K 1)²/n²)^(1/2), which takes one pass; its
    relative error is the rounding of float64 times ‖K‖² / ‖P K P‖².
    """
    if not in_blocks(kernel):
        return frobenius_norm(centre(kernel))
    n, rows, columns = kernel.sizes["sample"], _sums(kernel, "sample2"), _sums(kernel, "sample")
    square = frobenius_product(kernel, kernel) - ((rows**2).sum("sample", skipna=False)
                                                  + (columns**2).sum("sample2", skipna=False)) / n  # fmt: skip
    return (square + (rows.sum("sample", skipna=False) / n) ** 2) ** 0.5


def in_blocks(kernel: xr.DataArray) -> bool:
    """Whether kernels (..., n, n) are lazy and come in several blocks each."""
    return any(len(kernel.variable.chunksizes.get(dim, ())) > 1 for dim in KERNEL)


def quadratic_form(kernel: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Σ_c y_cᵀ K y_c = ⟨K, YYᵀ⟩.

    Args:
        kernel: kernels (..., n, n).
        y: one column per output (..., n, c).

    Returns:
        Float64 (...).
    """
    if not in_blocks(kernel):  # with the targets once: where they are lazy Dask would else hold kernels back for them
        return _on_stacks(_own_quadratic_form, (kernel, KERNEL), (y, TARGET))
    columns = y.rename(sample="sample2").drop_vars("sample2", errors="ignore")
    return _summed(_quadratic_form, (kernel, KERNEL), (y, TARGET), (columns, ("sample2", "output")))


def full_quadratic_form(kernel: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Σ_ab y_aᵀ K_ab y_b: the quadratic form of all pairs of outputs in the flattened target.

    Args:
        kernel: K_ab for each pair of outputs (..., n, c, n, c).
        y: one column per output (..., n, c).

    Returns:
        Float64 (...).
    """
    return _on_stacks(_full_quadratic_form, (kernel, FULL), (y, TARGET))


def gram(kernel: xr.DataArray, dim: str) -> xr.DataArray:
    """⟨K_t, K_t'⟩ of all pairs of kernels along one dimension.

    Lazy kernels are taken in their blocks along `dim`: a task holds two of them, however many there are, and reads
    those before its own again.

    Args:
        kernel: kernels (..., s, n, n), s along `dim`.
        dim: the dimension whose pairs are taken.

    Returns:
        Float64 (..., s, s) along `dim` and the new dimension `other`; symmetric.
    """
    kernel = kernel.transpose(..., dim, *KERNEL)
    products = _lazy_gram(kernel.data) if isinstance(kernel.data, da.Array) else _products(kernel.data, kernel.data)
    return xr.DataArray(products, dims=(*kernel.dims[:-2], "other"))


def centred_gram(kernel: xr.DataArray, dim: str) -> xr.DataArray:
    """⟨P K_t P, P K_t' P⟩ of all pairs of kernels along one dimension, as `gram`.

    Of kernels in several blocks each it is
    ⟨K_t, K_t'⟩ - (K_t 1 · K_t' 1 + K_tᵀ 1 · K_t'ᵀ 1)/n + (1ᵀ K_t 1)(1ᵀ K_t' 1)/n².
    """
    if not in_blocks(kernel):
        return gram(centre(kernel), dim)
    n, rows, columns = kernel.sizes["sample"], _sums(kernel, "sample2"), _sums(kernel, "sample")
    total = rows.sum("sample", skipna=False) / n
    other = {dim: "other"}
    means = xr.dot(rows, rows.rename(other), dim="sample") + xr.dot(columns, columns.rename(other), dim="sample2")
    return gram(kernel, dim) - means / n + total * total.rename(other)


def squared_projections(vectors: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Σ_c (v_iᵀ y_c)², the energy of the targets along each vector.

    Args:
        vectors: v_i as columns (..., n, k).
        y: one column per output (..., n, c).

    Returns:
        Float64 (..., k).
    """
    return _on_stacks(_squared_projections, (vectors, VECTORS), (y, TARGET), out=("eig",))


def subspace_overlaps(vectors: xr.DataArray, others: xr.DataArray) -> xr.DataArray:
    """‖V_kᵀ W_k‖² / k of the first k columns of V and of W, for every k.

    Args:
        vectors: orthonormal columns (..., n, k).
        others: orthonormal columns (..., n, k).

    Returns:
        Float64 (..., k), the one of the first k columns at `eig` = k - 1.
    """
    return _on_stacks(_subspace_overlaps, (vectors, VECTORS), (others, VECTORS), out=("eig",))


def squared_norm(y: xr.DataArray) -> xr.DataArray:
    """‖Y‖² = Σ_ic y_ic² of targets (..., n, c), in float64 (...)."""
    return _on_stacks(_once_if_repeated(lambda y: np.einsum("...ic,...ic->...", y, y, dtype=np.float64)), (y, TARGET))


def outer_norm(y: xr.DataArray) -> xr.DataArray:
    """‖YYᵀ‖ = ‖YᵀY‖ of targets (..., n, c), from the small c x c product, in float64 (...)."""
    return _on_stacks(_once_if_repeated(_outer_norm), (y, TARGET))


def eigenvalues(kernel: xr.DataArray) -> xr.DataArray:
    """All eigenvalues of symmetric kernels (..., n, n), descending along the new dimension `mode` (..., n).

    A kernel with a value that is not finite never meets the eigensolver: its eigenvalues are NaN.
    """
    return _on_stacks(_eigenvalues, (kernel, KERNEL), out=("mode",), sizes={"mode": kernel.sizes["sample"]})


def eigenvectors(kernel: xr.DataArray) -> xr.DataArray:
    """All eigenvectors of symmetric kernels (..., n, n), of descending eigenvalues, as columns (..., n, n) along `eig`.

    A kernel with a value that is not finite never meets the eigensolver: its eigenvectors are NaN.
    """
    return _on_stacks(_eigenvectors, (kernel, KERNEL), out=VECTORS, sizes={"eig": kernel.sizes["sample"]})


def kernel_regression(kernel: xr.DataArray, cross: xr.DataArray, y: xr.DataArray, ridge: float) -> xr.DataArray:
    """K_cross (K + ridge I)⁺ Y, without what rounding makes of the small eigenvalues.

    Eigenvalues of K + ridge I up to n ε times the largest one count as 0, ε being that of the dtype of the kernels.

    Args:
        kernel: K (..., n, n), symmetric.
        cross: K_cross (..., m, n), along `test_sample` and `sample`.
        y: one column per output (..., n, c).
        ridge: at least 0.

    Returns:
        Float64 (..., m, c); NaN where a kernel is not finite.
    """
    return _on_stacks(
        partial(_kernel_regression, ridge=ridge),
        (kernel, KERNEL),
        (cross, ("test_sample", "sample")),
        (y, TARGET),
        out=("test_sample", "output"),
    )


def ratio(numerator: xr.DataArray, denominator: xr.DataArray) -> xr.DataArray:
    """The quotient, NaN where the denominator is not positive."""
    return numerator / denominator.where(denominator > 0)


def _sums(kernel: xr.DataArray, dim: str) -> xr.DataArray:
    return xr.DataArray(kernel.variable).sum(dim, dtype=np.float64, skipna=False)


def _summed(function: Callable[..., Array], *operands: tuple[xr.DataArray, Sequence[str]]) -> xr.DataArray:
    """Apply a function that is a sum over i and j: where arrays come in several blocks, to each, and add these up."""
    if not any(in_blocks(array) for array, core in operands if core == KERNEL):
        return _on_stacks(function, *operands)
    return xr.apply_ufunc(
        partial(_sum_of_blocks, function, [core for _, core in operands]),
        *(array for array, _ in operands),
        input_core_dims=[list(core) for _, core in operands],
        dask="allowed",
    )


def _sum_of_blocks(function: Callable[..., Array], cores: Sequence[Sequence[str]], *arrays: da.Array) -> da.Array:
    ranks = [array.ndim - len(core) for array, core in zip(arrays, cores, strict=True)]
    stack = [f"stack{axis}" for axis in range(max(ranks))]
    labelled = [
        (array, (*stack[len(stack) - rank :], *core)) for array, rank, core in zip(arrays, ranks, cores, strict=True)
    ]
    blocks = da.blockwise(
        partial(_of_block, function),
        (*stack, *KERNEL),
        *itertools.chain(*labelled),
        adjust_chunks=dict.fromkeys(KERNEL, 1),
        concatenate=True,
        meta=np.empty((0,) * (len(stack) + 2)),
    )
    return blocks.sum(axis=(-2, -1))


def _of_block(function: Callable[..., Array], *parts: NDArray[Any]) -> Array:
    return function(*parts)[..., None, None]


def _on_stacks(
    function: Callable[..., Array],
    *operands: tuple[xr.DataArray, Sequence[str]],
    out: Sequence[str] = (),
    sizes: dict[str, int] | None = None,
) -> xr.DataArray:
    """Apply a function of numpy stacks (..., core dims) to labelled arrays, block by block where they are lazy."""
    return xr.apply_ufunc(
        function,
        *(array for array, _ in operands),
        input_core_dims=[list(core) for _, core in operands],
        output_core_dims=[list(out)],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"allow_rechunk": True, "output_sizes": sizes or {}},
    )


def _once_if_repeated(function: Callable[[NDArray[Any]], Array]) -> Callable[[NDArray[Any]], Array]:
    """Evaluate once where a block repeats one array along its rows, as the targets of a run do for every step."""

    def once(stack: NDArray[Any]) -> Array:
        if stack.ndim == 3 and len(stack) > 1 and stack.strides[0] == 0:
            return np.repeat(function(stack[:1]), len(stack), axis=0)
        return function(stack)

    return once


def _centre(kernel: NDArray[Any]) -> Array:
    centred = kernel.astype(np.float64)
    centred -= centred.mean(axis=-2, keepdims=True)
    centred -= centred.mean(axis=-1, keepdims=True)
    return centred


def _product(a: NDArray[Any], b: NDArray[Any]) -> Array:
    return np.einsum("...ij,...ij->...", a, b, dtype=np.float64)


def _quadratic_form(kernel: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> Array:
    """Σ_c Σ_ij rows_ic K_ij columns_jc of a kernel (..., n, n), or of a block of it and the targets of its examples."""
    image = np.einsum("...ij,...jc->...ic", kernel, columns, dtype=np.float64)
    return np.einsum("...ic,...ic->...", image, rows, dtype=np.float64)


def _own_quadratic_form(kernel: NDArray[Any], y: NDArray[Any]) -> Array:
    return _quadratic_form(kernel, y, y)


def _full_quadratic_form(kernel: NDArray[Any], y: NDArray[Any]) -> Array:
    flat = (*y.shape[:-2], -1, 1)
    size = y.shape[-2] * y.shape[-1]
    return _quadratic_form(kernel.reshape(*kernel.shape[:-4], size, size), y.reshape(flat), y.reshape(flat))


def _lazy_gram(kernels: da.Array) -> da.Array:
    *stack, size, _, _ = kernels.shape
    kernels = kernels.rechunk({axis: -1 for axis in range(len(stack))})
    lower = [
        da.from_delayed(delayed(partial(_products_up_to, kernels, i), pure=True)(), (*stack, length, size), np.float64)
        for i, length in enumerate(kernels.chunks[-3])
    ]
    return da.concatenate(lower, axis=-2).rechunk(-1).map_blocks(_symmetric, dtype=np.float64)


def _products_up_to(kernels: da.Array, i: int) -> Array:
    """Products of the kernels of block i with those of all blocks up to it (..., b, s); 0 for later ones.

    The blocks are computed here instead of being tasks of their own, whose results would stay in memory until the last
    pair is done: in the end all of them.
    """
    found = np.zeros((*kernels.shape[:-3], kernels.chunks[-3][i], kernels.shape[-3]))
    ends = np.cumsum(kernels.chunks[-3])
    for row, column in np.ndindex(*kernels.numblocks[-2:]):
        own = kernels.blocks[..., i, row, column].compute(scheduler="sync")
        for j in range(i + 1):
            other = own if j == i else kernels.blocks[..., j, row, column].compute(scheduler="sync")
            found[..., ends[j] - other.shape[-3] : ends[j]] += _products(own, other)
    return found


def _symmetric(lower: Array) -> Array:
    return np.tril(lower) + np.tril(lower, -1).swapaxes(-2, -1)


def _products(a: NDArray[Any], b: NDArray[Any]) -> Array:
    a, b = (stack.reshape(*stack.shape[:-2], -1).astype(np.float64) for stack in (a, b))
    return a @ b.swapaxes(-2, -1)


def _subspace_overlaps(vectors: NDArray[Any], others: NDArray[Any]) -> Array:
    overlap = np.einsum("...ni,...nj->...ij", vectors, others, dtype=np.float64) ** 2
    leading = np.diagonal(overlap.cumsum(axis=-2).cumsum(axis=-1), axis1=-2, axis2=-1)
    return leading / np.arange(1, leading.shape[-1] + 1)


def _squared_projections(vectors: NDArray[Any], y: NDArray[Any]) -> Array:
    return (np.einsum("...nk,...nc->...kc", vectors, y, dtype=np.float64) ** 2).sum(axis=-1)


def _outer_norm(y: NDArray[Any]) -> Array:
    gram = np.einsum("...ic,...id->...cd", y, y, dtype=np.float64)
    return np.sqrt((gram**2).sum(axis=(-2, -1)))


def _eigenvalues(kernel: NDArray[Any]) -> Array:
    values = np.full(kernel.shape[:-1], np.nan)
    for row in np.ndindex(*kernel.shape[:-2]):
        if np.isfinite(kernel[row]).all():
            values[row] = np.linalg.eigvalsh(kernel[row].astype(np.float64))[::-1]
    return values


def _eigenvectors(kernel: NDArray[Any]) -> Array:
    vectors = np.full(kernel.shape, np.nan)
    for row in np.ndindex(*kernel.shape[:-2]):
        if np.isfinite(kernel[row]).all():
            vectors[row] = np.linalg.eigh(kernel[row].astype(np.float64))[1][:, ::-1]
    return vectors


def _kernel_regression(kernel: NDArray[Any], cross: NDArray[Any], y: NDArray[Any], ridge: float) -> Array:
    unknown = kernel.shape[-1] * np.finfo(kernel.dtype).eps
    result = np.full((*cross.shape[:-1], y.shape[-1]), np.nan)
    for row in np.ndindex(*kernel.shape[:-2]):
        if np.isfinite(kernel[row]).all() and np.isfinite(cross[row]).all():
            values, vectors = np.linalg.eigh(kernel[row].astype(np.float64))
            values = values + ridge
            known = values > unknown * values[-1]
            leading = vectors[:, known]
            result[row] = cross[row] @ (leading @ ((leading.T @ y[row]) / values[known, None]))
    return result
