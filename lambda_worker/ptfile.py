"""Where the tensors of a `.pt` file stand in it, found out from its edges, without torch.

A file as `torch.save` writes it since 1.6 is a zip archive of uncompressed parts: a pickle that
describes the tensors, and one part of raw numbers per storage. Here are the directory (APPNOTE.TXT
4.3, PKWARE) and the pickle of such a file read, which are small, so that whoever wants some rows
can compute which bytes they are. Nothing is executed and nothing is believed: of the pickle's
instructions only those are obeyed that build tensors, and every number is checked against the file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pickletools import genops
from typing import Any, NamedTuple

EDGE = 4096  # bytes at either end that are read at once; torch's directory takes some 700
LIMIT = 1 << 20  # bytes of pickle or directory; a dataset's pickle has 1,500
MAX_NAME = 100  # characters of a class's or function's name, which few bytes of pickle repeat
MAX_LENGTH = 64  # arguments of a call, dimensions of a tensor: the same
ZIP = b"PK\x03\x04"
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: until 1.5

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}
SIZES |= {"int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}
STORAGES = {"Double": "float64", "Float": "float32", "BFloat16": "bfloat16", "Half": "float16"}
STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
STORAGES |= {"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}

TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
DATASET = "torch.utils.data.dataset.TensorDataset"
# Parts of tensors that are not dense: known, so that the error can say that, but not understood.
OTHER_TENSOR = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(Size|serialization\._get_layout)"
    r"|torch\.(b?float|int|uint|complex|bool)\w*"
)

Read = Callable[[int, int], bytes]
"""Exactly so many bytes of the file from an offset, both within it."""


class FormatError(ValueError):
    """The file cannot be used; the text says why, but not which file."""


class Damaged(FormatError):
    """The file is truncated or damaged, or was forged."""

    def __init__(self, what: str) -> None:
        super().__init__(f"truncated or damaged: {what}")


class Refused(FormatError):
    """The file holds something that is not obeyed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"refused, it holds something else than plain tensors: {what}")


class Unusual(ValueError):
    """The file may be good, but its rows cannot be read by range.

    The text says why, and what would mend it.
    """


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


class TensorDataset:
    """A pickled torch.utils.data.TensorDataset."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}


class Other:
    """A pickled tensor that is not dense, or a part of one."""


class Entry(NamedTuple):
    """A part of the archive: offset of its header, and of what follows the part."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int
    end: int


