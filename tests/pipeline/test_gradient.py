"""The full-batch gradient, whole and in parts, against autograd on one batch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import InputError
from pipeline.gradient import PART, FullBatch, MiniBatches
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, PART + 3])
def test_some_examples_have_the_gradient_of_their_own_loss(name, size):
    model, x, y = problem(name, 2 * PART)
    plain, some = copy.deepcopy(model), torch.randperm(2 * PART)[:size]
    value = LOSSES["mse"](plain(x[some]), y[some])
    expected = torch.autograd.grad(value, list(plain.parameters()))
    found = FullBatch(model, LOSSES["mse"], x, y).gradient(list(model.parameters()), some)
    assert found.loss == pytest.approx(value.item(), rel=1e-12)
    for gradient, reference in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-14)


@given(n=st.integers(1, 30), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_takes_no_example_twice_and_the_next_one_is_another(n, data, seed):
    size = data.draw(st.integers(1, n))
    batches = MiniBatches(n, size, seed)
    per_epoch = n // size
    epochs = [[batches.examples(epoch * per_epoch + i).tolist() for i in range(per_epoch)] for epoch in range(3)]
    for epoch in epochs:
        taken = [example for batch in epoch for example in batch]
        assert len(set(taken)) == len(taken) == per_epoch * size
        assert set(taken) <= set(range(n))
    if n >= 20 and size < n:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [MiniBatches(n, size, seed + 1).examples(i).tolist() for i in range(per_epoch)]


def test_batches_are_the_same_wherever_they_are_taken_up():
    batches = MiniBatches(11, 4, 0)
    late = batches.examples(7)
    for step in range(7):
        batches.examples(step)
    assert torch.equal(batches.examples(7), late)
    assert torch.equal(MiniBatches(11, 4, 0).examples(7), late)


def test_a_batch_of_more_examples_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"update.batch_size = 12: must be at most the 11 examples"):
        MiniBatches(11, 12, 0)
