"""Alignment of the kernel, and of its leading eigenvectors, with the target.

    KTA  = ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖)          = yᵀKy / (‖K‖ ‖y‖²) for one output
    c_i  = Σ_c (v_iᵀ y_c)² / ‖Y‖²,          C(k) = Σ_{i≤k} c_i

K is the kernel summed over outputs and YYᵀ sums over outputs too; with one output Σ_i λ̂_i c_i = KTA over all n
modes, with several it is KTA ‖YYᵀ‖ / ‖Y‖². The centred form replaces K by P K P and Y by P Y, P = I - 11ᵀ/n: with
unbalanced labels the plain form sees their mean.

With several outputs that is one of two conventions. The other one takes the kernel of all pairs of outputs as one
nc x nc matrix and the target as one vector of length nc:

    KTA = Σ_ab y_aᵀ K_ab y_b / (‖K_full‖ ‖Y‖²),   centred: P K_ab P and P y_a, so each output by itself

They differ where outputs share parameters; with one output they are equal.

Sources: Cristianini et al. 2001 (KTA); Cortes, Mohri, Rostamizadeh 2012 (centred); Canatar, Bordelon, Pehlevan 2021
(C(k), the cumulative target power); Baratin et al. 2021 (all pairs of outputs, centred; each layer's part).
"""

import xarray as xr

from analysis import linalg
from analysis.kernels import layers
from analysis.rows import described, require
from analysis.spectra import effective_rank, normalised_eigenvalue
from pipeline.errors import InputError
from pipeline.schema import TILED


def alignment(ds: xr.Dataset) -> xr.Dataset:
    """Every measure of alignment that the dataset's variables allow; lazy, coordinates kept.

    | result | from, beside `target` |
    |---|---|
    | `kta` (row) | `target_energy`, `frobenius_norm`; `ntk` in place of those that are missing |
    | `kta_centred` (row) | `ntk` |
    | `mode_alignment`, `cumulative_alignment` (row, k) | `eigenvector` |
    | `normalised_eigenvalue` (row, k) | `eigenvalue` and `frobenius_norm` or `ntk` |
    | `effective_rank` (row) | `ntk`, of fewer than 10,000 examples: it takes all eigenvalues |

    The scalars were computed from the kernel before it was rounded for storage and cost no read of n² numbers, so
    they come first. C(k) stands at `eig` = k - 1.

    Args:
        ds: a sweep, a run, or rows chosen from one; any dimensions beside n, c and k are kept.

    Raises:
        InputError: if there is no `target`, or nothing that can be compared with it.
    """
    require(ds, "alignment", "target")
    found: dict[str, xr.DataArray] = {}
    if _has_kernel_scalars(ds):
        found["kta"] = kernel_target_alignment(ds)
    if "ntk" in ds:
        found["kta_centred"] = centred_alignment(ds)
    if "eigenvector" in ds:
        found["mode_alignment"] = mode_alignment(ds)
        found["cumulative_alignment"] = described(
            # NaN marks a row that is missing; skipping it would turn it into zero
            found["mode_alignment"].cumsum("eig", skipna=False),
            "cumulative alignment",
            "C(k) = Σ_{i≤k} c_i, at eig = k - 1; C(n) = 1.",
        )
    if "eigenvalue" in ds and ("frobenius_norm" in ds or "ntk" in ds):
        found["normalised_eigenvalue"] = normalised_eigenvalue(ds["eigenvalue"], _norm(ds))
    if "ntk" in ds and ds.sizes["sample"] < TILED:
        found["effective_rank"] = effective_rank(ds["ntk"])
    if not found:
        raise InputError(
            "alignment needs `ntk`, `eigenvector`, or `target_energy` with `frobenius_norm`; this dataset has "
            f"{', '.join(map(str, ds.data_vars))}. Open a group that has them: analysis.open_sweep(root, group=...) "
            "with snapshots (all), spectra (eigenvectors) or scalars (KTA)"
        )
    return xr.Dataset(found, attrs=ds.attrs)


def kernel_target_alignment(ds: xr.Dataset) -> xr.DataArray:
    """KTA = ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖), in [0, 1]; 1 if and only if K ∝ YYᵀ.

    Args:
        ds: `target`, and `target_energy` with `frobenius_norm`, or `ntk` in place of those that are missing.

    Returns:
        KTA (row); NaN for a kernel or a target of zeros.

    Raises:
        InputError: if a variable is missing.

    Source: Cristianini et al. 2001.
    """
    require(ds, "KTA", "target")
    if not _has_kernel_scalars(ds):
        require(ds, "KTA", "target_energy", "frobenius_norm")
    energy = ds["target_energy"] if "target_energy" in ds else linalg.quadratic_form(ds["ntk"], ds["target"])
    return described(
        linalg.ratio(energy, _norm(ds) * linalg.outer_norm(ds["target"])),
        "kernel target alignment",
        "⟨K, YYᵀ⟩ / (‖K‖_F ‖YYᵀ‖_F), K summed over outputs; yᵀKy / (‖K‖_F ‖y‖²) for one output.",
    )


