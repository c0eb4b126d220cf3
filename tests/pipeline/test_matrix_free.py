"""What is measured by products against the kernel that is formed, and the error bars against many seeds."""

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from pipeline import matrix_free as products
from pipeline.spectra import NonFiniteKernel, frobenius_norm, leading_pairs


def problem(n, c, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, c)).to(dtype)
    return model, torch.randn(n, 3, dtype=dtype), torch.randn(n, c, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [1, 3])
def test_it_is_what_the_formed_kernel_gives(c, dtype, monkeypatch):
    monkeypatch.setattr(products, "EXAMPLES", 7)
    monkeypatch.setattr(products, "DIAGONAL", 5)
    model, x, y = problem(24, c, dtype)
    before = [tensor.clone() for tensor in model.parameters()]
    found = products.matrix_free(model, x, y, 4, 1e-8)
    full = oracles.ntk(model, x)
    kernel, targets = oracles.trace(full), y.numpy().astype(float)
    values, vectors = np.linalg.eigh(kernel)
    np.testing.assert_allclose(found["eigenvalue"], values[:-5:-1], rtol=1e-10)
    np.testing.assert_allclose(np.abs(found["eigenvector"].T @ vectors[:, :-5:-1]), np.eye(4), atol=1e-7)
    top = np.linalg.eigvalsh(full.swapaxes(1, 2).reshape(24 * c, -1))[-1]
    np.testing.assert_allclose(found["ntk_sharpness"], top / 24, rtol=1e-9)
    np.testing.assert_allclose(found["trace"], np.trace(kernel), rtol=1e-6)
    np.testing.assert_allclose(found["target_energy"], np.einsum("nc,nc->", targets, kernel @ targets), rtol=1e-9)
    np.testing.assert_allclose(found["prediction"], model(x).detach(), rtol=1e-5, atol=1e-6)
    assert abs(found["frobenius_norm"] - np.linalg.norm(kernel)) < 5 * found["frobenius_error"]
    assert found["frobenius_error"] < 0.01 * found["frobenius_norm"]
    for tensor, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(tensor, kept)


def test_without_targets_there_is_no_energy():
    model, x, _ = problem(8, 1)
    assert "target_energy" not in products.matrix_free(model, x, None, 2, 1e-8)


def test_residuals_bound_the_error_of_loose_pairs():
    """Some eigenvalue lies within the residual of each value, however few products there were."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(700, 700)))[0]
    exact = np.arange(1, 701.0) ** -0.7
    kernel = (q * exact) @ q.T
    for tolerance in (0.3, 1e-1, 1e-2, 1e-3):
        found = leading_pairs(lambda rows: rows @ kernel, 700, 20, 1.0, tolerance=tolerance)
        nearest = np.abs(found.values[:, None] - exact).min(axis=1)
        assert (nearest <= found.residuals + 1e-12).all()
        assert found.residuals.max() <= tolerance * found.values[0]


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_standard_error_covers_the_norm_over_seeds(decay):
    """Of normal errors 95 % lie within two standard errors; with 16 samples, Student's t, 94 %."""
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    kernel = (q * np.arange(1, 301.0) ** -decay) @ q.T
    pairs = leading_pairs(lambda rows: rows @ kernel, 300, 10, 1.0)
    exact, inside, sizes = np.linalg.norm(kernel), 0, []
    for seed in range(200):
        norm, error = frobenius_norm(lambda rows: rows @ kernel, pairs, seed=seed)
        inside += abs(norm - exact) <= 2 * error
        sizes.append(error)
    assert 175 <= inside <= 199
    assert np.mean(sizes) < 0.05 * exact


def test_no_norm_without_a_kernel():
    pairs = leading_pairs(lambda rows: 0 * rows, 20, 2, 1.0)
    assert frobenius_norm(lambda rows: 0 * rows, pairs) == (0.0, 0.0)


def test_what_is_not_finite_is_said():
    model, x = nn.Linear(3, 1).double(), torch.ones(8, 3, dtype=torch.float64)
    x[3] = 1e200
    with pytest.raises(NonFiniteKernel, match="a product with the kernel is not finite"):
        products.matrix_free(model, x, None, 2, 1e-8)
