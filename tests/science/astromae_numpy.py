"""AstroMAE once more, in plain numpy and float64, written from the architecture's description.

It shares nothing with `lambda_worker.model` but the names of the weights: no torch, no layer
classes, convolutions as sums over shifted images. Slow, and meant to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]

BATCH_NORM_EPS = 1e-5  # torch's default, which the published code leaves as it is
FINAL_NORM_EPS = 1e-6


def predict(
    weights: Mapping[str, NDArray[Any]],
    images: NDArray[Any],
    magnitudes: NDArray[Any],
    *,
    heads: int,
    norm_eps: float,
) -> Array:
    """Redshifts.

    Args:
        weights: a state_dict as numpy arrays; any sizes of the family.
        images: (B, bands, side, side).
        magnitudes: (B, bands).
        heads: attention heads, which no shape tells.
        norm_eps: epsilon of the LayerNorms inside the transformer's blocks.
    Returns:
        (B,) z_phot.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x, m = images.astype(np.float64), magnitudes.astype(np.float64)
    parts = [transformer(w, x, heads, norm_eps), inception_branch(w, x), magnitude_branch(w, m)]
    joined = np.concatenate(parts, axis=1)
    return perceptron(w, "concat_block", joined, 2)[:, 0]


def transformer(w: Weights, images: Array, heads: int, norm_eps: float) -> Array:
    tokens = patch_tokens(w, images)
    first = np.broadcast_to(w["cls_token"], (len(tokens), 1, tokens.shape[2]))
    x = np.concatenate([first, tokens], axis=1) + w["pos_embed"]
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for number in range(depth):
        x = block(w, f"blocks.{number}", x, heads, norm_eps)
    pooled = x[:, 1:].mean(axis=1)  # the class token takes part in attention only
    pooled = layer_norm(w, "fc_norm", pooled, FINAL_NORM_EPS)
    return perceptron(w, "vit_block", linear(w, "head", pooled), 2)


def patch_tokens(w: Weights, images: Array) -> Array:
    """Cut into patches, row by row, and project each to one token: (B, tokens, width)."""
    kernel = w["patch_embed.proj.weight"]  # (width, bands, patch, patch)
    batch, bands, side, _ = images.shape
    patch = kernel.shape[2]
    count = side // patch
    cut = images.reshape(batch, bands, count, patch, count, patch)
    tokens = np.einsum("bciyjx,wcyx->bijw", cut, kernel, optimize=True)
    return tokens.reshape(batch, count * count, -1) + w["patch_embed.proj.bias"]


def block(w: Weights, name: str, x: Array, heads: int, eps: float) -> Array:
    """x + attention, + PCM of the block's input on the grid, + MLP of the sum."""
    local = pcm(w, f"{name}.PCM", x[:, 1:])
    x = x + attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x, eps), heads)
    x[:, 1:] += local
    hidden = gelu(linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x, eps)))
    return x + linear(w, f"{name}.mlp.fc2", hidden)


def attention(w: Weights, name: str, x: Array, heads: int) -> Array:
    """Softmax of q k / sqrt(d), head by head; queries and values have a bias, keys have none."""
    width = x.shape[2]
    size = width // heads
    to_q, to_k, to_v = np.split(w[f"{name}.qkv.weight"], 3)
    query = x @ to_q.T + w[f"{name}.q_bias"]
    key = x @ to_k.T
    value = x @ to_v.T + w[f"{name}.v_bias"]
    mixed = np.empty_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[..., own] @ key[..., own].transpose(0, 2, 1) / math.sqrt(size)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        mixed[..., own] = share @ value[..., own]
    return linear(w, f"{name}.proj", mixed)


def pcm(w: Weights, name: str, tokens: Array) -> Array:
    """Grouped convolution, BatchNorm, SiLU, grouped convolution back, on the tokens' grid."""
    batch, count, width = tokens.shape
    side = math.isqrt(count)
    grid = tokens.reshape(batch, side, side, width).transpose(0, 3, 1, 2)
    x = batch_norm(w, f"{name}.1", convolve(w, f"{name}.0", grid))
    x = convolve(w, f"{name}.3", x / (1 + np.exp(-x)))
    return x.transpose(0, 2, 3, 1).reshape(batch, count, width)


