"""neural-tangents, in an environment of its own: structured derivatives and Jacobian contraction, compiled beforehand.

Weights are taken as (inputs, outputs) and images as (n, height, width, channels), the layouts that it is fast on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import protocol
from jax import lax

IMPLEMENTATIONS = {
    "structured derivatives": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    "Jacobian contraction": nt.NtkImplementation.JACOBIAN_CONTRACTION,
}
PATCH, WIDTH, HEADS, BLOCKS = 8, 64, 4, 2

Parameters = dict[str, Any]


def prepare(spec: protocol.Spec, arrays: protocol.Arrays) -> protocol.Work:
    """`trace_axes` divides by the number of outputs, and the benchmark's kernels are sums."""
    network, x = NETWORKS[spec["model"]], arrays["x"]
    parameters = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    if spec["model"] == "cnn":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    parameters = {name: jnp.asarray(_layout(name, array, spec["model"])) for name, array in parameters.items()}
    axes, factor = ((), 1) if spec["outputs"] == "full" else ((-1,), spec["c"])
    kernel = nt.empirical_ntk_fn(
        network, trace_axes=axes, vmap_axes=0, implementation=IMPLEMENTATIONS[spec["implementation"]]
    )
    examples = jnp.asarray(x)
    compiled = jax.jit(lambda p, x: factor * kernel(x, None, p)).lower(parameters, examples).compile()
    return protocol.Work(lambda: compiled(parameters, examples).block_until_ready(), np.asarray, "XLA")


def _layout(name: str, array: np.ndarray, model: str) -> np.ndarray:
    """A weight of torch in the layout used here."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # (out, in, height, width) -> HWIO
    if array.ndim != 2 or name == "position":
        return array
    if model == "cnn":  # the flattened images have their channels last here
        return array.reshape(-1, 32, 8, 8).transpose(2, 3, 1, 0).reshape(2048, -1)
    return array.T


def linear(p: Parameters, name: str, x: jax.Array) -> jax.Array:
    """X W + b."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(p: Parameters, x: jax.Array) -> jax.Array:
    """As `networks.mlp`."""
    x = jnp.tanh(linear(p, "1", x.reshape(len(x), -1)))
    return linear(p, "5", jnp.tanh(linear(p, "3", x)))


def cnn(p: Parameters, x: jax.Array) -> jax.Array:
    """As `networks.cnn`."""
    for name in ("0", "3"):
        convolved = lax.conv_general_dilated(
            x, p[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        pooled = jnp.tanh(convolved + p[f"{name}.bias"])
        x = lax.reduce_window(pooled, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return linear(p, "7", x.reshape(len(x), -1))


def norm(p: Parameters, name: str, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * p[f"{name}.weight"] + p[f"{name}.bias"]


def vit(p: Parameters, x: jax.Array) -> jax.Array:
    """As `networks.Vit`."""
    n, channels, height, width = x.shape
    patches = x.reshape(n, channels, height // PATCH, PATCH, width // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
    x = linear(p, "embed", patches.reshape(n, -1, channels * PATCH**2)) + p["position"]
    for block in range(BLOCKS):
        at = functools.partial("blocks.{}.{}".format, block)
        qkv = linear(p, at("qkv"), norm(p, at("norm1"), x)).reshape(n, -1, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS), axis=-1)
        x = x + linear(p, at("project"), (weights @ v).transpose(0, 2, 1, 3).reshape(n, -1, WIDTH))
        x = x + linear(p, at("down"), jnp.tanh(linear(p, at("up"), norm(p, at("norm2"), x))))
    return linear(p, "head", norm(p, "norm", x).mean(1))


NETWORKS = {"mlp": mlp, "cnn": cnn, "vit": vit}

protocol.serve(prepare)
