"""What a reduction works on: an accumulator over arrays or over plain Python objects.

The caller's input is never modified: it is sent from where it lies, and the first
combination writes into the result's own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fmi_client.ops import Op
from fmi_client.payloads import (
    Array,
    flat_bytes,
    is_array,
    is_tensor,
    pack_object,
    plain_tensor,
    tensor_bytes,
    unpack_object,
)
from fmi_client.protocol.peer import Payload
from fmi_client.protocol.transfers import Receive

if TYPE_CHECKING:
    import torch

Combine = Callable[[Array, Array, Array], object]

_checked: set[tuple[str, np.dtype[Any]]] = set()


class Value(Protocol):
    """An accumulator of one rank."""

    description: str
    """What must agree between ranks: dtype and shape, or "object"."""

    def payload(self) -> Payload: ...

    def scratch(self) -> memoryview | None:
        """Return where a peer's value is to be received."""

    def absorb(self, receive: Receive, *, lower: bool) -> None:
        """Combine with a received value, which covers lower ranks or higher ones."""

    def replace(self, receive: Receive) -> None:
        """Take a received value in place of our own."""

    def fork(self, receive: Receive, out: Any = None) -> Value:
        """Return a new accumulator that holds just the received value."""

    def result(self) -> Any: ...


def make_value(obj: Any, op: Op, out: Any = None) -> Value:
    """Return an accumulator that starts with `obj`.

    Args:
        obj: numpy array or scalar, torch tensor, number, or object that `op` can combine.
        out: where an array's result goes; may be `obj` itself.

    Raises:
        TypeError: the operation is not defined for the dtype, or `out` does not fit.
    """
    if is_array(obj):
        return ArrayValue(obj, op, out)
    if out is not None:
        raise TypeError(f"out= needs an array to reduce, not {type(obj).__name__}")
    return ObjectValue(obj, op)


class ObjectValue:
    """Any Python value that the operation and msgpack both take."""

    def __init__(self, obj: Any, op: Op) -> None:
        pack_object(obj)  # what cannot travel is refused before anybody waits for it
        self.description = "object"
        self._value = obj
        self._op = op

    def payload(self) -> Payload:
        return Payload(b"", [pack_object(self._value)])

    def scratch(self) -> None:
        return None

    def absorb(self, receive: Receive, *, lower: bool) -> None:
        other = unpack_object(receive.data)
        pair = (other, self._value) if lower else (self._value, other)
        self._value = self._op.scalar(*pair)

    def replace(self, receive: Receive) -> None:
        self._value = unpack_object(receive.data)

    def fork(self, receive: Receive, out: Any = None) -> ObjectValue:
        return ObjectValue(unpack_object(receive.data), self._op)

    def result(self) -> Any:
        return self._value


class ArrayValue:
    """A numpy array, or a tensor seen as one; combined in place."""

    def __init__(self, obj: Any, op: Op, out: Any = None) -> None:
        self._op = op
        self._like = obj
        self._out = out
        self.source = as_numpy(obj)
        self.description = _description(obj.dtype, self.source.shape)
        self.combine = _combine(obj, op, self.source.dtype)
        self.current = self.source
        """Where our value is: the caller's input until it is first combined."""
        self._result: Array | None = None
        self._scratch: tuple[Array, memoryview] | None = None
        if out is not None:
            check_out(out, obj, self.source.shape)

    @property
    def owned(self) -> Array:
        """The memory for the result: `out` where it can be used in place, else our own."""
        if self._result is None:
            self._result = _usable(self._out, self.source)
            if self._result is None:
                self._result = np.empty_like(self.source, order="C", subok=False)
        return self._result

    def payload(self) -> Payload:
        return Payload(b"", [flat_bytes(self.current)])

    def scratch(self) -> memoryview:
        if self._scratch is None:
            array = np.empty(self.source.shape, self.source.dtype)
            self._scratch = array, flat_bytes(array)
        return self._scratch[1]

    def absorb(self, receive: Receive, *, lower: bool) -> None:
        other = self._seen(receive)
        pair = (other, self.current) if lower else (self.current, other)
        self.combine(*pair, self.owned)
        self.current = self.owned

    def replace(self, receive: Receive) -> None:
        np.copyto(self.owned, self._seen(receive))
        self.current = self.owned

    def fork(self, receive: Receive, out: Any = None) -> ArrayValue:
        other = ArrayValue(self._like, self._op, out)
        other.replace(receive)
        return other

    def _seen(self, receive: Receive) -> Array:
        if self._scratch is not None and receive.data is self._scratch[1]:
            return self._scratch[0]
        raw = np.frombuffer(receive.data, np.uint8)
        return raw.view(self.source.dtype).reshape(self.source.shape)

    def result(self) -> Any:
        """Return the result in the type of the input: `out` itself where it was given."""
        if self.current is self.source and self.owned is not self.source:
            np.copyto(self.owned, self.source)
        return as_like(self.owned, self._like, self._out)


