"""The contract between the two stages: groups, variables, dimensions, dtypes and units of a run's store.

Letters of the dimensions, the same in code, docstrings and stores:

    n  probe examples   `sample`, `sample2`      k  eigenpairs         `eig`; of the Hessian `hessian_eig`
    c  outputs          `output`, `output2`      s  rows               `step` in a run, `snapshot` in a sweep
    p  parameters       `parameter_index`        l  trained tensors    `layer`
    m  held-out examples `test_sample`, `test_sample2`
    t  training examples of a replayed run, whose own are the probe's    `train_sample`

Symbols: f(θ) in R^(n x c) the outputs on the probe, y the targets, J the Jacobian of f, K = J Jᵀ the neural tangent
kernel (for several outputs the sum over outputs of K_cc), η the learning rate, L the loss, (1/2n) ‖f - y‖² unless the
study says otherwise, and H its Hessian ∂²L/∂θ².

`GROUPS` is what every run has, but for the group `hessian`. A study may ask for more, which `variables_of` describes:
the parts of the kernel by tensor, all its pairs of outputs, a held-out probe, and other kernels, whose variables are
those of the NTK with the kernel's name in front. A process other than the steps of an update rule has columns of its
own in `train`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

FORMAT_VERSION = 1
CONVENTIONS = "CF-1.11 NTK-EOS-1"

# Rows that share a chunk. Small arrays share chunks, which are replaced whole at each commit.
TRAIN_ROWS, SCALAR_ROWS, EIGENVALUE_ROWS = 4096, 1024, 64
BAND_BYTES = 16 * 2**20
# From this n on a kernel is stored in square tiles of this side, and `ntk-eos kernel` computes it tile by tile.
TILED, TILE = 10_000, 2048


@dataclass(frozen=True)
class Variable:
    """One array of a group.

    Attributes:
        name: as in the store.
        dims: dimension names; the first is `step` in growing groups.
        dtype: numpy dtype, or "model" for the dtype of the model's parameters.
        units: UDUNITS string, "1" if dimensionless.
        long_name: a few words for an axis label.
        description: the defining equation and what one needs to read it.
        rows_per_chunk: rows that share a chunk; None where a row owns its chunks.
        volatile: not part of the run's identity, so left out of digests (times, costs).
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    long_name: str
    description: str
    rows_per_chunk: int | None = SCALAR_ROWS
    volatile: bool = False


def _by_name(variables: Iterable[Variable]) -> dict[str, Variable]:
    return {variable.name: variable for variable in variables}


# Every growing group has these four beside its own variables; `digest` closes each row.
ROW = _by_name([
    Variable("step", ("step",), "int64", "1", "step", "Number of updates made before this row was measured."),
    Variable("learning_rate", ("step",), "float64", "1", "learning rate", "Step size η of the run."),
    Variable("seed", ("step",), "int64", "1", "seed", "Seed of data, initialisation and order."),
    Variable("loss", ("step",), "float64", "1", "loss", "Training loss L at this step."),
])  # fmt: skip
DIGEST = Variable(
    "digest", ("step", "byte"), "uint8", "1", "row digest",
    "blake2b-128 over (group, name, dtype, shape, little-endian bytes) of the row's variables in schema order.",
    volatile=True,  # a digest does not cover itself
)  # fmt: skip

SCALARS = _by_name([
    Variable(
        "ntk_sharpness", ("step",), "float64", "1", "NTK sharpness",
        "λ₁/n, the top eigenvalue of the full nc x nc kernel over n. For L = (1/2n) ‖f - y‖² it is the sharpness but "
        "for the curvature of f, and the line of gradient descent is 2/η.",
    ),
    Variable("frobenius_norm", ("step",), "float64", "1", "Frobenius norm of the NTK", "‖K‖_F."),
    Variable("trace", ("step",), "float64", "1", "trace of the NTK", "tr K."),
    Variable("target_energy", ("step",), "float64", "1", "target energy", "Σ_c y_cᵀ K y_c."),
])  # fmt: skip

