"""The models by name, and a freshly initialised one of a run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.models.cnn import cnn
from pipeline.models.dense import deep_linear, mlp, two_layer_linear
from pipeline.models.imported import import_model
from pipeline.models.resnet import resnet
from pipeline.models.vit import vit
from pipeline.seeds import stream

MODELS: dict[str, Callable[[Any, tuple[int, ...], int], nn.Module]] = {
    "mlp": mlp,
    "two_layer_linear": two_layer_linear,
    "deep_linear": deep_linear,
    "cnn": cnn,
    "vit": vit,
    "resnet": resnet,
    "import": import_model,
}


def build_model(options: Any, input_shape: tuple[int, ...], outputs: int, seed: int, dtype: torch.dtype) -> nn.Module:
    """A freshly initialised model on the CPU.

    The weights are drawn in float32 from the stream "init" of `seed` and converted, so that a run in float64 starts
    where the run in float32 does. The global generator is left as it was.

    Args:
        options: the study's model table; `options.name` is an entry of `MODELS`.
        input_shape: shape of one example.
        outputs: c.
        seed: the run's seed.
        dtype: of the parameters.

    Raises:
        InputError: if the model does not take such examples, or the user's model cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also seed the accelerators, which fork_rng does not save here.
        torch.default_generator.manual_seed(int(stream(seed, "init").integers(2**63)))
        model = MODELS[options.name](options, input_shape, outputs)
    return model.to(dtype)