def as_numpy(obj: Any) -> Array:
    """Return an array or tensor as C-contiguous numpy array, without a copy where possible.

    Tensors of a dtype that numpy lacks (bfloat16) come as their bits.
    """
    if not is_tensor(obj):
        return np.asarray(obj, order="C")
    tensor = plain_tensor(obj)
    if numpy_has(tensor):
        array: Array = tensor.numpy()
        return array
    return tensor_bytes(tensor).view(f"u{tensor.element_size()}").reshape(tuple(tensor.shape))


def numpy_has(tensor: torch.Tensor) -> bool:
    """Whether numpy has the tensor's dtype itself.

    ml_dtypes, where imported, adds bfloat16, which torch does not convert to.
    """
    found = np.sctypeDict.get(_dtype_name(tensor.dtype))
    return found is not None and found.__module__ == "numpy"


def as_like(array: Array, like: Any, out: Any = None) -> Any:
    """Return `array` in the type of `like`, through `out` if given."""
    if out is None:
        return _to_tensor(array, like) if is_tensor(like) else array
    if not isinstance(out, np.ndarray):
        _fill_tensor(out, array)
    elif out is not array and not np.shares_memory(out, array):
        np.copyto(out, array)
    return out


def _to_tensor(array: Array, like: torch.Tensor) -> torch.Tensor:
    import torch

    if numpy_has(like):
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return bits.view(like.dtype).reshape(array.shape)


def _fill_tensor(out: torch.Tensor, array: Array) -> None:
    target = as_numpy(out)
    if target is not array and not np.shares_memory(target, array):
        out.detach().copy_(_to_tensor(array, out))


def _usable(out: Any, source: Array) -> Array | None:
    """Return `out`'s own memory if a result can be built there, while `source` is still read."""
    if out is None:
        return None
    if is_tensor(out):
        array = as_numpy(out) if out.is_contiguous() and out.device.type == "cpu" else None
    else:
        array = out if out.flags.c_contiguous else None
    if array is None or not np.may_share_memory(array, source):
        return array
    # Element by element it may be overwritten, but not where one's place is that of another.
    return array if array.ctypes.data == source.ctypes.data else None


def check_out(out: Any, like: Any, shape: tuple[int, ...]) -> None:
    """Refuse an `out` of another kind, dtype or shape than the result's.

    Raises:
        TypeError, ValueError: it does not fit; the text says what would.
    """
    fits = (
        isinstance(like, np.ndarray | np.generic)
        if isinstance(out, np.ndarray)
        else (is_tensor(out) and is_tensor(like))
    )
    if not fits:
        raise TypeError(f"out= is a {type(out).__name__}, but the input a {type(like).__name__}")
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ValueError(
            f"out= has dtype {out.dtype} and shape {tuple(out.shape)}; "
            f"the result has dtype {like.dtype} and shape {tuple(shape)}"
        )
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out= is read-only")


@cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=1024)
def _description(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{_dtype_name(dtype)} {list(shape)}"


def _combine(obj: Any, op: Op, dtype: np.dtype[Any]) -> Combine:
    if is_tensor(obj) and (op.name.startswith("custom:") or _half(obj)):
        return _tensor_combine(obj, op)
    if not op.name.startswith("custom:") and (op.name, dtype) not in _checked:
        one = np.zeros(1, dtype)
        try:
            op.array(one, one, one)  # here rather than in the middle of the job
        except TypeError as why:
            raise TypeError(f"{op.name} is not defined for arrays of {dtype}: {why}") from None
        _checked.add((op.name, dtype))
    return op.array


def _half(tensor: torch.Tensor) -> bool:
    """Whether torch must do the arithmetic: numpy is far slower on halves, or lacks them."""
    return not numpy_has(tensor) or (tensor.element_size() <= 2 and tensor.is_floating_point())


def _tensor_combine(like: torch.Tensor, op: Op) -> Combine:
    import torch

    functions: dict[str, Callable[[Any, Any], torch.Tensor]] = {
        "sum": torch.add,
        "prod": torch.mul,
        "min": torch.minimum,
        "max": torch.maximum,
        "land": torch.logical_and,
        "lor": torch.logical_or,
    }
    function = functions.get(op.name, op.scalar if op.name.startswith("custom:") else None)
    if function is None:
        raise TypeError(f"{op.name} is not defined for tensors of {like.dtype}")

    def combine(left: Array, right: Array, out: Array) -> None:
        result = function(_to_tensor(left, like), _to_tensor(right, like))
        if tuple(result.shape) != out.shape:
            raise ValueError(f"the custom operation changed the shape to {tuple(result.shape)}")
        np.copyto(out, as_numpy(result.to(like.dtype)))

    return combine
