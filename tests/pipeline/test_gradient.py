"""The full-batch gradient, whole and in parts, against autograd on one batch."""

import copy

import pytest
import torch
from torch import nn

from pipeline.gradient import PART, FullBatch
from pipeline.losses import LOSSES


class Viewing(nn.Module):
    """Wants its images in torch's usual order."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 1)

    def forward(self, x):
        return self.head(self.conv(x.view(len(x), -1).view(x.shape)).reshape(len(x), -1))


MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), (6,)),
    "conv2d": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)), (2, 6, 6)),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)), (2, 6)),
    "a view of the images": lambda: (Viewing(), (2, 6, 6)),
}


def problem(name, n, dtype=torch.float64):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    return model.to(dtype), torch.randn(n, *shape, dtype=dtype), torch.sign(torch.randn(n, 1, dtype=dtype))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [1, PART, 2 * PART + 5])
def test_parts_add_up_to_the_gradient_of_the_batch(name, loss, n):
    model, x, y = problem(name, n)
    plain = copy.deepcopy(model)
    value = LOSSES[loss](plain(x), y)
    expected = torch.autograd.grad(value, list(plain.parameters()))
    found = FullBatch(model, LOSSES[loss], x, y).gradient(list(model.parameters()))
    assert found.loss == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(found.prediction, plain(x).detach(), rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-14)


def test_a_network_without_convolutions_has_the_bits_of_one_batch():
    model, x, y = problem("mlp", 300, torch.float32)
    loss = LOSSES["mse"](model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = FullBatch(model, LOSSES["mse"], x, y).gradient(list(model.parameters()))
    assert found.loss == loss.item()
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_the_same_every_time(name):
    found = []
    for _ in range(2):
        model, x, y = problem(name, 2 * PART + 5, torch.float32)
        found.append(FullBatch(model, LOSSES["mse"], x, y).gradient(list(model.parameters())))
    assert found[0].loss == found[1].loss
    assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, found[1].gradients, strict=True))


def test_images_go_channels_last_where_the_model_takes_them():
    model, x, y = problem("conv2d", 4)
    seen = []
    model[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    FullBatch(model, LOSSES["mse"], x, y).gradient(list(model.parameters()))
    assert seen[-1]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    model, x, y = problem("a view of the images", 4)
    FullBatch(model, LOSSES["mse"], x, y)
    assert not model.conv.weight.is_contiguous(memory_format=torch.channels_last)
