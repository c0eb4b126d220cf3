"""Residual networks without normalisation, so that examples stay apart and every derivative is a plain function's."""

from typing import Any

from torch import nn

from pipeline.images import image_shape
from pipeline.models.layers import ACTIVATIONS, Layers, Mean, Multiplied, Residual


def resnet(options: Any, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A convolution, B blocks h ← S(h) + F(h) / √B, and a linear head on the mean of φ(h) over places.

    F is φ, a convolution, φ and a convolution; all are 3 x 3. The factor in place of a normalisation keeps h and its
    gradients bounded in B. Each stage but the first halves the images and doubles their channels in its first block,
    where S is a 1 x 1 convolution of stride 2; elsewhere S is the identity.

    Args:
        options: `width`, channels of the first stage; `blocks` of each stage; `activation` φ, one of `ACTIVATIONS`; and
            what `Layers` takes, by default W ~ N(0, 2 / fan_in) and b = 0.
        input_shape: (channels, height, width) of one example.
        outputs: c.

    Raises:
        InputError: if the examples are no images.

    Source: He, Zhang, Ren, Sun (2016), arXiv 1603.05027 (the blocks, with batch norms); Hayou, Clerico, He,
    Deligiannidis, Doucet, Rousseau (2021), arXiv 2010.12859 (the factor, their uniform scaling).
    """
    make = Layers.of(options, init="he_normal")
    inputs, *_ = image_shape(options.name, input_shape)
    activation, scale = ACTIVATIONS[options.activation], sum(options.blocks) ** -0.5
    modules: list[nn.Module] = [make.conv(inputs, options.width)]
    before = options.width
    for stage, blocks in enumerate(options.blocks):
        width = options.width * 2**stage
        for block in range(blocks):
            halves = stage > 0 and block == 0
            convs = make.conv(before, width, stride=1 + halves), make.conv(width, width)
            branch = nn.Sequential(activation(), convs[0], activation(), convs[1], Multiplied(scale))
            modules.append(Residual(branch, make.conv(before, width, 1, stride=2) if halves else nn.Identity()))
            before = width
    return make.network(*modules, activation(), Mean(2, 3), make.linear(before, outputs, last=True))