class Archive:
    """The directory and the pickle of a file.

    Args:
        size: of the file, bytes.
        read: gives bytes of the file; called for its two edges, and seldom more.

    Attributes:
        content: what was saved: `Tensor`, `TensorDataset`, `Other`, and plain Python objects.

    Raises:
        FormatError, Unusual.
    """

    def __init__(self, size: int, read: Read) -> None:
        self._size, self._read = size, read
        self._head = read(0, min(size, EDGE))
        if self._head.startswith(OLD):
            raise Unusual("it has PyTorch's old format: save it again with torch.save")
        if not self._head.startswith(ZIP):
            raise FormatError(
                "not a .pt file as PyTorch writes it since 1.6 (a zip archive): "
                "save it again with torch.save"
            )
        self._tail = read(max(size - EDGE, 0), min(size, EDGE)) if size > EDGE else self._head
        self._entries = self._directory()
        names = [name for name in self._entries if re.fullmatch("[^/]+/data.pkl", name)]
        if len(names) != 1:
            raise Damaged(f"{len(names)} data.pkl in it, expected one")
        self._folder = names[0].partition("/")[0]
        self._check_byte_order()
        self.content = describe(self._whole(names[0]))

    def start(self, tensor: Tensor) -> int:
        """Offset in the file of a contiguous tensor's first byte.

        Raises:
            Damaged, Unusual.
        """
        width = SIZES[tensor.dtype]
        entry = self.check(tensor)
        return self._data(entry) + tensor.offset * width

    def check(self, tensor: Tensor) -> Entry:
        """The part that holds a tensor, which lies within it.

        Raises:
            Damaged.
        """
        entry = self._entries.get(f"{self._folder}/data/{tensor.storage}")
        if entry is None:
            raise Damaged(f"its part {tensor.storage[:20]!r} is missing")
        if entry.size != tensor.stored * SIZES[tensor.dtype]:
            raise Damaged(f"{entry.name} has {entry.size} bytes, expected others")
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        empty = 0 in tensor.shape
        if not empty and tensor.offset + reach >= tensor.stored:
            raise Damaged("a tensor is larger than what is stored of it")
        if not empty and tensor.shape and tensor.shape[0] > self._size:
            raise Damaged(f"{tensor.shape[0]} rows in {self._size} bytes")
        return entry

    def _get(self, offset: int, length: int) -> bytes:
        """Bytes of the file, out of an edge if possible."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise Damaged("it points to a place outside of it")
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        at = offset - (self._size - len(self._tail))
        return self._tail[at : at + length] if at >= 0 else self._read(offset, length)

    def _directory(self) -> dict[str, Entry]:
        count, length, start = _end(self._tail, self._size, self._get)
        if length > LIMIT or count * 46 > length:
            raise Damaged(f"a zip directory of {count} parts in {length} bytes")
        entries = _entries(self._get(start, length), count, start)
        if len({entry.name for entry in entries}) != count:
            raise Damaged("two parts have one name")
        return {entry.name: entry for entry in entries}

    def _data(self, entry: Entry) -> int:
        """Offset of a part's data; its header says how long it is itself."""
        if entry.method or entry.packed != entry.size or entry.flags & 1:
            raise Unusual("its parts are compressed: save it again with torch.save")
        name = entry.name.encode("latin-1")
        header = self._get(entry.header, 30 + len(name))
        kind, length, extra = struct.unpack("<4s22x2H", header[:30])
        if kind != ZIP or header[30 : 30 + length] != name:
            raise Damaged(f"no header of {entry.name} where it should be")
        start: int = entry.header + 30 + length + extra
        # What follows the data: nothing, or checksum and sizes once more. This is checked because
        # a wrong length in the header would shift all numbers, and a part of them has no checksum.
        large = max(entry.size, entry.header) >= 0xFFFFFFFF
        after = (24 if large else 16) if entry.flags & 8 else 0
        if start + entry.size + after != entry.end:
            raise Unusual("it is not laid out as torch.save does it: save it again with torch.save")
        return start

    def _whole(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.size > LIMIT:
            raise Refused(f"{entry.size} bytes of pickle")
        data = self._get(self._data(entry), entry.size)
        if zlib.crc32(data) != entry.crc:
            raise Damaged(f"wrong checksum of {name}")
        return data

    def _check_byte_order(self) -> None:
        name = f"{self._folder}/byteorder"  # there since torch 2.1; before, all were little
        order = self._whole(name) if name in self._entries else b"little"
        if order == b"big":
            raise Unusual("its numbers are big-endian: save it again on this machine")
        if order != b"little":
            raise Damaged(f"byte order {order[:20]!r}")


def _end(tail: bytes, size: int, get: Read) -> tuple[int, int, int]:
    """Number of parts, and length and offset of the directory, from the end of the file."""
    at = tail.rfind(b"PK\x05\x06", 0, max(len(tail) - 18, 0))
    if at < 0:
        raise Damaged("no zip directory at its end")
    count, length, start = struct.unpack("<10xH2L2x", tail[at : at + 22])
    end = size - len(tail) + at
    locator = get(end - 20, 20) if end >= 20 else b""
    if locator.startswith(b"PK\x06\x07"):
        end = struct.unpack("<8xQ4x", locator)[0]
        large = get(end, 56)
        if not large.startswith(b"PK\x06\x06"):
            raise Damaged("no large zip directory where it should be")
        count, length, start = struct.unpack("<32x3Q", large)
    if start + length != end:
        raise Damaged("its zip directory is not where it should be")
    return count, length, start


def _entries(data: bytes, count: int, start: int) -> list[Entry]:
    """The directory's entries, in the order in which the parts stand in the file."""
    found, at = [], 0
    for _ in range(count):
        entry, at = _entry(data, at)
        found.append(entry)
    found.sort(key=lambda entry: entry.header)
    ends = [*(entry.header for entry in found), start][1:]
    return [entry._replace(end=end) for entry, end in zip(found, ends, strict=True)]


def _entry(data: bytes, at: int) -> tuple[Entry, int]:
    fixed = data[at : at + 46]
    if len(fixed) < 46 or not fixed.startswith(b"PK\x01\x02"):
        raise Damaged("its zip directory is damaged")
    fields = struct.unpack("<8x2H4x3L3H8xL", fixed)
    flags, method, crc, packed, size, name_length, extra_length, comment, header = fields
    place = at + 46 + name_length
    name = data[at + 46 : place].decode("latin-1")  # whatever its encoding
    extra = data[place : place + extra_length]
    size, packed, header = _large(extra, [size, packed, header])
    end = place + extra_length + comment
    if end > len(data):
        raise Damaged("its zip directory is damaged")
    return Entry(name, flags, method, crc, packed, size, header, 0), end


def _large(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that do not fit into 32 bits from the extra field (kind 1)."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [
                number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])
            ]
            return [wide.pop(0) if v == 0xFFFFFFFF and wide else v for v in values]
        extra = extra[4 + length :]
    return values


