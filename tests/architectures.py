"""Models for property tests of kernels: a table of every kind, a table that must be refused, and random ones.

    CASES[name]()    -> (model, x)         each maps x, n examples, to (n, c); float64; always the same
    REFUSED[name]()  -> (model, x)         mixes its examples or draws random numbers
    NO_VMAP[name]    -> reason             cases that torch.func.vmap cannot batch
    mlps(), convnets(), sequences()        hypothesis strategies for (model, x1, x2), some tensors frozen;
                                           torch.func.vmap can batch them all, some with a warning of slowness

x is a tensor, or a dict or tuple of tensors, nested, each with the examples along its first axis; `model(x)` takes it
as one argument. Every parameter, those of norms included, is moved from the value that it starts with: a scale of 1 or
a shift of 0 would hide mistakes. Buffers with running statistics are moved too.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

N = 5  # examples
C = 2  # outputs
T = 4  # tokens or positions

Factory = Callable[[], tuple[nn.Module, Any]]


# --- helpers ---------------------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    """In float64, with no parameter or running statistic at the value that it starts with."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def case(build: Callable[[], tuple[nn.Module, Any]], seed: int = 0) -> Factory:
    """`build` under a seed of its own, which leaves the global generator as it was."""

    def factory() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, x = build()
            return moved(model), x

    return factory


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(n: int = N, length: int = T, vocabulary: int = 7) -> Tensor:
    return torch.randint(vocabulary, (n, length))


def with_head(*layers: nn.Module, x: Any, c: int = C) -> nn.Sequential:
    """`layers`, then one Linear on all that they give."""
    body = nn.Sequential(*layers)
    with torch.no_grad():
        features = copy.deepcopy(body).double().eval()(x).flatten(1).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, c))


def on(x: Any, *layers: nn.Module, c: int = C) -> tuple[nn.Module, Any]:
    return with_head(*layers, x=x, c=c), x


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


class Call(nn.Module):
    """What a function does with a tensor, and with the modules that it is given."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module):
        super().__init__()
        self.function, self.modules_ = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.modules_)


class MeanOverTokens(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


# --- layers of one kind ----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "PReLU": nn.PReLU,
    "PReLU per channel": lambda: nn.PReLU(6),
    "RReLU in eval mode": lambda: nn.RReLU().eval(),
    "ELU": nn.ELU,
    "ELU in place": lambda: nn.ELU(inplace=True),
    "CELU": lambda: nn.CELU(0.7),
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Mish": nn.Mish,
    "Sigmoid": nn.Sigmoid,
    "LogSigmoid": nn.LogSigmoid,
    "Softplus": nn.Softplus,
    "Softsign": nn.Softsign,
    "Softshrink": lambda: nn.Softshrink(0.1),
    "Hardshrink": lambda: nn.Hardshrink(0.1),
    "Tanhshrink": nn.Tanhshrink,
    "Hardtanh": nn.Hardtanh,
    "Hardtanh in place": lambda: nn.Hardtanh(inplace=True),
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish": nn.Hardswish,
    "Threshold": lambda: nn.Threshold(0.1, 0.5),
    "Identity": nn.Identity,
    "Softmax over features": lambda: nn.Softmax(dim=-1),
    "LogSoftmax over features": lambda: nn.LogSoftmax(dim=-1),
    "GLU": nn.GLU,
    "Dropout of nothing": lambda: nn.Dropout(0.0),
    "Dropout in eval mode": lambda: nn.Dropout(0.5).eval(),
}

IMAGE = (N, 4, 6, 6)
SIGNAL = (N, 4, 9)
VOLUME = (N, 2, 4, 4, 4)

# Each on an input of the shape given, then Tanh and a Linear.
LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "Conv1d": (SIGNAL, lambda: nn.Conv1d(4, 3, 3)),
    "Conv1d without bias": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, bias=False)),
    "Conv1d stride 2 padding 1": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1)),
    "Conv1d same dilation 2": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, padding="same", dilation=2)),
    "Conv1d valid": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, padding="valid")),
    "Conv1d circular": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular")),
    "Conv1d reflect": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="reflect")),
    "Conv1d replicate": (SIGNAL, lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="replicate")),
    "Conv1d groups 2": (SIGNAL, lambda: nn.Conv1d(4, 6, 3, groups=2)),
    "Conv1d of width 1": (SIGNAL, lambda: nn.Conv1d(4, 3, 1)),
    "Conv2d": (IMAGE, lambda: nn.Conv2d(4, 3, 3)),
    "Conv2d without bias": (IMAGE, lambda: nn.Conv2d(4, 3, 3, bias=False)),
    "Conv2d stride (2, 1) padding (1, 2)": (IMAGE, lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 2))),
    "Conv2d stride 2 that leaves a border": (IMAGE, lambda: nn.Conv2d(4, 3, 3, stride=2)),
    "Conv2d stride wider than the kernel": (IMAGE, lambda: nn.Conv2d(4, 3, 2, stride=3)),
    "Conv2d patches": (IMAGE, lambda: nn.Conv2d(4, 3, 3, stride=3)),
    "Conv2d same": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding="same")),
    "Conv2d same of even width": (IMAGE, lambda: nn.Conv2d(4, 3, (2, 4), padding="same")),
    "Conv2d same dilation 2": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2)),
    "Conv2d valid": (IMAGE, lambda: nn.Conv2d(4, 3, (2, 3), padding="valid")),
    "Conv2d dilation (1, 2)": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding=1, dilation=(1, 2))),
    "Conv2d circular": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="circular")),
    "Conv2d reflect": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding=(2, 1), padding_mode="reflect")),
    "Conv2d replicate same": (IMAGE, lambda: nn.Conv2d(4, 3, 3, padding="same", padding_mode="replicate")),
    "Conv2d groups 2": (IMAGE, lambda: nn.Conv2d(4, 6, 3, groups=2)),
    "Conv2d depthwise": (IMAGE, lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1)),
    "Conv2d of width 1": (IMAGE, lambda: nn.Conv2d(4, 3, 1)),
    "Conv2d as wide as its input": (IMAGE, lambda: nn.Conv2d(4, 3, 6)),
    "Conv2d on one channel": ((N, 1, 6, 6), lambda: nn.Conv2d(1, 3, 3)),
    "Conv3d": (VOLUME, lambda: nn.Conv3d(2, 3, 3, padding=1)),
    "Conv3d stride 2 groups 2": (VOLUME, lambda: nn.Conv3d(2, 4, 2, stride=2, groups=2)),
    "ConvTranspose1d": (SIGNAL, lambda: nn.ConvTranspose1d(4, 3, 3, stride=2)),
    "ConvTranspose2d": (IMAGE, lambda: nn.ConvTranspose2d(4, 3, 3)),
    "ConvTranspose2d stride 2 output padding 1": (
        IMAGE,
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
    ),
    "MaxPool2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.MaxPool2d(2))),
    "MaxPool2d overlapping": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.MaxPool2d(3, stride=1, padding=1))),
    "AvgPool2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.AvgPool2d(2))),
    "AdaptiveAvgPool2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1))),
    "AdaptiveMaxPool1d": (SIGNAL, lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.AdaptiveMaxPool1d(2))),
    "Upsample": (SIGNAL, lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Upsample(scale_factor=2))),
    "Pad": (IMAGE, lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 3, 3))),
    "PixelShuffle": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.PixelShuffle(2))),
    "LayerNorm": ((N, 6), lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))),
    "LayerNorm first": ((N, 6), lambda: nn.LayerNorm(6)),
    "LayerNorm on tokens": ((N, T, 6), lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))),
    "LayerNorm over two axes": ((N, T, 6), lambda: nn.LayerNorm((T, 6))),
    "LayerNorm without bias": ((N, 6), lambda: nn.LayerNorm(6, bias=False)),
    "LayerNorm without parameters": ((N, 6), lambda: nn.LayerNorm(6, elementwise_affine=False)),
    "GroupNorm": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6))),
    "GroupNorm on features": ((N, 6), lambda: nn.GroupNorm(2, 6)),
    "InstanceNorm1d": (SIGNAL, lambda: nn.InstanceNorm1d(4, affine=True)),
    "InstanceNorm2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, affine=True))),
    "BatchNorm1d in eval mode": ((N, 6), lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()),
    "BatchNorm1d on tokens in eval mode": (SIGNAL, lambda: nn.BatchNorm1d(4).eval()),
    "BatchNorm2d in eval mode": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)).eval()),
    "BatchNorm2d without parameters": (IMAGE, lambda: nn.BatchNorm2d(4, affine=False).eval()),
    "RMSNorm": ((N, T, 6), lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5))),
    "LocalResponseNorm": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.LocalResponseNorm(2))),
    "PReLU on channels": (IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.PReLU(3))),
    "Linear on tokens": ((N, T, 6), lambda: nn.Linear(6, 3)),
    "Linear on tokens without bias": ((N, T, 6), lambda: nn.Linear(6, 3, bias=False)),
    "Linear on two axes of positions": ((N, 2, 3, 6), lambda: nn.Linear(6, 3)),
    "two Linear on many tokens": ((N, 12, 3), lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))),
    "Unfold": (IMAGE, lambda: nn.Sequential(nn.Unfold(3), Call(lambda x, layer: layer(x.mT), nn.Linear(36, 2)))),
}


# --- user code -------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A layer with free parameters: scale * x + shift."""

    def __init__(self, *shape):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return self.scale * x + self.shift


