"""What the kernel benchmark compares and asks for, as data: methods, rows, goals, and the floor of each row.

The floor counts the fewest operations that give a kernel. With T positions, d inputs and e outputs of each layer,
n examples and c outputs, the forward pass takes 2 n T d e, and the backward pass c times as much up to the first
layer. Half a Gram matrix takes

    by inputs and gradients        n² T² (d + 1 + c e)                 for the trace
                                   n² T² (d + 1) + (n c)² T² e         for all pairs of outputs
    by the examples' gradients     2 n c T d e + n² c (d + 1) e        c² for c in the second term for all pairs

whichever is less. The last layer's gradients are constant, and where the Gram matrix of the examples is kept, the
first layer needs none.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from peers import curvature, networks
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from pipeline.kernels import empirical_ntk

Arrays = dict[str, np.ndarray]


class Method(NamedTuple):
    """One way to the result of a row: its name in the table, the script that has it, and what that script is told."""

    label: str
    script: str
    spec: Mapping[str, str | float]

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.label.startswith("this project")


def in_torch(label: str, method: str, **spec: float) -> Method:
    """A method that runs in the project's own environment."""
    return Method(label, "with_torch.py", {"method": method, **spec})


CACHED = in_torch("this project, inputs' Gram matrix kept", "cached")
UNCACHED = in_torch("this project", "uncached")
FORMULA = in_torch("layer formula in torch.mm", "layer formula")
TUTORIAL = in_torch("PyTorch tutorial, vmap(jacrev) + einsum", "tutorial")
CHUNKED = in_torch("vmap(jacrev) in chunks + matmul", "chunked")
ONE_BY_ONE = in_torch("one backward pass per example", "one by one")
WARM = in_torch("this project, warm", "pairs")
LOOSE = in_torch("this project, warm, tolerance 1e-4", "pairs", tolerance=1e-4)
NNGEOMETRY = Method("nngeometry", "with_nngeometry.py", {})
STRUCTURED = Method(
    "neural-tangents, structured", "with_neural_tangents.py", {"implementation": "structured derivatives"}
)
CONTRACTION = Method("neural-tangents, Jacobian", "with_neural_tangents.py", {"implementation": "Jacobian contraction"})
ENVIRONMENTS = {"with_nngeometry.py": ".venv-nngeometry", "with_neural_tangents.py": ".venv-neural-tangents"}


@dataclass(frozen=True)
class Row:
    """One result and the methods that make it.

    Attributes:
        name: key, for goals and `--rows`.
        inputs: row -> what every method is given.
        n: examples.
        methods: this project's first.
        model: mlp, cnn or vit; empty if the result is no kernel.
        c: outputs.
        outputs: trace or full.
        steps: of gradient descent, where the row trains.
        quick_n: examples in `--quick`.
        tolerance: relative error beyond which a result is wrong.
        absent: methods that are not run here, and why.
        by_clock: compare wall time at one thread as well, because waiting for the disk is part of it.
    """

    name: str
    inputs: Callable[["Row"], Arrays]
    n: int
    methods: tuple[Method, ...]
    model: str = ""
    c: int = 1
    outputs: str = "trace"
    steps: int = 0
    quick_n: int = 16
    tolerance: float = 1e-5
    absent: Mapping[str, str] = field(default_factory=dict)
    by_clock: bool = False

    @property
    def title(self) -> str:
        """What it is, with its size."""
        outputs = f", {self.c} outputs, {self.outputs}" if self.c > 1 else ""
        return f"{TITLES.get(self.name) or TITLES[self.model]}, n = {self.n}{outputs}"

    @property
    def kernel_bytes(self) -> int:
        """Size of the kernel in float32."""
        return 4 * self.n**2 * (self.c**2 if self.outputs == "full" else 1)


def kernel_inputs(row: Row) -> Arrays:
    """Weights in torch's initialisation and standard normal images."""
    model = networks.build(row.model, row.c)
    return {"x": torch.randn(row.n, *networks.IMAGE).numpy(), **networks.exported(model)}


