"""This project and the peers that need nothing but torch, numpy and scipy, in the project's own environment."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import curvature
import networks
import numpy as np
import protocol
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pipeline.cadence import Cadence
from pipeline.kernels import NTK, empirical_ntk
from pipeline.losses import mse
from pipeline.operators import HessianOperator
from pipeline.record import Probe, Recorder
from pipeline.spectra import eigenpairs, lanczos

CHUNK = 100

Kernel = Callable[[nn.Module, Tensor, str], Tensor]


def prepare(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """Any method of this file, with torch on the number of threads asked for."""
    torch.set_num_threads(spec["threads"])
    if spec["method"] in KERNELS:
        return kernel_work(KERNELS[spec["method"]](), spec, arrays)
    return OTHERS[spec["method"]](spec, arrays)


def kernel_work(kernel: Kernel, spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """A method that makes a kernel of a model and examples; two examples beforehand start whatever starts once."""
    model = networks.build(spec["model"], spec["c"], arrays)
    x, outputs = torch.from_numpy(arrays["x"]), spec["outputs"]
    KERNELS[spec["method"]]()(model, x[:2], outputs)
    return work(lambda: kernel(model, x, outputs))


def work(run: Callable[[], Tensor | np.ndarray]) -> protocol.Work:
    """A method whose result is one tensor or array."""
    return protocol.Work(
        run,
        lambda result: result.numpy(force=True) if isinstance(result, Tensor) else result,
        f"{protocol.openblas()}, MKL in torch",
    )


# --- kernels ---------------------------------------------------------------------------------------------------------


def cached() -> Kernel:
    """This project's, as a run uses it: one object for the examples, whatever the parameters become."""
    kept: list[NTK] = []

    def kernel(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
        if not kept:
            kept.append(NTK(x, outputs=outputs))
        return kept[0](model)

    return kernel


def uncached() -> Kernel:
    """This project's, asked once."""
    return lambda model, x, outputs: empirical_ntk(model, x, outputs=outputs)


def layer_formula() -> Kernel:
    """The sum over Linear layers of (A Aᵀ + 1) ∘ (B Bᵀ) by torch.mm, as one writes it by hand for one output."""

    def kernel(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
        inputs, preactivations, hidden = [], [], x
        for layer in model:
            if isinstance(layer, nn.Linear):
                inputs.append(hidden.detach())
            hidden = layer(hidden)
            if isinstance(layer, nn.Linear):
                preactivations.append(hidden)
        gradients = torch.autograd.grad(hidden.sum(), preactivations)
        terms = (torch.mm(a, a.T).add_(1).mul_(torch.mm(b, b.T)) for a, b in zip(inputs, gradients, strict=True))
        total = next(terms)
        for term in terms:
            total += term
        return total

    return kernel


def jacobians(model: nn.Module, x: Tensor, chunk: int | None) -> list[Tensor]:
    """Of each parameter, (n, c, p_l), by vmap(jacrev)."""
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, parameters, (example.unsqueeze(0),)).squeeze(0)

    return [j.flatten(2) for j in vmap(jacrev(outputs), (None, 0), chunk_size=chunk)(parameters, x).values()]


def tutorial() -> Kernel:
    """Jacobian contraction of PyTorch's "Neural Tangent Kernels", with one Jacobian where both arguments are equal."""

    def kernel(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
        equation = "Naf,Mbf->NMab" if outputs == "full" else "Naf,Maf->NM"
        return torch.stack([torch.einsum(equation, j, j) for j in jacobians(model, x, None)]).sum(0)

    return kernel


def chunked() -> Kernel:
    """vmap(jacrev) on chunks into the rows of one matrix J, then one J Jᵀ."""

    def kernel(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
        rows, filled = None, 0
        for part in x.split(CHUNK):
            blocks = jacobians(model, part, None)
            if rows is None:
                rows = x.new_empty(len(x), blocks[0].shape[1], sum(block.shape[2] for block in blocks))
            torch.cat(blocks, dim=2, out=rows[filled : filled + len(part)])
            filled += len(part)
        return contracted(rows, outputs)

    return kernel


def one_by_one() -> Kernel:
    """One backward pass for each example and output into the rows of J, then one J Jᵀ."""

    def kernel(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
        parameters, rows = list(model.parameters()), None
        for i, example in enumerate(x.split(1)):
            values = model(example)[0]
            if rows is None:
                rows = x.new_empty(len(x), len(values), sum(parameter.numel() for parameter in parameters))
            for a, value in enumerate(values):
                gradients = torch.autograd.grad(value, parameters, retain_graph=a + 1 < len(values))
                torch.cat([gradient.flatten() for gradient in gradients], out=rows[i, a])
        return contracted(rows, outputs)

    return kernel


def contracted(j: Tensor, outputs: str) -> Tensor:
    """J Jᵀ of (n, c, p): (n, n) or (n, n, c, c)."""
    n, c, _ = j.shape
    if outputs == "trace":
        return j.flatten(1) @ j.flatten(1).T
    return (j.flatten(0, 1) @ j.flatten(0, 1).T).view(n, c, n, c).swapaxes(1, 2)


# --- eigenpairs, training --------------------------------------------------------------------------------------------


def pairs_ours(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """The leading eigenpairs of this project, from those of the snapshot before."""
    options = {"tolerance": spec["tolerance"]} if "tolerance" in spec else {}
    start = eigenpairs(arrays["before"], PAIRS, **options).start
    return work(lambda: eigenpairs(arrays["after"], PAIRS, start=start, **options).values)


def pairs_eigh(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """All eigenpairs by torch, in float64."""
    kernel = torch.from_numpy(arrays["after"]).double()
    return work(lambda: torch.linalg.eigh(kernel)[0].flip(0)[:PAIRS])


def pairs_arpack(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """ARPACK from a random vector, in the kernel's own float32."""
    start = np.random.default_rng(0).standard_normal(len(arrays["after"]))
    return work(lambda: eigsh(arrays["after"], PAIRS, v0=start)[0][::-1].copy())


def sharpness_ours(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """This project's, gradient and its graph included, from the eigenvector of the snapshot before."""
    model = networks.build("mlp", 1, arrays)
    x, y, vector = (torch.from_numpy(arrays[name]) for name in ("x", "y", "vector"))

    def run() -> Tensor:
        hessian = HessianOperator(model, mse, x, y)
        return lanczos(hessian, start=vector, tolerance=spec["tolerance"]).values

    return work(run)


def sharpness_eigsh(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """The Hessian's largest eigenvalue by ARPACK from a random vector, as edge-of-stability code has it."""
    model = networks.build("mlp", 1, arrays)
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])

    def run() -> np.ndarray:
        hessian = curvature.hessian(model, x, y)
        start = np.random.default_rng(0).standard_normal(hessian.shape[0])
        return eigsh(hessian, 1, v0=start, tol=spec["tolerance"], return_eigenvectors=False)

    return work(run)


def training(snapshots: bool) -> protocol.Prepare:
    """Gradient descent on the MLP; recorded, it keeps kernel, eigenpairs and parameters at every tenth step."""

    def prepared(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
        x, y, steps, rate = *map(torch.from_numpy, (arrays["x"], arrays["y"])), int(arrays["steps"]), 0.01

        def run() -> Tensor:
            model = networks.build("mlp", 1, arrays)
            parameters = list(model.parameters())
            with tempfile.TemporaryDirectory() as folder:
                for loss in recorded(folder, model) if snapshots else bare(model):
                    gradients = torch.autograd.grad(loss, parameters)
                    with torch.no_grad():
                        for parameter, gradient in zip(parameters, gradients, strict=True):
                            parameter -= rate * gradient
            return torch.cat([parameter.detach().flatten() for parameter in parameters])

        def loss_of(model: nn.Module) -> Tensor:
            return (model(x) - y).square().sum() / (2 * len(x))

        def bare(model: nn.Module) -> Iterator[Tensor]:
            for _ in range(steps):
                loss = loss_of(model)
                loss.item()
                yield loss

        def recorded(folder: str, model: nn.Module) -> Iterator[Tensor]:
            recorder = Recorder(
                str(Path(folder, "store")), model, Probe(x, y), identity={}, learning_rate=rate, seed=0, steps=steps,
                cadences={"snapshots": Cadence(every=10)}, eigenpairs=PAIRS,
            )  # fmt: skip
            with recorder:
                for step in recorder:
                    loss = loss_of(model)
                    if recorder.record(step, loss=loss.item()):
                        yield loss

        return work(run)

    return prepared


# --- what the machine can do -----------------------------------------------------------------------------------------


def product(library: str) -> protocol.Prepare:
    """A square product of float32, by which the floors are reckoned."""

    def prepared(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
        a = arrays["x"]
        b = a.copy()  # numpy would take a product with itself for a symmetric one
        if library == "numpy":
            return work(lambda: a @ b)
        return work(lambda: torch.mm(torch.from_numpy(a), torch.from_numpy(b)))

    return prepared


PAIRS = 20
KERNELS: dict[str, Callable[[], Kernel]] = {
    "cached": cached,
    "uncached": uncached,
    "layer formula": layer_formula,
    "tutorial": tutorial,
    "chunked": chunked,
    "one by one": one_by_one,
}
OTHERS: dict[str, protocol.Prepare] = {
    "pairs": pairs_ours,
    "pairs eigh": pairs_eigh,
    "pairs arpack": pairs_arpack,
    "sharpness": sharpness_ours,
    "sharpness eigsh": sharpness_eigsh,
    "recorded": training(True),
    "bare": training(False),
    "numpy": product("numpy"),
    "torch": product("torch"),
}

protocol.serve(prepare)