class Matrix(nn.Module):
    """A matrix of its own, used by `function(x, matrix)`."""

    def __init__(self, *shape, function=torch.matmul):
        super().__init__()
        self.matrix, self.function = nn.Parameter(torch.randn(*shape) / shape[0] ** 0.5), function

    def forward(self, x):
        return self.function(x, self.matrix)


class Residual(nn.Module):
    """x + body(x), or with `x += y` in place on a fresh tensor."""

    def __init__(self, body, in_place=False):
        super().__init__()
        self.body, self.in_place = body, in_place

    def forward(self, x):
        if self.in_place:
            y = self.body(x)
            y += x
            return y
        return x + self.body(x)


class AccumulatedStream(nn.Module):
    """A residual stream that every block adds to in place, after the block's first layer has seen it."""

    def __init__(self, d, c):
        super().__init__()
        self.first = nn.Linear(d, d)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(d, d), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(d, c)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            x += y
        return self.head(x)


class InPlaceAfterLinear(nn.Module):
    """Changes what a Linear gave, in place, before anything else sees it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, C)

    def forward(self, x):
        h = self.first(x)
        h *= 2
        h[:, 1] = 0.5
        return self.second(h.tanh_())


class Functional(nn.Module):
    """Uses the weight of a module by function, `times` times, and calls the module too if `also_called`."""

    def __init__(self, times=1, also_called=False):
        super().__init__()
        self.l, self.head = nn.Linear(6, 6), nn.Linear(6, C)
        self.times, self.also_called = times, also_called

    def forward(self, x):
        if self.also_called:
            x = torch.tanh(self.l(x))
        for _ in range(self.times):
            x = torch.tanh(F.linear(x, self.l.weight))
        return self.head(x)


class HalfFunctional(nn.Module):
    """Calls a module whose bias alone it uses elsewhere."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(6, 6), nn.Linear(6, C)

    def forward(self, x):
        return self.head(torch.tanh(self.l(x)) * self.l.bias)


class Penalised(nn.Module):
    """Adds the squared norm of a called module's weight to its output."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(6, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(torch.tanh(self.l(x))) + self.l.weight.square().sum()


class Repeated(nn.Module):
    """One module called three times."""

    def __init__(self, layer, d):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(d, C)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x.flatten(1))


class TwoBranches(nn.Module):
    """One module on two parts of the example, a siamese network."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x[:, :3])) * torch.tanh(self.embed(x[:, 3:])))