SPECTRA = _by_name([
    Variable(
        "eigenvalue", ("step", "eig"), "float64", "1", "NTK eigenvalue",
        "λ_i of K, descending, computed in float64 from the kernel before it is rounded for storage.",
        rows_per_chunk=EIGENVALUE_ROWS,
    ),
    Variable(
        "eigenvector", ("step", "sample", "eig"), "float32", "1", "NTK eigenvector",
        "v_i of K, unit length, its component of largest modulus positive.", rows_per_chunk=None,
    ),
    Variable(
        "eigenvalue_residual", ("step", "eig"), "float64", "1", "residual of an NTK eigenpair",
        "‖K v_i - λ_i v_i‖ as the eigensolver left it: some eigenvalue lies within this of λ_i.",
        rows_per_chunk=EIGENVALUE_ROWS,
    ),
    Variable(
        "solver_iterations", ("step",), "int64", "1", "iterations of the eigensolver",
        "Products of K with a block of vectors; 0 where LAPACK found the pairs.",
    ),
    Variable(
        "prediction", ("step", "sample", "output"), "model", "1", "network output", "f(θ) on the probe.",
        rows_per_chunk=None,
    ),
])  # fmt: skip

KERNELS = _by_name([
    Variable(
        "ntk", ("step", "sample", "sample2"), "float32", "1", "neural tangent kernel",
        "K = J Jᵀ on the probe, summed over outputs.", rows_per_chunk=None,
    ),
    Variable(
        "parameter", ("step", "parameter_index"), "model", "1", "parameters",
        "θ flattened; names and shapes of the tensors are in the attributes `names` and `shapes`.",
        rows_per_chunk=None,
    ),
])  # fmt: skip

# What a run has only if its study asks for it.
ON_REQUEST = _by_name([
    Variable(
        "ntk_layer", ("step", "layer", "sample", "sample2"), "float32", "1", "part of the NTK by tensor",
        "J_l J_lᵀ on the probe, summed over outputs, of each trained tensor θ_l; their sum is `ntk`. The names of the "
        "tensors are in the attribute `names`.",
        rows_per_chunk=None,
    ),
    Variable(
        "ntk_full", ("step", "sample", "output", "sample2", "output2"), "float32", "1", "NTK of all outputs",
        "K_ab on the probe for each pair of outputs; the sum over a = b is `ntk`.", rows_per_chunk=None,
    ),
    Variable(
        "ntk_train_cross", ("step", "sample", "train_sample"), "float32", "1",
        "NTK of the probe and the training examples",
        "J J_trainᵀ, summed over outputs; of a replayed run, whose probe is not the training set.",
        rows_per_chunk=None,
    ),
    Variable(
        "frobenius_error", ("step",), "float64", "1", "standard error of the Frobenius norm",
        "Of `frobenius_norm`; of a replayed run whose kernel was never formed, so that the norm is an estimate.",
    ),
])  # fmt: skip

# What is measured on held-out examples, if there are any; `snapshots` has these scalars too.
TEST_SCALARS = _by_name([
    Variable("test_loss", ("step",), "float64", "1", "held-out loss", "The loss L on the held-out examples."),
    Variable(
        "test_accuracy", ("step",), "float64", "1", "held-out accuracy",
        "Share of the held-out examples classified right.",
    ),
])  # fmt: skip
TEST_KERNELS = _by_name([
    Variable(
        "ntk_test", ("step", "test_sample", "test_sample2"), "float32", "1", "NTK of the held-out examples",
        "J_test J_testᵀ, summed over outputs.", rows_per_chunk=None,
    ),
    Variable(
        "ntk_cross", ("step", "test_sample", "sample"), "float32", "1", "NTK of the held-out and the probe's examples",
        "J_test Jᵀ, summed over outputs.", rows_per_chunk=None,
    ),
])  # fmt: skip
HELD_OUT = TEST_KERNELS | TEST_SCALARS | _by_name([
    Variable(
        "prediction_test", ("step", "test_sample", "output"), "model", "1", "network output on the held-out examples",
        "f(θ) on the held-out examples.", rows_per_chunk=None,
    ),
])  # fmt: skip

