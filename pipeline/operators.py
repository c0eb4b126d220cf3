"""Curvature matrices of a model on data as operators: products with vectors, for matrices that need not be formed.

With f(θ) the predictions (n, c) as nc numbers, example first, J = ∂f/∂θ (nc, p) and L the loss,

    NTK            K = J Jᵀ            (nc, nc)
    Gauss-Newton   G = Jᵀ (∂²L/∂f²) J   (p, p)
    Hessian        H = ∂²L/∂θ²          (p, p)

For L = (1/2n) ‖f - y‖², G is JᵀJ / n and has the nonzero eigenvalues of K / n. θ are the parameters with
requires_grad in the order of `model.parameters()`, flattened; those that are frozen are no part of it.

Each operator differentiates the model once, keeps that graph, and takes every product by a backward pass through it:
about half the cost of building it anew. So an operator belongs to one value of the parameters, and refuses to be
applied after an optimiser has changed them. Changes through `parameter.data` go unseen, here as in autograd.

Source: Pearlmutter (1994), Neural Computation 6, for products with H; Schraudolph (2002), Neural Computation 14, for G.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.losses import Loss


class ModelOperator(LinearOperator):
    """What the operators share: the parameters as they were, and products for numpy and for torch.

    As a scipy `LinearOperator` it takes and returns numpy arrays, in the dtype of the model.

    Attributes:
        shape: rows and columns.
        like: a tensor of the dtype and on the device on which `apply` works.
    """

    def __init__(self, parameters: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self._parameters = parameters
        self._versions = [parameter._version for parameter in parameters]
        self.like = parameters[0].detach()
        super().__init__(self.like.new_empty(0).numpy(force=True).dtype, shape)

    def apply(self, vector: Tensor) -> Tensor:
        """The product with a vector, in the dtype and on the device of the model.

        Raises:
            InputError: if the parameters have changed since the operator was made, or the vector does not fit.
        """
        self._check(vector, self.shape[1])
        return self._product(vector)

    def apply_adjoint(self, vector: Tensor) -> Tensor:
        """The product of the transposed operator with a vector, like `apply`."""
        self._check(vector, self.shape[0])
        return self._adjoint_product(vector)

    def _check(self, vector: Tensor, size: int) -> None:
        if vector.shape != (size,):
            raise InputError(f"a vector of shape {tuple(vector.shape)}: must be ({size},)")
        if [parameter._version for parameter in self._parameters] != self._versions:
            raise InputError(
                f"the parameters were changed in place after this {type(self).__name__} was made for their old values: "
                "take all products before the update, or make another operator after it"
            )

    def _product(self, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint_product(self, vector: Tensor) -> Tensor:
        return self._product(vector)

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        return self.apply(self._tensor(x)).numpy(force=True)

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[Any]:
        return self.apply_adjoint(self._tensor(x)).numpy(force=True)

    def _rmatmat(self, x: NDArray[Any]) -> NDArray[Any]:
        # scipy's own goes through the adjoint, and the adjoint of a class that defines one comes back here.
        return np.stack([self._rmatvec(column) for column in x.T], axis=1)

    def _tensor(self, x: NDArray[Any]) -> Tensor:
        return torch.tensor(x.reshape(-1), dtype=self.like.dtype, device=self.like.device)


class NTKOperator(ModelOperator):
    """v -> J_1 (J_2ᵀ v): the NTK of all outputs without its n1 c n2 c numbers, or one between two sets of examples.

    Rows and columns are ordered by example, then output, as `spectra.as_matrix` orders a kernel.

    Args:
        model: maps (n, ...) to (n, c).
        x1: examples of the rows.
        x2: examples of the columns, or None for x1.

    Raises:
        InputError: if the model has nothing to train.
    """

    def __init__(self, model: nn.Module, x1: Tensor, x2: Tensor | None = None) -> None:
        parameters = _trained(model)
        self._left = _Jacobian(model, parameters, x1)
        self._right = self._left if x2 is None else _Jacobian(model, parameters, x2)
        super().__init__(parameters, (self._left.size, self._right.size))

    def _product(self, vector: Tensor) -> Tensor:
        return self._left.times(self._right.transposed_times(vector))

    def _adjoint_product(self, vector: Tensor) -> Tensor:
        return self._right.times(self._left.transposed_times(vector))

    def _adjoint(self) -> LinearOperator:
        return self if self._left is self._right else super()._adjoint()


class BlockedNTK:
    """Products with the NTK of more examples than a graph has room for: v -> J (Jᵀ v), some examples at a time.

    Each product makes the graph of every block of examples twice, for Jᵀ and for J, whatever the number of vectors.

    Args:
        model: maps (n, ...) to (n, c).
        x: examples.
        at_once: examples of a block.
        memory: bytes that the vectors Jᵀ v may take; more of them are multiplied one after the other.

    Attributes:
        shape: (nc, nc), of the kernel of all outputs.
        like: a tensor of the dtype and on the device on which `apply` works.

    Raises:
        InputError: if the model has nothing to train.
    """

    def __init__(self, model: nn.Module, x: Tensor, at_once: int, memory: int = 2**27) -> None:
        self._model, self._parameters, self._memory = model, _trained(model), memory
        self._blocks = x.split(at_once)
        with torch.no_grad():
            self._c = model(x[:1]).shape[1]
        self._n = len(x)
        self.like = self._parameters[0].detach()
        self.shape = (self._n * self._c, self._n * self._c)

    def apply(self, vector: Tensor) -> Tensor:
        """K v (nc,) of the kernel of all outputs, ordered by example, then output."""
        return self._products(vector.view(1, self._n, self._c)).view(-1)

    def traced(self, vectors: Tensor) -> Tensor:
        """V K (b, n) of vectors (b, n) and the kernel summed over outputs, Σ_a K_aa."""
        found = torch.zeros_like(vectors)
        step = max(1, self._memory // (_count(self._parameters) * self.like.element_size()))
        for output in range(self._c):
            for few, sums in zip(vectors.split(step), found.split(step), strict=True):
                weights = few.new_zeros(*few.shape, self._c)
                weights[:, :, output] = few
                sums += self._products(weights)[:, :, output]
        return found

    def _products(self, vectors: Tensor) -> Tensor:
        """J Jᵀ v (b, n, c) of vectors (b, n, c)."""
        at = [len(block) for block in self._blocks]
        pulled = self.like.new_zeros(len(vectors), _count(self._parameters))
        for block, weights in zip(self._blocks, vectors.split(at, dim=1), strict=True):
            jacobian = _Jacobian(self._model, self._parameters, block)
            for row, weight in zip(pulled, weights, strict=True):
                row += jacobian.transposed_times(weight.reshape(-1))
        found = torch.empty_like(vectors)
        for block, part in zip(self._blocks, found.split(at, dim=1), strict=True):
            jacobian = _Jacobian(self._model, self._parameters, block)
            for one, row in zip(part, pulled, strict=True):
                one.copy_(jacobian.times(row).view(one.shape))
        return found


class GaussNewtonOperator(ModelOperator):
    """v -> Jᵀ (∂²L/∂f²) (J v), the Hessian less the curvature of the model.

    Args:
        model: maps (n, ...) to (n, c).
        loss: (prediction, target) -> scalar, twice differentiable in the prediction.
        x: examples.
        y: targets.

    Raises:
        InputError: if the model has nothing to train.
    """

    def __init__(self, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> None:
        parameters = _trained(model)
        self._jacobian = _Jacobian(model, parameters, x)
        self._prediction = self._jacobian.prediction.detach().requires_grad_()
        self._slope = _gradient(loss, self._prediction, y, [self._prediction])
        super().__init__(parameters, 2 * (_count(parameters),))

    def _product(self, vector: Tensor) -> Tensor:
        return self._jacobian.transposed_times(_pull(self._slope, [self._prediction], self._jacobian.times(vector)))

    def _adjoint(self) -> LinearOperator:
        return self


class HessianOperator(ModelOperator):
    """v -> H v, the derivative of one gradient whose graph is kept.

    Args:
        model: maps (n, ...) to (n, c).
        loss: (prediction, target) -> scalar, twice differentiable.
        x: examples.
        y: targets.

    Attributes:
        gradient: ∂L/∂θ (p,), which the products need anyway and a training step can use.

    Raises:
        InputError: if the model has nothing to train.
    """

    def __init__(self, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> None:
        parameters = _trained(model)
        with torch.enable_grad():
            prediction = model(x)
        self._slope = _gradient(loss, prediction, y, parameters)
        self.gradient = self._slope.detach()
        super().__init__(parameters, 2 * (_count(parameters),))

    def gradients(self, vectors: Tensor) -> Tensor:
        """∂(u_iᵀ H u_j)/∂θ (k, k, p) for all pairs of the columns of u (p, k), which are held fixed.

        At a simple eigenvalue of H and its unit eigenvector u that is the gradient of the eigenvalue. It takes third
        derivatives of the model, for which torch's own layer norm has a wrong formula.
        """
        k = vectors.shape[1]
        found = vectors.new_empty(k, k, self.shape[0])
        for j in range(k):
            with torch.enable_grad():
                image = _pull(self._slope, self._parameters, vectors[:, j], create_graph=True)
            for i in range(j + 1):
                found[i, j] = found[j, i] = _pull(image, self._parameters, vectors[:, i])
        return found

    def _product(self, vector: Tensor) -> Tensor:
        return _pull(self._slope, self._parameters, vector)

    def _adjoint(self) -> LinearOperator:
        return self


class Preconditioned:
    """v -> P^(-1/2) A P^(-1/2) v, a symmetric matrix with the eigenvalues of P⁻¹ A, as `spectra.lanczos` takes it.

    Args:
        operator: A (p, p), symmetric.
        diagonal: that of P (p,), positive.

    Attributes:
        shape: (p, p).
        like: a tensor of the dtype and on the device on which `apply` works.
    """

    def __init__(self, operator: ModelOperator, diagonal: Tensor) -> None:
        self._operator, self._scale = operator, diagonal.rsqrt()
        self.shape, self.like = operator.shape, operator.like

    def apply(self, vector: Tensor) -> Tensor:
        """The product with a vector."""
        return self._scale * self._operator.apply(self._scale * vector)


class _Jacobian:
    """J of a model on examples, by two graphs: that of f, and that of w -> Jᵀ w, whose derivative is Jᵀ.

    A backward pass through the first is a product with Jᵀ, one through the second a product with J.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], x: Tensor) -> None:
        self._parameters = parameters
        with torch.enable_grad():
            self.prediction = model(x)
            self._weight = torch.zeros_like(self.prediction, requires_grad=True)
            self._pulled = flat(
                torch.autograd.grad(
                    self.prediction, parameters, self._weight, create_graph=True, materialize_grads=True
                )
            )
        self.size = self.prediction.numel()

    def transposed_times(self, vector: Tensor) -> Tensor:
        """Jᵀ v (p,), for v (nc,)."""
        return _pull(self.prediction, self._parameters, vector)

    def times(self, vector: Tensor) -> Tensor:
        """J u (nc,), for u (p,)."""
        return _pull(self._pulled, [self._weight], vector)


def _trained(model: nn.Module) -> list[Tensor]:
    """The parameters with requires_grad, of one dtype and on one device."""
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameter with requires_grad: its operators are empty")
    kinds = {(str(parameter.dtype), str(parameter.device)) for parameter in parameters}
    if len(kinds) > 1:
        raise InputError(
            f"parameters of {type(model).__name__} are {sorted(kinds)}: must be of one dtype, on one device"
        )
    return parameters


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gradient(loss: Loss, prediction: Tensor, target: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The flat gradient of the loss, with a graph of its own."""
    with torch.enable_grad():
        return flat(torch.autograd.grad(loss(prediction, target), inputs, create_graph=True, materialize_grads=True))


def _pull(output: Tensor, inputs: Sequence[Tensor], vector: Tensor, *, create_graph: bool = False) -> Tensor:
    """(∂output/∂inputs)ᵀ v, flat, by one backward pass; the graph is kept, and the result has one if asked for."""
    if not output.requires_grad:  # a constant, as the slope of a linear loss
        return vector.new_zeros(_count(inputs))
    weight = vector.reshape(output.shape)
    pulled = torch.autograd.grad(
        output, inputs, weight, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return flat(pulled)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of the parameters as one vector (p,), in their order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