class Autoencoder(nn.Module):
    """The decoder uses the encoder's weight, transposed; the code goes on to a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.shift = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, C)

    def forward(self, x):
        code = torch.tanh(self.encoder(x))
        return self.head(torch.tanh(code @ self.encoder.weight + self.shift))


class LanguageModel(nn.Module):
    """The read-out's weight is the embedding's."""

    def __init__(self, vocabulary=7, d=5, transposed=False):
        super().__init__()
        self.embed, self.transposed = nn.Embedding(vocabulary, d), transposed
        self.mix = nn.Linear(d, d)
        if not transposed:
            self.out = nn.Linear(d, vocabulary, bias=False)
            self.out.weight = self.embed.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.embed(x).mean(dim=1)))
        return h @ self.embed.weight.t() if self.transposed else self.out(h)


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C))
    model[2].weight = model[0].weight
    return model


def twice_in_a_sequential():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, C))


def tied_in_all():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


class Unused(nn.Module):
    """A module and a parameter that no output depends on."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(6, 4), nn.Linear(4, C)
        self.never_called, self.never_used = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(torch.tanh(self.l(x)))


class CalledForNothing(Unused):
    """Calls a module and drops what it gives."""

    def forward(self, x):
        self.never_called(x)
        return super().forward(x)


class OneOutputConstant(nn.Module):
    """An output that depends on no parameter, beside one that does."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 1)

    def forward(self, x):
        return torch.cat([self.l(x), x[:, :1]], dim=1)


class Temperature(nn.Module):
    """Parameters without axes."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, C)
        self.temperature, self.offset = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.l(x) / self.temperature + self.offset


class Detached(nn.Module):
    """Stops the gradient of one branch, which then counts as an input."""

    def __init__(self):
        super().__init__()
        self.gate, self.l = nn.Linear(6, C), nn.Linear(6, C)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)).detach() * self.l(x) + 0.1 * self.gate(x)


class BatchSecond(nn.Module):
    """Works on (T, n, d) inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x):
        h = torch.tanh(self.embed(x.transpose(0, 1)))
        return self.head(torch.tanh(self.mix(h)).mean(dim=0))


class BatchLast(nn.Module):
    """Works on (d, n) inside."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(C, 5))

    def forward(self, x):
        return (self.w2 @ torch.tanh(self.w1 @ x.T / 3)).T


class Merged(nn.Module):
    """Works on (n T, d) inside; with `batch_second`, on rows in the order (T n, d)."""

    def __init__(self, batch_second=False):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, C)
        self.batch_second = batch_second

    def forward(self, x):
        if self.batch_second:
            x = x.transpose(0, 1)
        one, two, d = x.shape
        h = torch.tanh(self.norm(self.embed(x.reshape(one * two, d)))).view(one, two, -1)
        return self.head(h.mean(dim=0 if self.batch_second else 1))


class TokenLoop(nn.Module):
    """A recurrent cell by hand: a Python loop over tokens, with a weight for each kind of step."""

    def __init__(self):
        super().__init__()
        self.input, self.state = nn.Linear(3, 5), nn.Linear(5, 5, bias=False)
        self.gate = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.decay, self.head = nn.Parameter(torch.full((5,), 0.5)), nn.Linear(5, C)

    def forward(self, x):
        state = x.new_zeros(len(x), 5)
        for step in range(x.shape[1]):
            update = torch.tanh(self.input(x[:, step]) + self.state(state))
            keep = torch.sigmoid(self.gate[step % 2](state))
            state = keep * self.decay * state + (1 - keep) * update
        return self.head(state)


class Cells(nn.Module):
    """An LSTMCell and a GRUCell in a loop."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(3, 4), nn.GRUCell(4, 3), nn.Linear(3, C)

    def forward(self, x):
        h, c, g = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4), x.new_zeros(len(x), 3)
        for step in x.unbind(dim=1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
        return self.head(g)


class Recurrent(nn.Module):
    """An nn.RNN, LSTM or GRU, the last of its outputs, a head."""

    def __init__(self, kind, **options):
        super().__init__()
        self.body = kind(3, 4, **options)
        self.head = nn.Linear(4 * (1 + self.body.bidirectional), C)

    def forward(self, x):
        if self.body.batch_first:
            return self.head(self.body(x)[0][:, -1])
        return self.head(self.body(x.transpose(0, 1))[0][-1])


class Experts(nn.Module):
    """A soft mixture by einsum over weights (expert, in, out)."""

    def __init__(self):
        super().__init__()
        self.gate, self.weight = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, C) / 2)

    def forward(self, x):
        return torch.einsum("ne,nd,edc->nc", torch.softmax(self.gate(x), dim=-1), x, self.weight)


class HyperNetwork(nn.Module):
    """A Linear computes the weight of another layer, one for each example."""

    def __init__(self):
        super().__init__()
        self.make, self.bias = nn.Linear(2, 3 * C), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        weight = self.make(x[:, :2]).view(-1, 3, C)
        return torch.bmm(x[:, None, 2:5], weight)[:, 0] + self.bias


class Positional(nn.Module):
    """Learned position added to tokens: a parameter that broadcasts over examples."""

    def __init__(self):
        super().__init__()
        self.position, self.l, self.head = nn.Parameter(torch.randn(T, 3)), nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(torch.tanh(self.l(x + self.position)).mean(dim=1))


class OnItsOwnParameter(nn.Module):
    """Calls a Linear on tokens and on learned ones, which have no axis of examples."""

    def __init__(self):
        super().__init__()
        self.learned, self.l, self.head = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(torch.tanh(self.l(x) + self.l(self.learned).mean(dim=0)).mean(dim=1))


class Reordered(nn.Module):
    """Its Linear sees the examples in reverse; what comes out is in order again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.flip(0))).flip(0))


class Doubled(nn.Module):
    """Its Linear sees two views of each example as a batch of 2n."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(6, 4), nn.Linear(4, C)

    def forward(self, x):
        one, two = torch.tanh(self.l(torch.cat([x, x**2]))).chunk(2)
        return self.head(one * two)


class Routed(nn.Module):
    """Each example goes through one of two layers, which sees only some of the rows."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(6, 4) for _ in range(2)), nn.Linear(4, C)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for which, expert in ((x[:, 0] > 0, self.experts[0]), (x[:, 0] <= 0, self.experts[1])):
            h[which] = torch.tanh(expert(x[which]))
        return self.head(h)


