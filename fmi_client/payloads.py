"""Objects to bytes and back, without pickle and, for arrays, without a copy.

Arrays travel as their memory, described by dtype and shape; everything else as msgpack.
Containers may hold arrays, tuples and complex numbers: they are msgpack extensions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import msgpack
import numpy as np
from numpy.typing import NDArray

from fmi_client.errors import ProtocolError
from fmi_client.protocol.peer import Buffer, Payload

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

_NDARRAY, _TUPLE, _COMPLEX, _BIG_INT = 1, 2, 3, 4  # msgpack extension codes

MAX_DEPTH = 32
"""Tuples, or arrays in containers, in each other: msgpack takes 40 KB of the stack for each, and
a stack that is full ends the process."""

_TOO_DEEP = f"more than {MAX_DEPTH} tuples or arrays are nested in each other"

# What numpy, torch and msgpack raise about bytes that are not what their description says.
_UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)


def allocate(nbytes: int) -> memoryview:
    """Return `nbytes` of writable memory that is not touched before it is filled."""
    return np.empty(nbytes, np.uint8).data


def is_tensor(obj: object) -> TypeGuard[torch.Tensor]:
    """Whether `obj` is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor)


def is_array(obj: object) -> TypeGuard[Array | np.generic | torch.Tensor]:
    """Whether `obj` travels as an array: numpy arrays and scalars, torch tensors."""
    return isinstance(obj, np.ndarray | np.generic) or is_tensor(obj)