def describe(pickled: bytes) -> Any:
    """What a pickle describes, as inert objects.

    Raises:
        Refused: it needs something else than tensors; by name. Damaged: it is not a pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in genops(pickled):
            if operation.name == "STOP":
                break
            _step(operation.name, argument, stack, memo)
        (content,) = stack
    except Refused:
        raise
    # A warning is one where the program says so; genops warns of odd escapes.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, Warning) as error:
        raise Damaged(f"its pickle: {str(error)[:100]}") from error
    return content


class _Name(str):
    """A class or function that the pickle names."""


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction of the pickle's machine, of those that torch.save makes use of."""
    match name:
        case "PROTO" | "FRAME":
            pass
        case _ if name in _VALUES:
            stack.append(argument)
        case _ if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "TUPLE":
            stack.append(tuple(_marked(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(_popped(stack, int(name[-1]))))
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "APPEND" | "APPENDS":
            items = _popped(stack, 1) if name == "APPEND" else _marked(stack)
            list.extend(stack[-1], items)
        case "SETITEM" | "SETITEMS":
            items = _popped(stack, 2) if name == "SETITEM" else _marked(stack)
            _set_items(stack[-1], items)
        case "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        case "STACK_GLOBAL":
            stack.append(_named(".".join(_popped(stack, 2))))
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case "REDUCE" | "NEWOBJ":
            function, arguments = _popped(stack, 2)
            stack.append(_call(function, arguments))
        case "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        case _:
            raise Refused(f"its pickle holds the instruction {name}")


def _popped(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _marked(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("items of something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only what has a hash at once: that of a tuple in a tuple in a tuple ... ends the process.
        if not isinstance(key, str | int):
            raise Refused(f"a dict with a key of type {type(key).__name__}")
        target[key] = value


def _named(name: str) -> _Name:
    if len(name) > MAX_NAME:
        raise Refused(f"it needs {name[:MAX_NAME]}... to be loaded")
    known = name in DTYPES or name in (TENSOR, PARAMETER, DATASET, "collections.OrderedDict")
    if not known and not OTHER_TENSOR.fullmatch(name):
        raise Refused(f"it needs {name} to be loaded")
    return _Name(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name):
        raise Refused(f"it calls a {type(function).__name__}")
    if type(arguments) is not tuple or len(arguments) > MAX_LENGTH:
        raise ValueError("a call with something else than a few arguments")
    if function == "collections.OrderedDict" and arguments == ():
        return OrderedDict()
    if function == DATASET and arguments == ():
        return TensorDataset()
    if function == TENSOR:
        return _tensor(*arguments)
    return arguments[0] if function == PARAMETER else Other()


def _build(target: Any, state: Any) -> None:
    if type(target) is not TensorDataset or type(state) is not dict:
        raise Refused(f"it sets the state of a {type(target).__name__}")
    target.state = state


class _Storage(NamedTuple):
    dtype: str
    key: str
    place: str
    numel: int


def _storage(identity: Any) -> _Storage:
    kind, dtype, key, place, count = identity
    if kind != "storage" or not all(isinstance(text, str) for text in (dtype, key, place)):
        raise ValueError("a storage that is not one")
    if type(count) is not int or count < 0 or dtype not in DTYPES:
        raise ValueError("a storage of a negative size or an unknown type")
    return _Storage(DTYPES[dtype], key, place, count)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Tensor | Other:
    if not isinstance(storage, _Storage) or storage.place == "meta":
        return Other()
    same = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not same or len(shape) > MAX_LENGTH:
        raise ValueError("a tensor of impossible shape or strides")
    numbers = (offset, *shape, *stride)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a tensor of impossible shape, strides or offset")
    return Tensor(storage.dtype, shape, stride, offset, storage.key, storage.numel)