class Checkpointed(nn.Module):
    """Forgets its hidden layers and computes them again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(6, 5, c=4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Fourier(nn.Module):
    """A spectral layer: complex weights, stored as pairs of real numbers."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 2)), nn.Linear(6, C)

    def forward(self, x):
        return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.weight), n=6)))


class StraightThrough(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


# --- attention -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with one Linear for q, k and v."""

    def __init__(self, d, heads, fused=True):
        super().__init__()
        self.qkv, self.proj, self.heads, self.fused = nn.Linear(d, 3 * d), nn.Linear(d, d), heads, fused

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, d, heads, fused=True):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d, heads, fused), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches by Conv2d or Linear, a class token, learned positions, pre-LayerNorm blocks."""

    def __init__(self, patch="conv", d=6, depth=2, fused=True, c=C):
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(2, d, 3, stride=3) if patch == "conv" else nn.Linear(18, d)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.randn(1, 5, d) / 2)
        self.blocks = nn.Sequential(*(Block(d, 2, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, c)

    def forward(self, x):
        if self.patch == "conv":
            h = self.embed(x).flatten(2).transpose(1, 2)
        else:
            h = self.embed(x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        h = torch.cat([self.token.expand(len(x), -1, -1), h], dim=1) + self.position
        return self.head(self.norm(self.blocks(h))[:, 0])


class Multihead(nn.Module):
    """nn.MultiheadAttention on tokens or, without `batch_first`, with the batch second."""

    def __init__(self, need_weights=False, batch_first=True, **options):
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, C)

    def forward(self, x):
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        mixed, _ = self.attention(h, h, h, need_weights=self.need_weights)
        return self.head(mixed.mean(dim=1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    """Learned queries on tokens of another size."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)
        self.head = nn.Linear(8, C)

    def forward(self, x):
        mixed, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.head(mixed.flatten(1))


def encoder(norm_first=False, batch_first=True, training=False, depth=1, **options):
    """nn.TransformerEncoderLayer(s) without dropout, between an embedding and a mean over tokens."""
    layer = nn.TransformerEncoderLayer(
        4, 2, dim_feedforward=6, dropout=0.0, batch_first=batch_first, norm_first=norm_first, **options
    )
    body = layer if depth == 1 else nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    swap = nn.Identity() if batch_first else Call(lambda x: x.transpose(0, 1))
    model = nn.Sequential(nn.Linear(3, 4), swap, body, copy.deepcopy(swap), MeanOverTokens(), nn.Linear(4, C))
    return model.train(training)


# --- batches of several tensors --------------------------------------------------------------------------------------


class DictInput(nn.Module):
    """Takes {"tokens": (n, T) integers, "features": (n, d)}."""

    def __init__(self):
        super().__init__()
        self.embed, self.l, self.head = nn.Embedding(7, 4), nn.Linear(6, 4), nn.Linear(4, C)

    def forward(self, batch):
        return self.head(torch.tanh(self.embed(batch["tokens"]).mean(dim=1) + self.l(batch["features"])))


