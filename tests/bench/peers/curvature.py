"""The Hessian as code in circulation has it, for the peers of the sharpness."""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> LinearOperator:
    """The Hessian of (1/2n) |f - y|^2, whose products build the gradient's graph anew."""
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)

    def product(vector: np.ndarray) -> np.ndarray:
        loss = (model(x) - y).square().sum() / (2 * len(x))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        direction = torch.from_numpy(vector.astype(np.float32).reshape(-1))
        products = torch.autograd.grad(gradient @ direction, parameters)
        return torch.cat([product.flatten() for product in products]).numpy()

    return LinearOperator((size, size), product, dtype=np.float32)