def flat_bytes(array: Array) -> memoryview:
    """Return the memory of a C-contiguous array as one flat buffer of bytes."""
    # Through uint8, since numpy exports no buffer for some dtypes (bfloat16, datetime64).
    return array.reshape(-1).view(np.uint8).data


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as contiguous memory of the CPU, the same object where it is that already.

    Raises:
        TypeError: it is sparse or otherwise not strided.
    """
    import torch

    if tensor.layout != torch.strided:
        raise TypeError(f"a tensor of layout {tensor.layout} cannot be sent; use to_dense()")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def tensor_bytes(tensor: torch.Tensor) -> Array:
    """Return the memory of a contiguous CPU tensor of any dtype as uint8, without a copy."""
    import torch

    flat = tensor.detach().reshape(-1)
    bytes_: Array = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return bytes_


def pack(obj: object) -> Payload:
    """Describe `obj` and point at its bytes.

    Arrays are not copied where they are C-contiguous (and, for tensors, on the CPU).

    Raises:
        TypeError: the object (or the array's dtype) can only be pickled, which we never do.
    """
    if is_tensor(obj):
        tensor = plain_tensor(obj)
        meta = ["t", str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        return Payload(_packb(meta), [tensor_bytes(tensor).data])
    if isinstance(obj, np.ndarray | np.generic):
        array = np.asarray(obj, order="C")
        return Payload(
            _packb(["n", dtype_name(array.dtype), list(array.shape)]), [flat_bytes(array)]
        )
    if isinstance(obj, bytes | bytearray):
        return Payload(_packb(["b"]), [obj])
    return Payload(_packb(["o"]), [pack_object(obj)])


def unpack(meta: bytes, data: Buffer) -> Any:
    """Return the object that `pack` described; an array shares its memory with `data`.

    Raises:
        ProtocolError: the description does not fit the bytes.
    """
    with _from_peer():
        return _unpack(meta, data, 0)


def unpack_object(data: Buffer) -> Any:
    """Return the plain object that `pack_object` packed.

    Raises:
        ProtocolError: the bytes are none.
    """
    with _from_peer():
        return _unpack_object(data, 0)


@contextmanager
def _from_peer() -> Iterator[None]:
    try:
        yield
    except (*_UNREADABLE, MemoryError, msgpack.UnpackException) as why:
        raise ProtocolError(f"cannot read the peer's object: {why}") from why


def _unpack(meta: bytes, data: Buffer, depth: int) -> Any:
    match _unpack_object(meta, depth):
        case ["n", (str() | list() | tuple()) as name, list(shape)]:
            return _array(name, shape, data)
        case ["t", str(name), list(shape)]:
            return _tensor(name, shape, data)
        case ["b"]:
            return bytes(data)
        case ["o"]:
            return _unpack_object(data, depth)
    raise ValueError("unknown kind")


def pack_object(obj: object) -> bytes:
    """Return a plain object (no array at the top) as msgpack.

    Raises:
        TypeError: it contains something that msgpack has no form for.
    """
    try:
        return _packb(obj)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"cannot send an object of type {type(obj).__name__} ({error}); plain Python values, "
            "bytes, numpy arrays and torch tensors can be sent, alone or in lists and dicts"
        ) from None


def _unpack_object(data: Buffer, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    hook = partial(_from_extension, depth=depth + 1)
    return msgpack.unpackb(data, strict_map_key=False, ext_hook=hook)


def dtype_name(dtype: np.dtype[Any]) -> Any:
    """Return the dtype's description: a string, or a list for structured dtypes.

    Raises:
        TypeError: the dtype holds Python objects.
    """
    if dtype.hasobject:
        raise TypeError("arrays of Python objects cannot be sent: only pickle could carry them")
    return dtype.str if dtype.fields is None else np.lib.format.dtype_to_descr(dtype)


def _dtype(name: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(name)
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not accepted")
    return dtype


def _array(name: Any, shape: list[int], data: Buffer) -> Array:
    dtype = _dtype(name)
    if len(data) == 0:
        return np.ndarray(shape, dtype, bytearray())  # takes no memory, whatever the shape says
    raw = np.frombuffer(data, np.uint8)
    if raw.ctypes.data % dtype.alignment:
        raw = raw.copy()  # an item inside a bundle may start anywhere
    return raw.view(dtype).reshape(shape)


def _tensor(name: str, shape: list[int], data: Buffer) -> torch.Tensor:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r}")
    if len(data) == 0 and 0 in shape:
        return torch.empty(shape, dtype=dtype)
    raw = np.frombuffer(data, np.uint8)
    if not raw.flags.writeable or raw.ctypes.data % 16:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _packb(obj: object, depth: int = 0) -> bytes:
    if depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    default = partial(_to_extension, depth=depth + 1)
    return bytes(msgpack.packb(obj, default=default, strict_types=True))


def _to_extension(obj: object, depth: int) -> object:
    if is_array(obj):
        payload = pack(obj)
        body = _packb(payload.meta) + b"".join(payload.parts)
        return msgpack.ExtType(_NDARRAY, body)
    if isinstance(obj, tuple):
        return msgpack.ExtType(_TUPLE, _packb(list(obj), depth))
    if isinstance(obj, complex):
        return msgpack.ExtType(_COMPLEX, _packb([obj.real, obj.imag]))
    return _plain(obj)


def _plain(obj: object) -> object:
    """Reduce a subclass (an IntEnum, an OrderedDict, a big int) to what msgpack knows."""
    if isinstance(obj, bool | int):
        value = int(obj)
        if -(2**63) <= value < 2**64:
            return value
        return msgpack.ExtType(_BIG_INT, str(value).encode())
    kinds: tuple[Any, ...] = (float, str, bytes, bytearray, dict, list)
    for kind in kinds:
        if isinstance(obj, kind) and type(obj) is not kind:
            return kind(obj)
    raise TypeError(f"no msgpack form for {type(obj).__name__}")


def _from_extension(code: int, body: bytes, depth: int) -> Any:
    if code == _TUPLE:
        return tuple(_unpack_object(body, depth))
    if code == _COMPLEX:
        return complex(*_unpack_object(body, depth))
    if code == _BIG_INT:
        return int(body)
    if code == _NDARRAY:
        unpacker = msgpack.Unpacker(max_buffer_size=len(body))
        unpacker.feed(body)
        meta = unpacker.unpack()
        return _unpack(meta, bytearray(body[unpacker.tell() :]), depth)
    raise ValueError(f"unknown extension {code}")