class TupleInput(nn.Module):
    """Takes (tokens (n, T, d), mask (n, T) of booleans): a mean over what the mask keeps."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, batch):
        x, mask = batch
        weights = mask.to(x.dtype)[:, :, None]
        return self.head((torch.tanh(self.l(x)) * weights).sum(dim=1) / weights.sum(dim=1))


class NestedInput(nn.Module):
    """Takes {"image": ..., "scalars": (one, two)}; the two share a Bilinear."""

    def __init__(self):
        super().__init__()
        self.conv, self.pair, self.head = nn.Conv2d(1, 2, 3), nn.Bilinear(3, 2, 2), nn.Linear(4, C)

    def forward(self, batch):
        image = torch.tanh(self.conv(batch["image"])).mean(dim=(2, 3))
        return self.head(torch.cat([image, self.pair(*batch["scalars"])], dim=1))


def mask(n: int = N, length: int = T) -> Tensor:
    kept = torch.rand(n, length) < 0.6
    kept[:, 0] = True
    return kept


# --- parametrisations and hooks --------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def parametrised(register: Callable[[nn.Linear], object]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C))
    register(model[0])
    return model


class Squared(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x) ** 2


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, C))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output + 1)
    return model


def mlp(*sizes: int, c: int = C, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], c, bias=bias))


# --- the table -------------------------------------------------------------------------------------------------------

CASES: dict[str, Factory] = {
    # fully connected
    "linear": case(lambda: (nn.Linear(6, C), randn(N, 6))),
    "linear without bias": case(lambda: (nn.Linear(6, C, bias=False), randn(N, 6))),
    "mlp": case(lambda: (mlp(6, 5, 4), randn(N, 6))),
    "mlp without bias": case(lambda: (mlp(6, 5, 4, bias=False), randn(N, 6))),
    "mlp of one output": case(lambda: (mlp(6, 5, c=1), randn(N, 6))),
    "mlp of three outputs": case(lambda: (mlp(6, 5, c=3), randn(N, 6))),
    "mlp on one example": case(lambda: (mlp(6, 5), randn(1, 6))),
    "mlp of width 1": case(lambda: (mlp(1, 1, 1, c=1), randn(N, 1))),
    "mlp wider than its examples are many": case(lambda: (mlp(6, 20, 20), randn(2, 6))),
    "mlp on images": case(lambda: (nn.Sequential(nn.Flatten(), mlp(12, 5)), randn(N, 3, 2, 2))),
    "nested Sequential": case(lambda: (nn.Sequential(mlp(6, 5, c=4), nn.Sequential(nn.ReLU(), mlp(4))), randn(N, 6))),
    # layers and activations, one by one
    **{
        f"activation {name}": case(lambda make=make: on(randn(N, 6), nn.Linear(6, 6), make()))
        for name, make in ACTIVATIONS.items()
    },
    **{
        name: case(lambda shape=shape, make=make: on(randn(*shape), make(), nn.Tanh()))
        for name, (shape, make) in LAYERS.items()
    },
    "conv net": case(
        lambda: on(
            randn(N, 1, 8, 8),
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            c=3,
        )
    ),
    "conv net in channels last": case(
        lambda: (
            with_head(nn.Conv2d(4, 3, 3), nn.Tanh(), x=randn(*IMAGE)).to(memory_format=torch.channels_last),
            randn(*IMAGE).contiguous(memory_format=torch.channels_last),
        )
    ),
    "Conv1d over tokens": case(
        lambda: on(randn(N, T, 3), Call(lambda x, conv: conv(x.mT).mT, nn.Conv1d(3, 4, 3, padding=1)), nn.Tanh())
    ),
    "Bilinear": case(lambda: (Call(lambda x, b: b(x[:, :2], x[:, 2:]), nn.Bilinear(2, 4, C)), randn(N, 6))),
    "Embedding": case(lambda: (nn.Sequential(nn.Embedding(7, 4), MeanOverTokens(), mlp(4, 5)), tokens())),
    "Embedding with padding": case(
        lambda: (nn.Sequential(nn.Embedding(4, 5, padding_idx=1), MeanOverTokens(), mlp(5)), tokens(vocabulary=4))
    ),
    "Embedding of one token": case(lambda: (nn.Sequential(nn.Embedding(7, 4), mlp(4, 3)), tokens()[:, 0])),
    "Embedding of equal tokens": case(
        lambda: (nn.Sequential(nn.Embedding(2, 4), nn.Flatten(), mlp(16, 3)), tokens(vocabulary=2))
    ),
    "EmbeddingBag": case(lambda: (nn.Sequential(nn.EmbeddingBag(7, 4), mlp(4, 3)), tokens())),
    # attention
    "MultiheadAttention": case(lambda: (Multihead(), randn(N, T, 3))),
    "MultiheadAttention with weights": case(lambda: (Multihead(need_weights=True), randn(N, T, 3))),
    "MultiheadAttention batch second": case(lambda: (Multihead(batch_first=False), randn(N, T, 3))),
    "MultiheadAttention with key biases": case(lambda: (Multihead(add_bias_kv=True, bias=False), randn(N, T, 3))),
    "MultiheadAttention of other sizes": case(lambda: (CrossAttention(), randn(N, T, 3))),
    "TransformerEncoderLayer": case(lambda: (encoder(), randn(N, T, 3))),
    "TransformerEncoderLayer norm first": case(lambda: (encoder(norm_first=True, activation="gelu"), randn(N, T, 3))),
    "TransformerEncoderLayer in training mode": case(lambda: (encoder(training=True), randn(N, T, 3))),
    "TransformerEncoderLayer batch second": case(lambda: (encoder(batch_first=False), randn(N, T, 3))),
    "TransformerEncoder": case(lambda: (encoder(depth=2, bias=False), randn(N, T, 3))),
    "ViT": case(lambda: (ViT(), randn(N, 2, 6, 6))),
    "ViT of linear patches": case(lambda: (ViT("linear"), randn(N, 2, 6, 6))),
    "ViT by softmax": case(lambda: (ViT(fused=False, c=1), randn(N, 2, 6, 6))),
    # recurrent
    "RNN": case(lambda: (Recurrent(nn.RNN, batch_first=True), randn(N, T, 3))),
    "LSTM": case(lambda: (Recurrent(nn.LSTM, batch_first=True), randn(N, T, 3))),
    "LSTM batch second": case(lambda: (Recurrent(nn.LSTM, num_layers=2), randn(N, T, 3))),
    "GRU": case(lambda: (Recurrent(nn.GRU, batch_first=True, bidirectional=True), randn(N, T, 3))),
    "LSTMCell and GRUCell": case(lambda: (Cells(), randn(N, T, 3))),
    "loop over tokens": case(lambda: (TokenLoop(), randn(N, T, 3))),
    # residual streams and work in place
    "residual": case(lambda: on(randn(N, 6), nn.Linear(6, 5), Residual(mlp(5, 4, c=5)))),
    "residual in place": case(lambda: on(randn(N, 6), nn.Linear(6, 5), Residual(mlp(5, 4, c=5), in_place=True))),
    "residual stream in place": case(lambda: (AccumulatedStream(6, C), randn(N, 6))),
    "residual conv net": case(
        lambda: on(randn(*IMAGE), Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), in_place=True))
    ),
    "in place after a Linear": case(lambda: (InPlaceAfterLinear(), randn(N, 6))),
    # layers of the user's own
    "scale and shift": case(lambda: on(randn(N, 6), Scale(6), nn.Linear(6, 4), nn.Tanh(), Scale(4))),
    "scale and shift on tokens": case(lambda: on(randn(N, T, 6), Scale(6), nn.Tanh(), Scale(T, 1))),
    "matrix": case(lambda: on(randn(N, 6), Matrix(6, 4), nn.Tanh())),
    "matrix on tokens": case(lambda: on(randn(N, T, 6), Matrix(6, 4), nn.Tanh())),
    "matrix between tokens": case(lambda: on(randn(N, T, 3), Matrix(T, T, function=lambda x, w: w @ x), nn.Tanh())),
    "einsum": case(
        lambda: on(randn(N, T, 3), Matrix(T, 3, 4, function=lambda x, w: torch.einsum("ntd,tde->nte", x, w)), nn.Tanh())
    ),
    "mixture of experts": case(lambda: (Experts(), randn(N, 6))),
    "weights made by a network": case(lambda: (HyperNetwork(), randn(N, 6))),
    "learned positions": case(lambda: (Positional(), randn(N, T, 3))),
    "subclass of Linear": case(lambda: on(randn(N, 6), Squared(6, 4), nn.Tanh())),
    "hook that changes an output": case(lambda: (hooked(), randn(N, 6))),
    "scalar parameters": case(lambda: (Temperature(), randn(N, 6))),
    "stopped gradient": case(lambda: (Detached(), randn(N, 6))),
    "checkpointed layers": case(lambda: (Checkpointed(), randn(N, 6))),
    "Fourier layer": case(lambda: (Fourier(), randn(N, 6))),
    "a gradient of the user's own": case(lambda: on(randn(N, 6), nn.Linear(6, 4), Call(StraightThrough.apply))),
    # functional use, tied weights, repeated calls
    "functional use": case(lambda: (Functional(), randn(N, 6))),
    "functional use twice": case(lambda: (Functional(times=2), randn(N, 6))),
    "called and used by function": case(lambda: (Functional(also_called=True), randn(N, 6))),
    "bias used elsewhere": case(lambda: (HalfFunctional(), randn(N, 6))),
    "norm of a weight in the output": case(lambda: (Penalised(), randn(N, 6))),
    "tied weights": case(lambda: (tied(), randn(N, 6))),
    "tied weights and biases": case(lambda: (tied_in_all(), randn(N, 6))),
    "tied embedding": case(lambda: (LanguageModel(), tokens())),
    "embedding used transposed": case(lambda: (LanguageModel(transposed=True), tokens())),
    "transposed weights": case(lambda: (Autoencoder(), randn(N, 6))),
    "module called three times": case(lambda: (Repeated(nn.Linear(6, 6), 6), randn(N, 6))),
    "layer twice in a Sequential": case(lambda: (twice_in_a_sequential(), randn(N, 6))),
    "convolution called three times": case(lambda: (Repeated(nn.Conv1d(4, 4, 3, padding=1), 36), randn(*SIGNAL))),
    "norm called three times": case(lambda: (Repeated(nn.LayerNorm(6), 6), randn(N, 6))),
    "two branches": case(lambda: (TwoBranches(), randn(N, 6))),
    "Linear on a parameter too": case(lambda: (OnItsOwnParameter(), randn(N, T, 3))),
    # parametrisations
    "weight_norm": case(lambda: (parametrised(parametrizations.weight_norm), randn(N, 6))),
    "spectral_norm in eval mode": case(lambda: (parametrised(parametrizations.spectral_norm).eval(), randn(N, 6))),
    "orthogonal": case(lambda: (parametrised(parametrizations.orthogonal), randn(N, 6))),
    "symmetric weight": case(
        lambda: (
            parametrised(lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric())),
            randn(N, 6),
        )
    ),
    # frozen and unused tensors
    "frozen weight": case(lambda: (frozen(mlp(6, 5, 4), "2.weight"), randn(N, 6))),
    "frozen bias": case(lambda: (frozen(mlp(6, 5, 4), "0.bias"), randn(N, 6))),
    "frozen layers": case(lambda: (frozen(mlp(6, 5, 4), "0.weight", "0.bias", "4.bias"), randn(N, 6))),
    "all but the first frozen": case(
        lambda: (frozen(mlp(6, 5, 4), "2.weight", "2.bias", "4.weight", "4.bias"), randn(N, 6))
    ),
    "frozen embedding": case(
        lambda: (
            frozen(nn.Sequential(nn.Embedding(7, 4), MeanOverTokens(), mlp(4, 3)), "0.weight"),
            tokens(),
        )
    ),
    "frozen class token": case(
        lambda: (frozen(ViT(depth=1), "token", "blocks.0.attention.qkv.weight"), randn(N, 2, 6, 6))
    ),
    "unused parameters": case(lambda: (Unused(), randn(N, 6))),
    "called for nothing": case(lambda: (CalledForNothing(), randn(N, 6))),
    "constant output": case(lambda: (OneOutputConstant(), randn(N, 6))),
    # where the examples lie
    "batch second": case(lambda: (BatchSecond(), randn(N, T, 3))),
    "batch second, as many tokens as examples": case(lambda: (BatchSecond(), randn(N, N, 3))),
    "batch last": case(lambda: (BatchLast(), randn(N, 6))),
    "examples and tokens merged": case(lambda: (Merged(), randn(N, T, 3))),
    "tokens and examples merged": case(lambda: (Merged(batch_second=True), randn(N, T, 3))),
    "examples reversed inside": case(lambda: (Reordered(), randn(N, 6))),
    "two views in one batch": case(lambda: (Doubled(), randn(N, 6))),
    "examples routed to layers": case(lambda: (Routed(), randn(N, 6))),
    "dict input": case(lambda: (DictInput(), {"tokens": tokens(), "features": randn(N, 6)})),
    "tuple input": case(lambda: (TupleInput(), (randn(N, T, 3), mask()))),
    "nested input": case(lambda: (NestedInput(), {"image": randn(N, 1, 5, 5), "scalars": (randn(N, 3), randn(N, 2))})),
    "equal examples": case(lambda: (mlp(6, 5), randn(1, 6).repeat(N, 1))),
    "examples of zeros": case(lambda: (mlp(6, 5), torch.zeros(N, 6, dtype=torch.float64))),
    "examples that are a view": case(lambda: (mlp(6, 5), randn(6, N).T)),
}

IN_PLACE = "writes the batched state into a tensor that is not batched"
PRELU = "the gradient of the slope has the wrong shape under vmap"
NO_VMAP: dict[str, str] = {
    "activation PReLU": PRELU,
    "activation PReLU per channel": PRELU,
    "PReLU on channels": PRELU,
    "activation RReLU in eval mode": "rrelu_with_noise has no batching rule",
    "RNN": IN_PLACE,
    "LSTM": IN_PLACE,
    "LSTM batch second": IN_PLACE,
    "GRU": IN_PLACE,
    "checkpointed layers": "torch.func does not support saved tensor hooks",
    "examples routed to layers": "the number of rows depends on values",
}


# --- what must be refused --------------------------------------------------------------------------------------------


def with_layer(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, C)), randn(N, 6)


def between(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    return with_layer(Call(function))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Counting(nn.Module):
    """Changes a buffer at every call, and its output with it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