HESSIAN = _by_name([
    Variable(
        "hessian_eigenvalue", ("step", "hessian_eig"), "float64", "1", "Hessian eigenvalue",
        "The largest eigenvalues of H, descending; the first is the sharpness, whose line of gradient descent is 2/η.",
        rows_per_chunk=EIGENVALUE_ROWS,
    ),
    Variable(
        "hessian_residual", ("step", "hessian_eig"), "float64", "1", "residual of a Hessian eigenpair",
        "‖H u_i - λ_i u_i‖ as the eigensolver left it.", rows_per_chunk=EIGENVALUE_ROWS,
    ),
    Variable(
        "hessian_products", ("step",), "int64", "1", "products with the Hessian",
        "How often the eigensolver applied H.",
    ),
])  # fmt: skip

# What `hessian` has beside that where the update rule has a preconditioner.
PRECONDITIONED = _by_name([
    Variable(
        "preconditioned_sharpness", ("step",), "float64", "1", "preconditioned sharpness",
        "The largest eigenvalue of P^(-1/2) H P^(-1/2), P the diagonal by which the step from here divides; its line "
        "is the run's attribute `preconditioned_stability_line`.",
    ),
])  # fmt: skip

TRAIN = _by_name([
    Variable("loss", ("step",), "float64", "1", "loss", "Training loss L at this step."),
    Variable("accuracy", ("step",), "float64", "1", "accuracy", "Share of examples classified right."),
    Variable("grad_norm", ("step",), "float64", "1", "gradient norm", "‖∇L(θ)‖₂."),
    Variable(
        "wall_time", ("step",), "float64", "s", "wall time", "Seconds of this process since it took up the run.",
        volatile=True,
    ),
    *(
        Variable(f"seconds_{part}", ("step",), "float64", "s", f"time for {what}", f"Seconds for {what}; 0 for none.",
                 volatile=True)
        for part, what in {
            "kernel": "the NTK of this step",
            "eigenpairs": "eigenpairs and top eigenvalue of the NTK of this step",
            "scalars": "norms, energies and network outputs of this step",
            "other_kernels": "all that was measured of other kernels at this step",
            "hessian": "the eigenvalues of the Hessian at this step",
            "test": "what was measured on held-out examples at this step",
            "commit": "the commit between the row before this one and this one",
        }.items()
    ),
])  # fmt: skip

# What `train` has beside that where a process gives it, and which process gives what.
OF_PROCESS = _by_name([
    Variable(
        "oscillation", ("step",), "float64", "1", "squared oscillation",
        "‖θ_t - θ*_t‖² of the iterates around their midpoints in the process midpoint, tr Σ in central_flow; "
        "others have none.",
    ),
    Variable(
        "critical", ("step",), "int64", "1", "critical eigenvalues",
        "How many eigenvalues of the Hessian are at 2/η, of the process central_flow alone.",
    ),
])  # fmt: skip
GIVEN_BY: dict[str, tuple[str, ...]] = {
    "discrete": (),
    "midpoint": ("oscillation",),
    "gradient_flow": (),
    "central_flow": ("oscillation", "critical"),
}

PROBE = _by_name([
    Variable("sample_index", ("sample",), "int64", "1", "example", "Row of the dataset that this example came from."),
    Variable("input", ("sample",), "model", "1", "input", "x, as the network sees it; further dims are feature axes."),
    Variable("target", ("sample", "output"), "model", "1", "target", "y, as the loss sees it."),
])  # fmt: skip
# The same of the held-out examples, if there are any.
TEST_PROBE = _by_name(
    replace(
        variable,
        name=f"test_{variable.name}",
        dims=("test_sample", *variable.dims[1:]),
        long_name=f"held-out {variable.long_name}",
    )
    for variable in PROBE.values()
)

# The growing groups and their variables, in the order in which a row's digest takes them. `snapshots` holds every
# variable of `spectra` and `scalars` too, so that one group answers most questions. `hessian` is there on request.
GROUPS: dict[str, dict[str, Variable]] = {
    "hessian": HESSIAN,
    "scalars": SCALARS,
    "snapshots": KERNELS | SPECTRA | SCALARS,
    "spectra": SPECTRA,
    "train": TRAIN,
}

# What a group may have beside that, in the order in which it follows in a row's digest.
MORE = {
    "hessian": PRECONDITIONED,
    "scalars": TEST_SCALARS,
    "snapshots": ON_REQUEST | HELD_OUT,
    "train": OF_PROCESS,
}