def labelled(n: int) -> Arrays:
    """Images whose covariance decays like a power law, as that of natural ones does, and labels -1 and +1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, int(np.prod(networks.IMAGE)))) / np.sqrt(np.arange(1, 1 + np.prod(networks.IMAGE)))
    y = np.sign(x @ rng.normal(size=(x.shape[1], 1)))
    return {"x": x.reshape(n, *networks.IMAGE).astype(np.float32), "y": y.astype(np.float32)}


def trained(row: Row) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """The MLP and its data at two steps of gradient descent, as one snapshot and the next find them."""
    x, y = map(torch.from_numpy, labelled(row.n).values())
    model = networks.build("mlp", 1)
    # A tenth of the largest stable step by the Gauss-Newton sharpness λ_1 / n: the Hessian's rises several times over.
    rate = 0.2 * row.n / float(torch.linalg.matrix_norm(empirical_ntk(model, x), ord=2))
    for steps in (2 * row.steps, row.steps):
        networks.descend(model, x, y, rate, steps)
        yield model, x, y


def drifted_kernels(row: Row) -> Arrays:
    """The MLP's kernel before and after the steps between two snapshots."""
    before, after = (empirical_ntk(model, x).numpy().astype(np.float32) for model, x, _ in trained(row))
    return {"before": before, "after": after}


def drifted_weights(row: Row) -> Arrays:
    """The leading eigenvector of the Hessian at a snapshot, and the weights and data at the next one."""
    snapshots = trained(row)
    hessian = curvature.hessian(*next(snapshots))
    start = np.random.default_rng(0).standard_normal(hessian.shape[0])
    _, vectors = eigsh(hessian, 1, v0=start, tol=row.tolerance)
    model, x, y = next(snapshots)
    return {"x": x.numpy(), "y": y.numpy(), "vector": vectors[:, 0], **networks.exported(model)}


def training_inputs(row: Row) -> Arrays:
    """The MLP and its data."""
    return {**labelled(row.n), **networks.exported(networks.build("mlp", 1)), "steps": np.array(row.steps)}


def matrix_inputs(row: Row) -> Arrays:
    """One large matrix."""
    return {"x": np.random.default_rng(0).normal(size=(row.n, row.n)).astype(np.float32)}


def j_bytes(n: int, c: int, p: int) -> str:
    """Why a method that forms the Jacobian is left out."""
    return f"not run: its Jacobian alone takes {4 * n * c * p / 1e9:.0f} GB"


SHARPNESS = (1e-2, 1e-4)  # tolerances
MLP_P, MLP10_P = 655_001, 656_810
FORMS_J = (CONTRACTION, TUTORIAL, CHUNKED)
TITLES = {
    "mlp": "MLP 3072-200-200",
    "cnn": "CNN",
    "vit": "ViT",
    "pairs": "20 leading eigenpairs of the MLP's kernel",
    **{f"sharpness-{tolerance:g}": f"sharpness of the MLP, tolerance {tolerance:g}" for tolerance in SHARPNESS},
    "recording": "gradient descent on the MLP, a snapshot every 10 steps",
}
ROWS = (
    Row("mlp-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED, FORMULA, NNGEOMETRY, TUTORIAL, CHUNKED), "mlp",
        absent={CONTRACTION.label: "not run: seconds and gigabytes already at n = 200"}),
    Row("mlp-5000", kernel_inputs, 5000, (CACHED, UNCACHED, STRUCTURED, FORMULA, NNGEOMETRY), "mlp",
        absent={method.label: j_bytes(5000, 1, MLP_P) for method in FORMS_J}),
    *(Row(f"cnn-{n}", kernel_inputs, n,
          (CACHED, UNCACHED, CHUNKED, TUTORIAL, ONE_BY_ONE, STRUCTURED, CONTRACTION, NNGEOMETRY), "cnn")
      for n in (500, 1000)),
    Row("vit-500", kernel_inputs, 500,
        (CACHED, UNCACHED, TUTORIAL, CHUNKED, STRUCTURED, CONTRACTION, NNGEOMETRY), "vit"),
    Row("mlp10-trace-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED, NNGEOMETRY), "mlp", c=10,
        absent={method.label: j_bytes(1000, 10, MLP10_P) for method in FORMS_J}),
    Row("mlp10-full-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED), "mlp", c=10, outputs="full",
        absent={method.label: j_bytes(1000, 10, MLP10_P) for method in FORMS_J}
        | {NNGEOMETRY.label: "not run: c² backward passes; see n = 100"}),
    Row("mlp10-full-100", kernel_inputs, 100, (CACHED, UNCACHED, STRUCTURED, NNGEOMETRY, TUTORIAL), "mlp", c=10,
        outputs="full", quick_n=4, absent={CONTRACTION.label: "not run: half a minute and 7 GB"}),
    Row("pairs", drifted_kernels, 2000,
        (WARM, LOOSE, in_torch("ARPACK, cold", "pairs arpack"),
         in_torch("torch.linalg.eigh, float64", "pairs eigh")), steps=50, quick_n=48),
    *(Row(f"sharpness-{tolerance:g}", drifted_weights, 1000,
          (in_torch("this project, warm", "sharpness", tolerance=tolerance),
           in_torch("eigsh, cold, rebuilt products", "sharpness eigsh", tolerance=tolerance)),
          steps=50, tolerance=tolerance)
      for tolerance in SHARPNESS),
    Row("recording", training_inputs, 1000,
        (in_torch("this project, recorded", "recorded"), in_torch("bare training", "bare")),
        steps=300, quick_n=24, by_clock=True),
)  # fmt: skip
RATE = Row("rate", matrix_inputs, 2048, (in_torch("numpy", "numpy"), in_torch("torch", "torch")), quick_n=64)