REFUSED: dict[str, Factory] = {
    "BatchNorm1d in training mode": case(lambda: with_layer(nn.BatchNorm1d(4))),
    "BatchNorm2d in training mode": case(lambda: on(randn(*IMAGE), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))),
    "BatchNorm1d without running statistics": case(
        lambda: with_layer(nn.BatchNorm1d(4, track_running_stats=False).eval())
    ),
    "Dropout": case(lambda: with_layer(nn.Dropout(0.5))),
    "Dropout2d": case(lambda: on(randn(*IMAGE), nn.Conv2d(4, 3, 3), nn.Dropout2d(0.5))),
    "AlphaDropout": case(lambda: with_layer(nn.AlphaDropout(0.5))),
    "RReLU in training mode": case(lambda: with_layer(nn.RReLU())),
    "dropout by function": case(lambda: between(lambda x: F.dropout(x, 0.5))),
    "dropout inside attention": case(lambda: (Multihead(dropout=0.5), randn(N, T, 3))),
    "dropout inside an LSTM": case(lambda: (Recurrent(nn.LSTM, num_layers=2, dropout=0.5), randn(N, T, 3))),
    "noise": case(lambda: with_layer(Noise())),
    "mean of the batch subtracted": case(lambda: between(lambda x: x - x.mean(dim=0))),
    "divided by the norm of the batch": case(lambda: between(lambda x: x / x.norm())),
    "softmax over the batch": case(lambda: between(lambda x: torch.softmax(x, dim=0))),
    "cumulative sum over the batch": case(lambda: between(lambda x: x.cumsum(dim=0))),
    "examples shifted by one": case(lambda: between(lambda x: x.roll(1, dims=0))),
    "attention over the batch": case(
        lambda: (
            nn.Sequential(
                nn.Linear(3, 4),
                Call(lambda x, a: a(x, x, x)[0], nn.MultiheadAttention(4, 2)),
                MeanOverTokens(),
                nn.Linear(4, C),
            ),
            randn(N, T, 3),
        )
    ),
    "a buffer that counts calls": case(lambda: with_layer(Counting())),
}