def inception_branch(w: Weights, images: Array) -> Array:
    """1x1 convolution, pool, two blocks, pool, two blocks, pool, the last block, perceptron."""
    name = "inception_model.vis_inception"
    x = average_pool(convolve(w, f"{name}.0", images))
    x = inception_block(w, f"{name}.2", x)
    x = average_pool(inception_block(w, f"{name}.3", x))
    x = inception_block(w, f"{name}.5", x)
    x = average_pool(inception_block(w, f"{name}.6", x))
    x = inception_block(w, f"{name}.8", x, last=True)
    flat = x.reshape(len(x), -1)  # channel by channel
    return linear(w, f"{name}.12", relu(linear(w, f"{name}.10", flat)))


def inception_block(w: Weights, name: str, x: Array, *, last: bool = False) -> Array:
    """1x1; 1x1 then 3x3; 1x1 then 5x5, which the last block leaves out; 3x3 maximum then 1x1."""
    one = conv_block(w, f"{name}.branch1", x)
    three = conv_block(w, f"{name}.branch2.1", conv_block(w, f"{name}.branch2.0", x))
    most = conv_block(w, f"{name}.branch4.1", maximum(x))
    if last:
        return np.concatenate([one, three, most], axis=1)
    five = conv_block(w, f"{name}.branch3.1", conv_block(w, f"{name}.branch3.0", x))
    return np.concatenate([one, three, five, most], axis=1)


def magnitude_branch(w: Weights, magnitudes: Array) -> Array:
    return perceptron(w, "inception_model.magnitude_block", magnitudes, 5)


def perceptron(w: Weights, name: str, x: Array, layers: int) -> Array:
    """Linear layers, named 0, 2, 4 …, with ReLU between them and none at the end."""
    for number in range(layers):
        x = linear(w, f"{name}.{2 * number}", relu(x) if number else x)
    return x


def conv_block(w: Weights, name: str, x: Array) -> Array:
    return relu(batch_norm(w, f"{name}.bn", convolve(w, f"{name}.conv", x)))


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def batch_norm(w: Weights, name: str, x: Array) -> Array:
    """By the statistics of the training, not of the batch."""
    scale = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + BATCH_NORM_EPS)
    shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def convolve(w: Weights, name: str, x: Array) -> Array:
    """Same size, zeros around, stride 1; groups of channels by the kernel's shape."""
    kernel = w[f"{name}.weight"]  # (out, in / groups, k, k)
    batch, channels, height, width = x.shape
    groups = channels // kernel.shape[1]
    parted = x.reshape(batch, groups, -1, height, width)
    kernels = kernel.reshape(groups, -1, *kernel.shape[1:])
    total: Array = np.zeros((batch, groups, kernels.shape[1], height, width))
    for dy, dx, moved in shifts(parted, kernel.shape[2], 0.0):
        total += np.einsum("bgihw,goi->bgohw", moved, kernels[..., dy, dx], optimize=True)
    return total.reshape(batch, -1, height, width) + w[f"{name}.bias"][:, None, None]


def maximum(x: Array) -> Array:
    """The largest of each pixel's 3x3 neighbours, itself included."""
    return np.maximum.reduce([moved for _, _, moved in shifts(x, 3, -np.inf)])


def shifts(x: Array, size: int, around: float) -> list[tuple[int, int, Array]]:
    """The image as each cell of a size x size window sees it, with its row and column."""
    margin, (height, width) = size // 2, x.shape[-2:]
    border = [(0, 0)] * (x.ndim - 2) + [(margin, margin)] * 2
    framed = np.pad(x, border, constant_values=around)
    return [
        (dy, dx, framed[..., dy : dy + height, dx : dx + width])
        for dy in range(size)
        for dx in range(size)
    ]


def average_pool(x: Array) -> Array:
    """Means of 2x2 pixels."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def gelu(x: Array) -> Array:
    """x times the normal distribution's integral up to x: the exact form, not tanh's."""
    erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[float])
    return x * (1 + erf(x / math.sqrt(2))) / 2
