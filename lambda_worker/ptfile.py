"""Where the tensors of a `.pt` file stand in it, found out from its edges, without torch.

Its directory (`archive`) and its pickle (`inert`) are small and tell it, so that whoever wants some
rows can compute which bytes they are.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lambda_worker.archive import Archive, Damaged, Entry, Read, printable
from lambda_worker.inert import Allowed, Made, Storage, content

LIMIT = 1 << 20  # bytes of pickle; a dataset's has 1,500
MAX_DIMENSIONS = 64

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}
SIZES |= {"int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}
STORAGES = {"Double": "float64", "Float": "float32", "BFloat16": "bfloat16", "Half": "float16"}
STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
STORAGES |= {"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}

TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
DATASET = "torch.utils.data.dataset.TensorDataset"
ALLOWED = Allowed(
    kind="plain tensors",
    classes=frozenset({DATASET, "collections.OrderedDict"}),
    functions=frozenset({TENSOR, PARAMETER}),
    types=frozenset(DTYPES),
    # Parts of tensors that are not dense: known, so that the error can say that.
    others=re.compile(
        r"torch\._utils\._rebuild_\w+|torch\.(Size|serialization\._get_layout)"
        r"|torch\.(b?float|int|uint|complex|bool)\w*"
    ),
)


class Tensor(NamedTuple):
    """A dense tensor: shape, strides and offset in elements of its storage, which has `stored`."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: str
    stored: int

    @property
    def contiguous(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True


class Other:
    """A pickled tensor that is not dense, or a part of one."""


class TensorFile:
    """The tensors of a file.

    Args:
        size, read: as of `Archive`.

    Attributes:
        content: what was saved, as `describe` gives it.

    Raises:
        FormatError, Unusual.
    """

    def __init__(self, size: int, read: Read) -> None:
        self._size, self._archive = size, Archive(size, read)
        self.content = describe(self._archive.read("data.pkl", LIMIT))

    def start(self, tensor: Tensor) -> int:
        """Offset in the file of a contiguous tensor's first byte.

        Raises:
            Damaged, Unusual.
        """
        return self._archive.start(self.check(tensor)) + tensor.offset * SIZES[tensor.dtype]

    def check(self, tensor: Tensor) -> Entry:
        """The part that holds a tensor, which lies within it.

        Raises:
            Damaged.
        """
        entry = self._archive.entry(f"data/{tensor.storage}")
        if entry.size != tensor.stored * SIZES[tensor.dtype]:
            raise Damaged(f"{printable(entry.name)} has {entry.size} bytes, expected others")
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        empty = 0 in tensor.shape
        if not empty and tensor.offset + reach >= tensor.stored:
            raise Damaged("a tensor is larger than what is stored of it")
        if not empty and tensor.shape and tensor.shape[0] > self._size:
            raise Damaged(f"{tensor.shape[0]} rows in {self._size} bytes")
        return entry


def describe(pickled: bytes) -> Any:
    """What a pickle describes: `Tensor` or `Other`, a list of them, or something else.

    A TensorDataset is the list of its tensors.

    Raises:
        Refused: it needs something else than tensors; by name. Damaged: it is not a pickle.
    """
    found = content(pickled, ALLOWED)
    if isinstance(found, Made) and found.name == DATASET:
        found = found.state.get("tensors")
    if isinstance(found, tuple | list):
        return [_described(item) for item in found]
    return _described(found)


def _described(value: Any) -> Any:
    while isinstance(value, Made) and value.name == PARAMETER and value.args:
        value = value.args[0]
    if not isinstance(value, Made):
        return value
    match value.args if value.name == TENSOR else ():
        case (Storage(place="meta"), *_) | ():
            return Other()
        case (Storage() as storage, offset, tuple(shape), tuple(stride), *_):
            return _tensor(storage, offset, shape, stride)
        case (Storage(), *_):
            raise Damaged("a tensor without a shape")
    return Other()


def _tensor(
    storage: Storage, offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]
) -> Tensor:
    numbers = (storage.numel, offset, *shape, *stride)
    if not len(shape) == len(stride) <= MAX_DIMENSIONS or not all(
        type(n) is int and 0 <= n < 1 << 62 for n in numbers
    ):
        raise Damaged("a tensor of impossible shape, strides or offset")
    return Tensor(DTYPES[storage.type], shape, stride, offset, storage.key, storage.numel)