# --- random models ---------------------------------------------------------------------------------------------------

Draw = Callable[..., Any]

# Activations that keep the number of features and that vmap can batch; those that work in place stand only behind
# layers that do not need their own output for their gradient.
BATCHED_ACTIVATIONS = sorted(ACTIVATIONS.keys() - {"GLU", "PReLU", "PReLU per channel", "RReLU in eval mode"})
OUT_OF_PLACE = [name for name in BATCHED_ACTIVATIONS if "in place" not in name]


@contextmanager
def drawn_seed(draw: Draw) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw(st.integers(0, 2**31)))
        yield


def some_frozen(draw: Draw, model: nn.Module) -> nn.Module:
    """In half of the cases none; never the last, the head's bias, so that the kernel is not rounding noise alone."""
    *tensors, _ = model.parameters()
    if draw(st.booleans()):
        for index in draw(st.sets(st.integers(0, len(tensors) - 1))):
            tensors[index].requires_grad_(False)
    return moved(model)


def two_sizes(draw: Draw) -> tuple[int, int]:
    return draw(st.integers(1, 5)), draw(st.integers(1, 5))


def activation(draw: Draw, *, in_place: bool = False) -> nn.Module:
    return ACTIVATIONS[draw(st.sampled_from(BATCHED_ACTIVATIONS if in_place else OUT_OF_PLACE))]()


def dense_layers(draw: Draw, d: int, width: int) -> list[nn.Module]:
    """From features (..., d) to (..., width)."""
    kind = draw(
        st.sampled_from(["linear", "linear", "linear", "norm", "repeated", "residual", "own", "norm of weight"])
    )
    linear = nn.Linear(d, width, bias=draw(st.booleans()))
    if kind == "norm" and width > 2:
        return [linear, draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width), activation(draw)]
    if kind == "repeated":
        again = nn.Linear(width, width)
        return [linear, again, nn.Tanh(), again]
    if kind == "residual":
        body = nn.Sequential(nn.Linear(width, 3), activation(draw, in_place=True), nn.Linear(3, width))
        return [linear, Residual(body, in_place=draw(st.booleans()))]
    if kind == "own":
        return [Matrix(d, width), Scale(width), activation(draw)]
    if kind == "norm of weight":
        return [parametrizations.weight_norm(linear), activation(draw)]
    return [linear, activation(draw, in_place=True)] if draw(st.booleans()) else [linear]


@st.composite
def mlps(draw: Draw) -> tuple[nn.Module, Tensor, Tensor]:
    """Fully connected networks on features, tokens or images, the latter flattened at the start or at the end."""
    with drawn_seed(draw):
        d = draw(st.integers(1, 6))
        shape = (*draw(st.sampled_from([(), (), (1,), (3,), (2, 2)])), d)
        x1, x2 = (randn(n, *shape) for n in two_sizes(draw))
        layers: list[nn.Module] = []
        if len(shape) > 1 and draw(st.booleans()):
            layers, d = [nn.Flatten()], math.prod(shape)
        for _ in range(draw(st.integers(0, 3))):
            width = draw(st.integers(1, 6))
            layers += dense_layers(draw, d, width)
            d = width
        return some_frozen(draw, with_head(*layers, x=x1, c=draw(st.integers(1, 3)))), x1, x2


def convolution(draw: Draw, axes: int, channels: int, size: int) -> nn.Module:
    """A convolution over `axes` axes, none of them shorter than `size`."""
    kernel = draw(st.integers(1, min(3, size)))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    out = groups * draw(st.integers(1, 2))
    if draw(st.integers(0, 5)) == 0:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return kinds[axes - 1](channels, out, kernel, stride=draw(st.integers(1, 2)), **options)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    options["dilation"] = draw(st.integers(1, 2)) if 2 * (kernel - 1) < size else 1
    padding = draw(st.sampled_from(["valid", "same", "number", "number"]))
    if padding == "same" and kernel % 2:  # torch warns of another copy where the two sides differ
        options["padding"] = "same"
    elif padding == "number":
        options["padding"] = draw(st.integers(0, min(2, size - 1)))
        options["stride"] = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    # torch pads as far as the input is long, and reflects one less.
    if options.get("padding", 0) != "same" or options["dilation"] * (kernel - 1) // 2 < size:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    return kind(channels, out, kernel, **options)