def centred_alignment(ds: xr.Dataset) -> xr.DataArray:
    """⟨Kc, YcYcᵀ⟩ / (‖Kc‖ ‖YcYcᵀ‖) with Kc = P K P, Yc = P Y: linear CKA of the kernel with the labels, in [0, 1].

    Args:
        ds: `ntk` and `target`.

    Returns:
        Centred KTA (row); NaN where all labels are equal.

    Source: Cortes, Mohri, Rostamizadeh 2012; ⟨Kc, YcYcᵀ⟩ = ⟨K, YcYcᵀ⟩ since P is a projection.
    """
    require(ds, "centred KTA", "ntk", "target")
    centred = _centred_target(ds)
    return described(
        linalg.ratio(
            linalg.quadratic_form(ds["ntk"], centred),
            linalg.centred_norm(ds["ntk"]) * linalg.outer_norm(centred),
        ),
        "centred kernel target alignment",
        "⟨PKP, PYYᵀP⟩ / (‖PKP‖_F ‖PYYᵀP‖_F), P = I - 11ᵀ/n, K summed over outputs.",
    )


def layer_alignment(ds: xr.Dataset) -> xr.Dataset:
    """KTA and centred KTA of the part K_l of each trained tensor, K = Σ_l K_l.

    Unchanged by a scale of K_l, a scale of the target, and a common permutation of the examples.

    Args:
        ds: `ntk_layer` and `target`.

    Returns:
        `kta_layer` and `kta_layer_centred` (row, l), without unit; NaN for a tensor on which no output depends.

    Raises:
        InputError: if a variable is missing.

    Source: Baratin et al. 2021.
    """
    require(ds, "alignment by layer", "target", "ntk_layer")
    parts = layers(ds)
    part = "the part of one trained tensor in the place of K."
    return xr.Dataset(
        {
            "kta_layer": described(
                kernel_target_alignment(parts),
                "kernel target alignment by layer",
                f"⟨K_l, YYᵀ⟩ / (‖K_l‖_F ‖YYᵀ‖_F), {part}",
            ),
            "kta_layer_centred": described(
                centred_alignment(parts),
                "centred kernel target alignment by layer",
                f"⟨PK_lP, PYYᵀP⟩ / (‖PK_lP‖_F ‖PYYᵀP‖_F), {part}",
            ),
        },
        attrs=ds.attrs,
    )


def full_alignment(ds: xr.Dataset) -> xr.Dataset:
    """KTA and centred KTA of the kernel of all pairs of outputs, nc x nc, with the flattened target.

    Unchanged by a scale of K or of the target, a common permutation of the examples, and one orthogonal change of
    basis of the outputs of kernel and target alike.

    Args:
        ds: `ntk_full` and `target`.

    Returns:
        `kta_full` and `kta_full_centred` (row), without unit, in [0, 1]; NaN for a kernel or a (centred) target of
        zeros.

    Raises:
        InputError: if a variable is missing.

    Source: Baratin et al. 2021, whose Jacobian and targets are centred over the examples, each output by itself.
    """
    require(ds, "alignment of all outputs", "target", "ntk_full")
    kernel, centred = ds["ntk_full"], _centred_target(ds)
    return xr.Dataset(
        {
            "kta_full": described(
                linalg.ratio(
                    linalg.full_quadratic_form(kernel, ds["target"]),
                    _full_norm(kernel) * linalg.squared_norm(ds["target"]),
                ),
                "kernel target alignment of all outputs",
                "Σ_ab y_aᵀ K_ab y_b / (‖K_full‖_F ‖Y‖_F²), K_full the nc x nc kernel of all pairs of outputs.",
            ),
            "kta_full_centred": described(
                linalg.ratio(
                    linalg.full_quadratic_form(kernel, centred),
                    _full_norm(linalg.centre(kernel)) * linalg.squared_norm(centred),
                ),
                "centred kernel target alignment of all outputs",
                "The same of P K_ab P and P y_a, P = I - 11ᵀ/n.",
            ),
        },
        attrs=ds.attrs,
    )


def mode_alignment(ds: xr.Dataset) -> xr.DataArray:
    """c_i = Σ_c (v_iᵀ y_c)² / ‖Y‖², the share of the target's energy in each eigenvector.

    Args:
        ds: `eigenvector` and `target`.

    Returns:
        c (row, k); they sum to 1 over all n eigenvectors. NaN for a target of zeros.
    """
    require(ds, "mode alignment", "eigenvector", "target")
    return described(
        linalg.ratio(linalg.squared_projections(ds["eigenvector"], ds["target"]), linalg.squared_norm(ds["target"])),
        "alignment of an eigenvector with the target",
        "c_i = Σ_c (v_iᵀ y_c)² / ‖Y‖_F², modes in descending order of λ_i.",
    )


def _has_kernel_scalars(ds: xr.Dataset) -> bool:
    return "ntk" in ds or ("target_energy" in ds and "frobenius_norm" in ds)


def _norm(ds: xr.Dataset) -> xr.DataArray:
    return ds["frobenius_norm"] if "frobenius_norm" in ds else linalg.frobenius_norm(ds["ntk"])


def _full_norm(kernel: xr.DataArray) -> xr.DataArray:
    """‖K_full‖ of the kernel of all pairs of outputs."""
    squares = linalg.frobenius_product(kernel, kernel)
    return squares.sum(["output", "output2"], skipna=False) ** 0.5


def _centred_target(ds: xr.Dataset) -> xr.DataArray:
    target = ds["target"].astype("float64")
    # the mean of equal labels need not be that label to the last bit, and what is left would pass for a target
    varies = target.max("sample") > target.min("sample")
    return (target - target.mean("sample")).where(varies, 0)
