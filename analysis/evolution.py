"""The measures of how a kernel evolves: what each needs, its formula and source, and those that are numbers per row.

This registry is what the result `evolution` of a run is made of, and with it the table `measures` of the catalogue; the
page docs/measures.md lists it (`python -m analysis.evolution` prints that part of the page). A measure is one public
function of `analysis`, `f(ds) -> ds`, and one entry here under its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING

import analysis
from analysis.tables import LEADING
from pipeline.store import Run

if TYPE_CHECKING:  # imported where something is computed: `results` reads this registry too
    import xarray as xr


@dataclass(frozen=True)
class Measure:
    """A measure.

    Attributes:
        needs: variables of the store without which there is no value.
        formula: what it is, in the letters of `pipeline.schema`.
        source: who introduced it.
        groups: groups of the store at whose common rows it is tabulated; none for what is not a few numbers per row.
        columns: results that are tabulated.
    """

    needs: tuple[str, ...]
    formula: str
    source: str
    groups: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


MEASURES = {
    "layer_alignment": Measure(
        ("target", "ntk_layer"),
        "KTA and centred KTA of K_l, the part of one trained tensor",
        "Baratin et al. 2021",
        ("snapshots",),
        ("kta_layer", "kta_layer_centred"),
    ),
    "full_alignment": Measure(
        ("target", "ntk_full"),
        "Σ_ab y_aᵀ K_ab y_b / (‖K_full‖ ‖Y‖²), K_full of all pairs of outputs; centred: of P K_ab P and P y_a",
        "Baratin et al. 2021",
        ("snapshots",),
        ("kta_full", "kta_full_centred"),
    ),
    "trace_ratio": Measure(
        ("eigenvalue", "trace"),
        "T_k = Σ_{i≤k} λ_i / tr K",
        "Baratin et al. 2021",
        ("spectra", "scalars"),
        ("trace_ratio",),
    ),
    "top_mass": Measure(
        ("eigenvalue", "frobenius_norm"),
        "Σ_{i≤k} λ_i² / ‖K‖²",
        "Tsilivis, Kempe 2022",
        ("spectra", "scalars"),
        ("top_mass",),
    ),
    "energy": Measure(
        ("target", "target_energy"),
        "Σ_c y_cᵀ K y_c / ‖Y‖²",
        "Ortiz-Jimenez, Moosavi-Dezfooli, Frossard 2021",
        ("scalars",),
        ("energy",),
    ),
    "eigenspace": Measure(
        ("eigenvector", "prediction", "target"),
        "‖V_kᵀ f‖² / ‖f‖² of the prediction f, and of the residual f - y",
        "Kopitkov, Indelman 2020",
        ("spectra",),
        ("prediction_in_eigenspace", "residual_in_eigenspace"),
    ),
    "eigenspace_overlap": Measure(
        ("eigenvector",),
        "‖V_k(t)ᵀ V_k(t')‖² / k, t' the following, the first, the last row of the run",
        "after Fort et al. 2020",
        ("spectra",),
        ("overlap_following", "overlap_first", "overlap_last"),
    ),
    "kernel_distance": Measure(
        ("ntk",),
        "S(t, t') = 1 - ⟨K_t, K_t'⟩ / (‖K_t‖ ‖K_t'‖), all pairs of rows of a run",
        "Fort et al. 2020",
    ),
    "cka": Measure(
        ("ntk",),
        "⟨P K_t P, P K_t' P⟩ / (‖P K_t P‖ ‖P K_t' P‖), all pairs of rows of a run",
        "Kornblith et al. 2019",
    ),
    "kernel_velocity": Measure(
        ("ntk", "learning_rate"),
        "S(t, t + dt) / dt to the following row, per step; and per unit of the flow time η dt",
        "Fort et al. 2020",
        ("snapshots",),
        ("kernel_velocity", "kernel_velocity_flow"),
    ),
    "polar": Measure(
        ("ntk",),
        "‖K_t - K_0‖; the same over ‖K_0‖; arccos(⟨K_t, K_0⟩ / (‖K_t‖ ‖K_0‖))",
        "Tsilivis, Kempe 2022",
        ("snapshots",),
        ("radius", "relative_radius", "angle"),
    ),
    "specialisation": Measure(
        ("ntk_full", "target"),
        "A_cc / mean_{c'≠c} A_cc', A_cc' = y_c'ᵀ K_cc y_c' / (‖K_cc‖ ‖y_c'‖²)",
        "Shan, Bordelon 2021",
        ("snapshots",),
        ("specialisation",),
    ),
    "sharpness_gap": Measure(
        ("hessian_eigenvalue", "ntk_sharpness"),
        "λ_1(H); λ_1(H) - λ_1(K)/n",
        "Cohen et al. 2021",
        ("hessian", "scalars"),
        ("hessian_sharpness", "sharpness_gap"),
    ),
    "held_out_alignment": Measure(
        ("ntk_test", "prediction_test", "test_target"),
        "KTA, centred KTA and C(k) of K_test and Y_test, of held-out examples",
        "Cristianini et al. 2001; Canatar, Bordelon, Pehlevan 2021",
        ("snapshots",),
        ("kta_test", "kta_centred_test", "cumulative_alignment_test"),
    ),
    "held_out_error": Measure(
        ("prediction_test", "test_target"),
        "‖f - Y‖² / 2m on the m held-out examples; the share of them classified wrong",
        "standard",
        ("snapshots",),
        ("test_squared_error", "test_error_rate"),
    ),
    "kernel_regression": Measure(
        ("ntk", "ntk_cross", "target", "prediction_test", "test_target"),
        "errors of f_K = K_cross K⁺ Y on the held-out examples; its correlation with f, ‖f_K - f‖ / ‖f‖, and the share "
        "of the examples that both put in one class",
        "Atanasov, Bordelon, Pehlevan 2021",
        ("snapshots",),
        (
            "regression_squared_error",
            "regression_error_rate",
            "regression_correlation",
            "regression_distance",
            "regression_agreement",
        ),
    ),
    "complexity": Measure(
        ("parameter", "trace"),
        "‖θ_t - θ_0‖; Σ_{u<t} ‖θ_{u+1} - θ_u‖ sqrt(tr K_u)",
        "Baratin et al. 2021",
        ("snapshots",),
        ("parameter_distance", "path_length"),
    ),
}


def evolution(run: Run) -> "Iterator[tuple[xr.Dataset, dict[str, xr.DataArray]]]":
    """Every tabulated measure of a run that its variables allow, lazy but where a group is a single block.

    Yields:
        For each set of groups that share a row: these rows, and the columns measured on them, (s,) each.
    """
    import xarray as xr

    from analysis.load import BLOCK_BYTES, open_runs
    from analysis.rows import join

    tabulated = {name: measure for name, measure in MEASURES.items() if measure.groups}
    # Without the index of a sweep: of a single run it says nothing, and to align it takes longer than many a measure.
    opened = {
        group: open_runs([run], group).reset_index("snapshot")
        for group in dict.fromkeys(chain(*(measure.groups for measure in tabulated.values())))
        if run.lengths.get(group)
    }
    for ds in opened.values():
        if ds.nbytes <= BLOCK_BYTES:  # one block: to plan its tasks takes longer than to compute it
            ds.load()
    for groups in dict.fromkeys(measure.groups for measure in tabulated.values()):
        steps = [set(opened[group]["step"].values) if group in opened else set() for group in groups]
        if not set.intersection(*steps):
            continue
        ds = reduce(join, [opened[group] for group in groups])
        columns: dict[str, xr.DataArray] = {}
        for name, measure in tabulated.items():
            if measure.groups == groups and all(needed in ds.variables for needed in measure.needs):
                found = getattr(analysis, name)(ds)
                for column in measure.columns:
                    columns |= _per_row(column, found[column] if isinstance(found, xr.Dataset) else found)
        yield ds, columns


def _per_row(name: str, array: "xr.DataArray") -> "dict[str, xr.DataArray]":
    """Columns of one number per row: the value itself, the first k modes, or one per tensor or output."""
    along = [str(dim) for dim in array.dims if dim != "snapshot"]
    if not along:
        return {name: array}
    (dim,) = along
    size = array.sizes[dim]
    if dim == "eig":
        return {f"{name}_{k}": array.isel(eig=k - 1) for k in LEADING if k <= size}
    labels = array[dim].values if dim in array.coords else range(1, size + 1)
    return {f"{name}_{label}": array.isel({dim: i}) for i, label in enumerate(labels)}


def reference() -> str:
    """The part of docs/measures.md that lists every entry."""
    lines = ["| function | formula | needs | in the table `measures` | source |", "|---|---|---|---|---|"]
    for name, measure in MEASURES.items():
        needs, columns = (", ".join(f"`{one}`" for one in many) for many in (measure.needs, measure.columns))
        lines.append(f"| `{name}` | {measure.formula} | {needs} | {columns} | {measure.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
