"""The folded model in torch, some of its layers replaced by faster ones."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lambda_worker.engine import Array, Precision, Predict
from lambda_worker.fold import Attend, Conv, Folded, Linear, fold
from lambda_worker.model_file import load_model
from lambda_worker.slices import SLICE, in_slices

VECTOR = 16  # float32 numbers in an AVX-512 register


class Packed(nn.Module):
    """`Linear` with its weight as oneDNN's kernels want it, so that no call packs it again.

    Args:
        rows: that a call has, about; the layout is best for so many.
        dtype: what is multiplied, and what comes out.
    """

    def __init__(self, layer: Linear, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.bias = layer.bias.to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(dtype), rows)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, "none", [], ""
        )
        return out


class FullConv(nn.Module):
    """`Conv` with outputs added that nobody reads, up to a whole number of vector registers.

    With a part of one, the kernel and so the last bits of the result depend on the number of rows.
    """

    def __init__(self, layer: Conv) -> None:
        super().__init__()
        self.outputs = len(layer.bias)
        more = -self.outputs % VECTOR
        weight = functional.pad(layer.weight, (0, 0, 0, 0, 0, 0, 0, more))
        self.conv = Conv((weight, functional.pad(layer.bias, (0, more))))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out[:, : self.outputs]


class FastAttend(Attend):
    """The same, with a softmax over the second last axis, which torch does twice as fast."""

    def forward(self, qkv: Tensor) -> Tensor:
        batch, tokens, width = qkv.shape
        parts = qkv.view(batch, tokens, 3, self.heads, width // 3 // self.heads)
        # In float32: bfloat16 is slower for matrices as small as these.
        query, key, value = parts.permute(2, 0, 3, 1, 4).float().contiguous()
        weights = torch.softmax(key @ query.transpose(-1, -2), dim=-2)
        mixed = weights.transpose(-1, -2) @ value
        out: Tensor = mixed.transpose(1, 2).reshape(batch, tokens, width // 3)
        return out


class FastPool(nn.Module):
    """3x3 maximum, stride 1: down, then across. torch's own also notes where each one was."""

    def forward(self, x: Tensor) -> Tensor:
        return _widest(_widest(x.transpose(2, 3)).transpose(2, 3))


def _widest(x: Tensor) -> Tensor:
    """Maximum of each pixel and its two neighbours in a row."""
    out = x.clone()
    torch.maximum(out[..., 1:], x[..., :-1], out=out[..., 1:])
    torch.maximum(out[..., :-1], x[..., 1:], out=out[..., :-1])
    return out


def open_torch(model: Path, precision: Precision, threads: int) -> Predict:
    """See `engine.open_engine`."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        module = fold(load_model(model, mapped=True))
        _prepare(module, torch.bfloat16 if precision == "bf16" else torch.float32)
        for kept in module.parameters():
            kept.data = kept.clone()  # one that still is in the file would keep all of it mapped
    _give_back_memory()
    run = partial(_run, module)
    if threads == 1:
        return in_slices(run)
    pool = ThreadPoolExecutor(threads, "torch", torch.set_num_threads, (1,))
    return in_slices(run, pool.map, threads)


def _give_back_memory() -> None:
    """Return to the system what loading took beyond the weights: some 20 MB at full size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's only
    if trim:
        trim(0)


def _prepare(module: Folded, dtype: torch.dtype) -> None:
    """Put this engine's layers into the places of the folded model's."""
    tokens = len(module.position) + 1
    # Magnitudes have more digits than bfloat16; and the last sum is the result.
    exact = {"magnitudes.0", "last"}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Linear) and torch._C._has_mkldnn:
            rows = SLICE * (tokens if name.startswith(("blocks", "patches")) else 1)
            kind = torch.float32 if name in exact else dtype
            module.set_submodule(name, Packed(layer, rows, kind))
        elif isinstance(layer, Attend):
            module.set_submodule(name, FastAttend(layer.heads))
        elif isinstance(layer, nn.MaxPool2d):
            module.set_submodule(name, FastPool())
        elif isinstance(layer, Conv) and layer.groups == 1:
            module.set_submodule(name, FullConv(layer))
    # Convolutions stay float32: those here are no faster in bfloat16.
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _run(module: Folded, images: Array, magnitudes: Array) -> Array:
    with torch.inference_mode():
        z_phot = module(_tensor(images), _tensor(magnitudes))
    out: Array = z_phot.numpy()
    return out


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
