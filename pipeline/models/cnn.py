"""Plain convolutional networks."""

import itertools
from typing import Any

from torch import nn

from pipeline.images import image_shape
from pipeline.models.layers import ACTIVATIONS, Layers

POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def cnn(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """For each entry of `channels` a 3 x 3 convolution, φ and 2 x 2 pooling; then a linear head, or two linear layers.

    Args:
        options: `channels`; `activation` φ, one of `ACTIVATIONS`; `pooling`, one of `POOLINGS`; `hidden`, the width of
            a layer before the head, or None for no such layer; `bias`, of all layers but the last, which always has
            one; and what `Layers` takes, by default PyTorch's initialisation.
        input_shape: (channels, height, width) of one example.
        outputs: c.

    Raises:
        InputError: if the examples are no images, or pooled to nothing.

    Source: Cohen, Kaur, Li, Kolter, Talwalkar (2021), arXiv 2103.00065, for channels 32 and 32 and max pooling; Cohen,
    Damian, Talwalkar, Kolter, Lee (2024), arXiv 2410.24206, for 32 and 64, average pooling, GELU, hidden 128, no bias.
    """
    make, shrunk = Layers.of(options), 2 ** len(options.channels)
    inputs, height, width = image_shape(options.name, input_shape, least=shrunk)
    modules: list[nn.Module] = []
    for a, b in itertools.pairwise((inputs, *options.channels)):
        activation, pooling = ACTIVATIONS[options.activation](), POOLINGS[options.pooling](2)
        modules += [make.conv(a, b, bias=options.bias), activation, pooling]
    modules.append(nn.Flatten())
    features = options.channels[-1] * (height // shrunk) * (width // shrunk)
    if options.hidden is not None:
        modules += [make.linear(features, options.hidden, bias=options.bias), ACTIVATIONS[options.activation]()]
        features = options.hidden
    return make.network(*modules, make.linear(features, outputs, last=True))
