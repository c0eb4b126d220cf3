"""Models: sizes, seeds, and a user's own by import path."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.models import ACTIVATIONS, MODELS, build_model
from pipeline.seeds import stream


def mlp(width=64, depth=2, activation="tanh"):
    return SimpleNamespace(name="mlp", width=width, depth=depth, activation=activation)


def imported(path, **options):
    return SimpleNamespace(name="import", import_path=path, options=options)


def build(options, input_shape=(64,), outputs=1, seed=0, dtype=torch.float32):
    return build_model(options, input_shape, outputs, seed, dtype)


# --- mlp -------------------------------------------------------------------------------------------------------------


def test_the_digits_network_has_8385_parameters():
    model = build(mlp())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8385
    assert [type(layer).__name__ for layer in model] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("input_shape", [(5,), (1, 3, 4)], ids=str)
def test_shapes(activation, depth, input_shape):
    model = build(mlp(7, depth, activation), input_shape, outputs=3)
    assert model(torch.zeros(2, *input_shape)).shape == (2, 3)
    assert sum(isinstance(layer, ACTIVATIONS[activation]) for layer in model) == depth
    features = int(np.prod(input_shape))
    sizes = [features, *[7] * depth, 3]
    expected = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_initialisation_is_torchs_default():
    weight = build(mlp())[2].weight
    bound = 1 / 8  # uniform on ±1/√64
    assert bound * 0.98 < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.03)


# --- seeds -----------------------------------------------------------------------------------------------------------


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_the_seed_alone_decides_the_weights():
    first = flat(build(mlp(), seed=1))
    torch.rand(3)
    assert torch.equal(first, flat(build(mlp(), seed=1)))
    assert not torch.equal(first, flat(build(mlp(), seed=2)))


def test_float64_starts_where_float32_does():
    single, double = flat(build(mlp())), flat(build(mlp(), dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_the_weights_are_those_of_the_stream_init():
    torch_seed = int(stream(4, "init").integers(2**63))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        expected = nn.Linear(3, 5)
    assert torch.equal(build(mlp(width=5, depth=1), (3,), seed=4)[0].weight, expected.weight)


def test_the_global_generator_is_left_as_it_was():
    before = torch.random.get_rng_state()
    build(mlp())
    assert torch.equal(before, torch.random.get_rng_state())


# --- import ----------------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

calls = []

def linear(input_shape, outputs, bias=True):
    calls.append((input_shape, outputs, bias))
    return nn.Linear(input_shape[0], outputs, bias=bias)

def normalised(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 4), nn.BatchNorm1d(4), nn.Dropout().eval(), nn.Linear(4, outputs))

def raises(input_shape, outputs):
    raise KeyError("some key")

def number(input_shape, outputs):
    return 3

def flat(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 1), nn.Flatten(0))

def pair(input_shape, outputs):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(1, 1)

def wrong_features(input_shape, outputs):
    return nn.Linear(input_shape[0] + 1, outputs)

def frozen(input_shape, outputs):
    return nn.Linear(input_shape[0], outputs).requires_grad_(False)

not_callable = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(SOURCE)
    (tmp_path / "users_broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("users_models", None)


@pytest.mark.usefixtures("user_module")
def test_an_imported_model_gets_shapes_and_options():
    model = build(imported("users_models:linear", bias=False), (5,), outputs=2, dtype=torch.float64)
    assert sys.modules["users_models"].calls == [((5,), 2, False)]
    assert model.weight.shape == (2, 5)
    assert model.weight.dtype == torch.float64
    assert torch.equal(model.weight, build(imported("users_models:linear", bias=False), (5,), 2).weight.double())


@pytest.mark.usefixtures("user_module")
def test_trying_an_imported_model_changes_neither_modes_nor_statistics():
    model = build(imported("users_models:normalised"), (5,))
    assert [layer.training for layer in model] == [True, True, False, True]
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_such_module:model", {}, r"importing no_such_module failed: ModuleNotFoundError"),
        ("users_broken:model", {}, r"importing users_broken failed: .*no_such_package_at_all"),
        ("users_models:absent", {}, r"users_models has no callable absent"),
        ("users_models:not_callable", {}, r"has no callable not_callable"),
        ("users_models:raises", {}, r"calling it with input_shape, outputs failed: KeyError: 'some key'"),
        ("users_models:linear", {"depth": 3}, r"calling it with input_shape, outputs, depth failed: TypeError"),
        ("users_models:number", {}, r"it returned a int; it must return a torch\.nn\.Module"),
        ("users_models:flat", {}, r"on 2 examples gave \(2,\); it must give \(2, 1\)"),
        ("users_models:pair", {}, r"on 2 examples gave tuple; it must give \(2, 1\)"),
        ("users_models:wrong_features", {}, r"a forward pass on 2 examples of shape \(5,\) failed: RuntimeError"),
        ("users_models:frozen", {}, r"no parameter with requires_grad"),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value and " " not in value else "",
)
def test_an_imported_model_that_cannot_be_used(path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(imported(path, **options), (5,))
    assert str(caught.value).startswith(f"model.import = {path}: ")
    assert "\n" not in str(caught.value)


# --- every entry -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_examples_to_outputs(name):
    options = {"mlp": mlp(), "import": imported("users_models:linear")}[name]
    model = build(options, (6,), outputs=4)
    assert model(torch.zeros(3, 6)).shape == (3, 4)