def convolution_follower(draw: Draw, axes: int, channels: int, size: int) -> list[nn.Module]:
    """A norm, an activation and a pooling layer, or some of them."""
    norms = {
        "group": lambda: nn.GroupNorm(1, channels),
        "instance": lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1](channels, affine=True),
        "batch": lambda: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](channels).eval(),
    }
    pools = {
        "max": lambda: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](2),
        "average": lambda: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1](2),
        "adaptive": lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1](2),
    }
    norm = draw(st.sampled_from([None, None, *norms]))
    pool = draw(st.sampled_from([None, None, *pools]))
    layers = [norms[norm]()] if norm is not None and size > 1 else []
    layers.append(activation(draw, in_place=not layers))
    return [*layers, pools[pool]()] if pool is not None and size > 1 else layers


@st.composite
def convnets(draw: Draw) -> tuple[nn.Module, Tensor, Tensor]:
    """Convolutions over one, two or three axes with every option, and a Linear at the end."""
    with drawn_seed(draw):
        axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
        channels = draw(st.integers(1, 4))
        sides = [draw(st.integers(3, 4 if axes == 3 else 7)) for _ in range(axes)]
        x1, x2 = (randn(n, channels, *sides) for n in two_sizes(draw))
        layers: list[nn.Module] = []
        hidden = x1
        for _ in range(draw(st.integers(1, 2))):
            layers.append(convolution(draw, axes, hidden.shape[1], min(hidden.shape[2:])))
            hidden = layers[-1].double()(hidden).detach()
            follower = convolution_follower(draw, axes, hidden.shape[1], min(hidden.shape[2:]))
            hidden = nn.Sequential(*follower).double()(hidden.clone()).detach()
            layers += follower
        return some_frozen(draw, with_head(*layers, x=x1, c=draw(st.integers(1, 3)))), x1, x2


class EmbedDict(nn.Module):
    """{"tokens": (n, T) integers, "features": (n, T, 3)} -> (n, T, d)."""

    def __init__(self, d):
        super().__init__()
        self.embed, self.l = nn.Embedding(5, d, padding_idx=0), nn.Linear(3, d)

    def forward(self, batch):
        return self.embed(batch["tokens"]) + self.l(batch["features"])


class ClassToken(nn.Module):
    """Puts a learned token before the others, and adds learned positions."""

    def __init__(self, length, d):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(length + 1, d))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position


def token_layer(draw: Draw, length: int, d: int) -> nn.Module:
    """From (n, length, d) to the same."""
    heads = draw(st.sampled_from([1, 2]))
    dense = nn.Sequential(nn.Linear(d, 3), activation(draw, in_place=True), nn.Linear(3, d))
    kinds: dict[str, Callable[[], nn.Module]] = {
        "block": lambda: Block(d, heads, fused=draw(st.booleans())),
        "attention": lambda: Residual(Attention(d, heads), in_place=draw(st.booleans())),
        "multihead": lambda: Residual(
            Call(
                lambda x, a: a(x, x, x, need_weights=False)[0],
                nn.MultiheadAttention(d, heads, batch_first=True, bias=draw(st.booleans())),
            )
        ),
        "encoder": lambda: nn.TransformerEncoderLayer(
            d, heads, 5, dropout=0.0, batch_first=True, norm_first=draw(st.booleans())
        ).train(draw(st.booleans())),
        # A copy: on a view of one position, torch 2.13 refuses its own gradient of the weight.
        "convolution": lambda: Call(
            lambda x, conv: conv(x.mT.clone(memory_format=torch.contiguous_format)).mT, nn.Conv1d(d, d, 3, padding=1)
        ),
        "mixing of tokens": lambda: Residual(Matrix(length, length, function=lambda x, w: torch.tanh(w @ x))),
        "dense": lambda: dense,
        "batch second": lambda: Call(lambda x, f: f(x.transpose(0, 1)).transpose(0, 1), dense),
        "merged": lambda: Call(lambda x, f: f(x.reshape(-1, d)).view(x.shape), dense),
        "loop": lambda: Call(lambda x, f: torch.stack([f(step) for step in x.unbind(1)], dim=1), dense),
        "scale": lambda: Scale(*draw(st.sampled_from([(d,), (length, 1), (length, d), ()]))),
        "norm": lambda: nn.LayerNorm(d),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


@st.composite
def sequences(draw: Draw) -> tuple[nn.Module, Any, Any]:
    """Networks on tokens, integers, vectors or a dict of both, with attention, loops and work across tokens."""
    with drawn_seed(draw):
        d, length, c = draw(st.sampled_from([4, 6])), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        n1, n2 = two_sizes(draw)
        inputs: dict[str, tuple[nn.Module, Callable[[int], Any]]] = {
            "integers": (nn.Embedding(5, d), lambda n: tokens(n, length, 5)),
            "vectors": (nn.Linear(3, d), lambda n: randn(n, length, 3)),
            "both": (EmbedDict(d), lambda n: {"tokens": tokens(n, length, 5), "features": randn(n, length, 3)}),
        }
        embed, examples = inputs[draw(st.sampled_from(sorted(inputs)))]
        layers: list[nn.Module] = [embed]
        if draw(st.booleans()):
            layers.append(ClassToken(length, d))
        positions = length + len(layers) - 1
        for _ in range(draw(st.integers(1, 2))):
            layer = token_layer(draw, positions, d)
            layers += [layer] * draw(st.sampled_from([1, 1, 1, 2]))
        pools = {"mean": MeanOverTokens(), "first": Call(lambda x: x[:, 0]), "last": Call(lambda x: x[:, -1])}
        pool = draw(st.sampled_from([None, *sorted(pools)]))
        x1, x2 = examples(n1), examples(n2)
        return some_frozen(draw, with_head(*layers, *([pools[pool]] if pool else []), x=x1, c=c)), x1, x2