# --- what is asked of it ---------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """A bound on a figure of one row.

    Attributes:
        row: key of the row.
        threads: the table it is read from.
        bound: the least of a speed, the most of anything else.
        ours: the method of this project.
        against: labels of the peers; the best of all that ran, if empty.
        figure: speed (times as fast), peak (in kernels of float32) or added (time beyond the peer's).
        stretch: wished for, not asked for.
    """

    row: str
    threads: int
    bound: float
    ours: Method = CACHED
    against: tuple[str, ...] = ()
    figure: str = "speed"
    stretch: bool = False


GOALS = (
    Goal("mlp-1000", 1, 3),
    Goal("mlp-1000", 1, 1.7, UNCACHED),
    Goal("mlp-1000", 1, 300, UNCACHED, (TUTORIAL.label, CHUNKED.label)),
    Goal("mlp-5000", 1, 7),
    Goal("cnn-500", 1, 1.25),
    Goal("cnn-1000", 1, 1.25),
    Goal("cnn-500", 1, 1.8, stretch=True),
    Goal("cnn-1000", 1, 1.8, stretch=True),
    Goal("vit-500", 1, 2.4),
    Goal("mlp10-full-1000", 1, 6),
    Goal("mlp10-full-1000", 1, 1.2, figure="peak"),
    Goal("pairs", 1, 80, WARM, ("torch.linalg.eigh, float64",)),
    Goal("pairs", 1, 80, LOOSE, ("torch.linalg.eigh, float64",)),
    *(
        Goal(f"sharpness-{tolerance:g}", 1, 8, in_torch("this project, warm", "sharpness", tolerance=tolerance))
        for tolerance in SHARPNESS
    ),
    Goal("recording", 1, 0.3, in_torch("this project, recorded", "recorded"), figure="added"),
    Goal("mlp-1000", 2, 1.8),
    Goal("mlp-5000", 2, 5.5),
    Goal("cnn-500", 2, 1.1),
    Goal("cnn-1000", 2, 1.1),
    Goal("vit-500", 2, 1.5),
    *(Goal(name, 2, 1) for name in ("mlp10-trace-1000", "mlp10-full-1000", "mlp10-full-100")),
)


# --- the fewest operations -------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A Linear, or a convolution as one on patches: T positions, d inputs, e outputs."""

    positions: int
    inputs: int
    outputs: int


BLOCK = (Layer(16, 64, 192), Layer(16, 64, 64), Layer(16, 64, 128), Layer(16, 128, 64))
LAYERS = {
    "mlp": (Layer(1, 3072, 200), Layer(1, 200, 200)),
    "cnn": (Layer(1024, 27, 32), Layer(256, 288, 32)),
    "vit": (Layer(16, 192, 64), *BLOCK, *BLOCK),
}
HEADS = {"mlp": 200, "cnn": 2048, "vit": 64}


def operations(row: Row, kept: bool) -> float:
    """The floor's operations; `kept` leaves out the Gram matrix of the examples where the first layer uses one."""
    n, c, full = row.n, row.c, row.outputs == "full"
    total = n**2 * (HEADS[row.model] + 1) + 2 * n * HEADS[row.model] * c
    for index, (t, d, e) in enumerate(LAYERS[row.model]):
        passed = 2 * n * t * d * e
        grams = 0 if kept and index == 0 and t == 1 else n**2 * t**2 * (d + 1)
        by_grams = grams + n**2 * t**2 * e * (c**2 if full else c)
        by_gradients = c * passed + n**2 * (d + 1) * e * (c**2 if full else c)
        total += passed * (1 if index == 0 else 1 + c) + min(by_grams, by_gradients)
    return total
