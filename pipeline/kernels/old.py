"""The empirical neural tangent kernel of a model on given examples.

    K_ij^ab = Σ_θ (∂f_a(x_i)/∂θ) (∂f_b(x_j)/∂θ),    θ over all parameters with requires_grad

in two ways that agree to rounding. `samples` takes any module that treats examples independently: one Jacobian per
example, then J Jᵀ. `layers` takes stacks of Linear and elementwise layers and never forms J: with A_l the input of
Linear l and B_l the gradient of the output with respect to its preactivation, one row per example each,

    K = Σ_l (B_l B_lᵀ) ∘ (A_l A_lᵀ + 1)        (the 1 is the bias)

Products are accumulated in float64 whatever the model's dtype.

Source: Jacot, Gabriel, Hongler (2018), arXiv 1806.07572; Novak, Sohl-Dickstein, Schoenholz (2022), arXiv 2206.08720.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError

Outputs = Literal["trace", "full"]
Method = Literal["auto", "layers", "samples"]

# Layers that act on each number alone and have no parameters.
ELEMENTWISE = (
    nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.Identity
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Columns of J that are converted to float64 at once.
COLUMNS = 16_384


class NTK:
    """The kernel on fixed examples, for many evaluations of a model whose parameters change.

    It keeps what does not depend on the parameters, the Gram matrix of the inputs, and two matrices of the kernel's
    size to work in: fresh ones at every step would cost as much time as the products. One object serves one thread.

    Args:
        x1: (n1, *features), in the dtype and on the device of the models to come; not to be changed afterwards.
        x2: (n2, *features), or None for x1, which gives an exactly symmetric kernel.
        outputs: "trace" sums the kernels of the outputs, "full" keeps each pair of outputs.
        method: "layers", "samples", or "auto": the first where it is exact, else the second.
        chunk: examples whose Jacobians `samples` takes at once; memory grows with it, results do not depend on it.

    Raises:
        InputError: if the arguments do not fit.
    """

    def __init__(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        *,
        outputs: Outputs = "trace",
        method: Method = "auto",
        chunk: int = 64,
    ) -> None:
        if outputs not in ("trace", "full"):
            raise InputError(f"outputs = {outputs!r}: must be 'trace' or 'full'")
        if method not in ("auto", "layers", "samples"):
            raise InputError(f"method = {method!r}: must be 'auto', 'layers' or 'samples'")
        if x1.ndim < 2 or (x2 is not None and x2.shape[1:] != x1.shape[1:]):
            shapes = " and ".join(str(tuple(x.shape)) for x in (x1, x2) if x is not None)
            raise InputError(f"examples of shape {shapes}: must be (n, features...), with the same features")
        self._x1, self._x2 = x1.detach(), None if x2 is None else x2.detach()
        self._outputs, self._method, self._chunk = outputs, method, chunk
        self._gram: Tensor | None = None
        self._workspace: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> Tensor:
        """The kernel of `model` as it is now; the model, its gradients and modes are left as they were.

        Returns:
            float64, (n1, n2) for the trace, (n1, n2, c, c) for all pairs of outputs.

        Raises:
            InputError: if the model mixes its examples or draws random numbers, has nothing that is trained, or
                cannot be treated by the method.
        """
        _check_model(model)
        obstacle = None if self._method == "samples" else layers_obstacle(model, self._x1)
        if obstacle is not None and self._method == "layers":
            raise InputError(f"method = 'layers': {obstacle}; use 'samples' or 'auto'")
        by_layers = self._method != "samples" and obstacle is None
        terms = self._layer_terms(cast(nn.Sequential, model)) if by_layers else self._sample_terms(model)
        kernel = next(terms).clone()
        for term in terms:
            kernel += term
        return kernel if self._outputs == "trace" else kernel.swapaxes(1, 2)

    # --- by layers ---------------------------------------------------------------------------------------------------

    def _layer_terms(self, model: nn.Sequential) -> Iterator[Tensor]:
        """K_l of each trained Linear, in a buffer that the next one overwrites."""
        left = _capture(model, self._x1)
        right = left if self._x2 is None else _capture(model, self._x2)
        for one, two in zip(left, right, strict=True):
            inputs = self._input_product(one, two)
            if self._outputs == "full":
                inputs = inputs[:, None, :, None]
            yield self._gradient_product(one.gradient, two.gradient).mul_(inputs)

    def _input_product(self, one: "_Captured", two: "_Captured") -> Tensor:
        """A_l A_lᵀ for the weight plus 1 for the bias, of those that are trained."""
        layer = one.layer
        if not layer.weight.requires_grad:
            return one.gradient.new_ones(1, 1)
        if one.input is None or two.input is None:
            product = self._gram_of_examples()
        else:
            a1 = one.input.double()
            a2 = a1 if two is one else two.input.double()
            product = _product(a1, a2, self._buffer("inputs", len(a1), len(a2)))
        if layer.bias is None or not layer.bias.requires_grad:
            return product
        return torch.add(product, 1, out=self._buffer("inputs", *product.shape))

    def _gram_of_examples(self) -> Tensor:
        """x1 x2ᵀ, which is the same for all parameters."""
        if self._gram is None:
            x1 = self._x1.flatten(1).double()
            x2 = x1 if self._x2 is None else self._x2.flatten(1).double()
            self._gram = _product(x1, x2, x1.new_empty(len(x1), len(x2)))
        return self._gram

    # --- by samples --------------------------------------------------------------------------------------------------

    def _sample_terms(self, model: nn.Module) -> Iterator[Tensor]:
        """J_l J_lᵀ of each trained tensor, in blocks of columns, in a buffer that the next one overwrites."""
        left = _jacobians(model, self._x1, self._chunk)
        right = left if self._x2 is None else _jacobians(model, self._x2, self._chunk)
        for one, two in zip(left, right, strict=True):
            blocks = one.split(COLUMNS, dim=2)
            others = blocks if two is one else two.split(COLUMNS, dim=2)
            yield from map(self._gradient_product, blocks, others)

    # --- shared ------------------------------------------------------------------------------------------------------

    def _gradient_product(self, one: Tensor, two: Tensor) -> Tensor:
        """Products of gradients (n1, c, m) and (n2, c, m): (n1, n2) summed over outputs, or (n1, c, n2, c)."""
        (n1, c, _), n2 = one.shape, len(two)
        joined = (1, 2) if self._outputs == "trace" else (0, 1)
        rows1 = one.flatten(*joined).double()
        rows2 = rows1 if two is one else two.flatten(*joined).double()
        product = _product(rows1, rows2, self._buffer("gradients", len(rows1), len(rows2)))
        return product if self._outputs == "trace" else product.view(n1, c, n2, c)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """A float64 matrix to work in, overwritten by the next use of `name`."""
        buffer = self._workspace.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._workspace[name] = torch.empty(shape, dtype=torch.float64, device=self._x1.device)
        return buffer


def empirical_ntk(model: nn.Module, x1: Tensor, x2: Tensor | None = None, **options: Any) -> Tensor:
    """The kernel of one model on one set of examples; `NTK` does the same for many evaluations.

    Args:
        model: maps (n, *features) to (n, c), each example on its own.
        x1: (n1, *features).
        x2: (n2, *features), or None for x1.
        options: `outputs`, `method` and `chunk` of `NTK`.

    Returns:
        float64, (n1, n2), or (n1, n2, c, c) for outputs="full".

    Raises:
        InputError: as `NTK` and its call.
    """
    return NTK(x1, x2, **options)(model)


def layers_obstacle(model: nn.Module, x: Tensor) -> str | None:
    """Why the layer formula would not be exact for `model` on examples like `x`, or None if it is.

    Types are compared exactly: a subclass, a hook, a parametrisation or a parameter used twice may change what a
    layer computes, and the formula would not notice.
    """
    if type(model) is not nn.Sequential:
        return f"the model is a {type(model).__name__}, not a plain nn.Sequential"
    flat = x.ndim == 2
    for index, layer in enumerate(model):
        if type(layer) is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1:
            flat = True
        elif type(layer) is nn.Linear:
            if not flat:
                return f"layer {index} is a Linear on examples that are not flattened"
        elif type(layer) not in ELEMENTWISE:
            return f"layer {index} is a {type(layer).__name__}"
        elif getattr(layer, "inplace", False):
            return f"layer {index} works in place"
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            return f"module {name or 'root'!r} has hooks or a forward of its own"
    parameters = [id(parameter) for layer in model for parameter in layer.parameters()]
    return "a parameter is used twice" if len(set(parameters)) < len(parameters) else None


class _Captured(NamedTuple):
    """What the layer formula needs of one Linear."""

    layer: nn.Linear
    input: Tensor | None  # (n, d); None if it is the examples themselves
    gradient: Tensor  # (n, c, e), of the outputs with respect to the preactivation


def _capture(model: nn.Sequential, x: Tensor) -> list[_Captured]:
    """One forward pass, and one backward pass per output, over the trained Linear layers of a Sequential.

    Examples are independent, so the gradient of an output summed over examples has each example's own in its row.
    """
    examples = hidden = x.flatten(1)
    layers: list[nn.Linear] = []
    inputs: list[Tensor | None] = []
    preactivations: list[Tensor] = []
    with torch.enable_grad():
        for layer in model:
            if isinstance(layer, nn.Flatten):
                continue
            output = layer(hidden)
            if isinstance(layer, nn.Linear) and any(tensor.requires_grad for tensor in layer.parameters()):
                layers.append(layer)
                inputs.append(None if hidden is examples else hidden.detach())
                preactivations.append(output)
            hidden = output
        c = hidden.shape[1]
        gradients = [
            torch.autograd.grad(hidden[:, output].sum(), preactivations, retain_graph=output + 1 < c)
            for output in range(c)
        ]
    return [
        _Captured(layer, input, torch.stack(per_output, dim=1))
        for layer, input, *per_output in zip(layers, inputs, *gradients, strict=True)
    ]


def _jacobians(model: nn.Module, x: Tensor, chunk: int) -> list[Tensor]:
    """∂f/∂θ_l of each example: (n, c, p_l) in the model's dtype, one per trained tensor."""
    # Each place that holds a trained tensor, once: functional_call does not put back what it replaces twice.
    places = {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in model.named_modules()
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False)
        if tensor.requires_grad
    }
    unique = list({id(tensor): tensor for tensor in places.values()}.values())
    index = {id(tensor): position for position, tensor in enumerate(unique)}

    def outputs(tensors: list[Tensor], example: Tensor) -> Tensor:
        replaced = {place: tensors[index[id(tensor)]] for place, tensor in places.items()}
        result = torch.func.functional_call(model, replaced, (example[None],), tie_weights=False)
        if not isinstance(result, Tensor) or result.ndim != 2:
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
            raise InputError(f"the model's output for n examples has {got}: it must have shape (n, outputs)")
        return result[0]

    per_example = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0), chunk_size=chunk)
    try:
        jacobians = per_example([tensor.detach() for tensor in unique], x)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"per-example gradients of {type(model).__name__} failed: {reason} (torch.func must be able to batch the "
            "model: no random numbers, no branches on values, no buffer that a call changes)"
        ) from error
    return [jacobian.flatten(2) if jacobian.ndim > 2 else jacobian[:, :, None] for jacobian in jacobians]


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A bᵀ into `out`, exactly symmetric where b is a."""
    if a.device.type == "cpu":
        # numpy sees one array times its own transpose, does half the work (syrk) and mirrors the triangle.
        np.matmul(a.numpy(), b.numpy().T, out=out.numpy())
        return out
    torch.mm(a, b.T, out=out)
    return out.copy_((out + out.T) / 2) if a is b else out


def _check_model(model: nn.Module) -> None:
    """Refuse modules for which one example has no gradient of its own, or another one at every call."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameter with requires_grad: its kernel is empty")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
            raise InputError(
                f"module {name!r} is a {type(module).__name__} on batch statistics, which couples the examples: "
                "call model.eval() to use running statistics (with track_running_stats=True)"
            )
        if isinstance(module, DROPOUTS) and module.training and module.p > 0:
            raise InputError(
                f"module {name!r} is a live {type(module).__name__}, so the kernel is random: call model.eval()"
            )


KERNELS: dict[str, type[NTK]] = {"ntk": NTK}