# What describes one kernel; another kernel than the NTK has the same, its name and `_` in front.
OF_A_KERNEL = tuple(name for name in GROUPS["snapshots"] if name not in ("parameter", "prediction"))


def kernel_variable(kernel: str, name: str) -> Variable:
    """The variable `name` of `OF_A_KERNEL`, of another kernel than the NTK."""
    variable = GROUPS["snapshots"][name]
    return replace(
        variable,
        name=f"{kernel}_{name}",
        long_name=f"{variable.long_name.replace('NTK', 'kernel')} ({kernel})",
        description=f"As `{name}`, of the kernel {kernel} in the place of the NTK.",
    )


def kernel_of(name: str) -> str | None:
    """The kernel that a variable describes, if it is another one than the NTK."""
    # The longest ending first: `x_ntk_sharpness` is the sharpness of x.
    endings = sorted(OF_A_KERNEL, key=len, reverse=True)
    return next((name.removesuffix(f"_{base}") for base in endings if name.endswith(f"_{base}")), None)


def variables_of(group: str, names: Iterable[str] | None = None) -> dict[str, Variable]:
    """The own variables of a group in schema order.

    Args:
        group: one of `GROUPS`.
        names: restrict them to these, among which may be variables on request and those of other kernels; by default
            all that every run has.
    """
    if names is None:
        return GROUPS[group]
    wanted = set(names)
    own = GROUPS[group] | MORE.get(group, {})
    found = {name: variable for name, variable in own.items() if name in wanted}
    for kernel in sorted({kernel for name in wanted - own.keys() if (kernel := kernel_of(name))}):
        others = (kernel_variable(kernel, base) for base in OF_A_KERNEL if base in GROUPS[group])
        found |= {variable.name: variable for variable in others if variable.name in wanted}
    return found


def recorded(
    kernels: Iterable[str] = (),
    layers: bool = False,
    full: bool = False,
    preconditioned: bool = False,
    test: Iterable[str] = (),
) -> dict[str, list[str]]:
    """The variables of each group whose rows come from kernels, for a study that asks for more than `GROUPS`.

    Args:
        kernels: names of the kernels beside the NTK.
        layers: the parts of the NTK by tensor.
        full: the NTK of all pairs of outputs.
        preconditioned: the sharpness of the preconditioned Hessian.
        test: those of `HELD_OUT`; none if no examples are held out.
    """
    held_out = list(test)
    more = {"ntk_layer": layers, "ntk_full": full}
    names = {group: list(GROUPS[group]) for group in ("hessian", "scalars", "snapshots", "spectra")}
    names["snapshots"] += [name for name, asked in more.items() if asked]
    names["hessian"] += [name for name in PRECONDITIONED if preconditioned]
    names["snapshots"] += held_out
    names["scalars"] += [name for name in held_out if name in TEST_SCALARS]
    for group in ("scalars", "snapshots", "spectra"):
        names[group] += [f"{kernel}_{base}" for kernel in kernels for base in OF_A_KERNEL if base in GROUPS[group]]
    return names


def row_variables(group: str, names: Iterable[str] | None = None) -> list[Variable]:
    """The variables of a row of `group` in schema order: step, learning_rate, seed, loss, its own, the digest.

    Args:
        group: one of `GROUPS`.
        names: as `variables_of` takes them.
    """
    row = [*(ROW | variables_of(group, names)).values(), DIGEST]
    return [replace(variable, rows_per_chunk=TRAIN_ROWS) for variable in row] if group == "train" else row


def chunk_shape(variable: Variable, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunk shape of a growing array whose rows have `shape[1:]`.

    Shared chunks hold `rows_per_chunk` whole rows. A row that owns its chunks is cut along its first axis into
    bands of at most `BAND_BYTES`; a square matrix of side `TILED` or more into tiles of side `TILE`, so that one task
    can write a tile and its mirror.
    """
    if variable.rows_per_chunk is not None:
        return (variable.rows_per_chunk, *shape[1:])
    if len(shape) == 3 and shape[1] == shape[2] >= TILED:
        return (1, TILE, TILE)
    per_line = itemsize * int(np.prod(shape[2:], dtype=np.int64))
    return (1, max(1, min(shape[1], BAND_BYTES // max(per_line, 1))), *shape[2:])
