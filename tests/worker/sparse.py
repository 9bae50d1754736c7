"""Data files of any size that take no room: a hole where the images are."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

NOWHERE = 0xFFFFFFFF  # a 32-bit field whose number stands elsewhere, in 64 bits


class Described:
    """What is pickled as a tensor of any shape, of a storage that exists or not."""

    def __init__(self, key: str, kind: Any, numel: int, *numbers: Any) -> None:
        self.storage = Storage(("storage", kind, key, "cpu", numel))
        self.numbers = numbers  # offset, shape, strides

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.numbers, False, {})


class Storage:
    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Storage) else None


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def sparse_pt(path: Path, rows: int) -> None:
    """A dataset of zeros, float32 images and the rest float64, laid out as `torch.save` does."""
    kinds = (torch.FloatStorage, torch.DoubleStorage, torch.DoubleStorage)
    shapes = ((rows, 5, 32, 32), (rows, 5), (rows,))
    strides = ((5120, 1024, 32, 1), (5, 1), (1,))
    content = TensorDataset()
    content.tensors = tuple(
        Described(str(i), kinds[i], rows * strides[i][0], 0, shapes[i], strides[i])  # type: ignore[misc]
        for i in range(3)
    )
    description = pickled(content)
    with path.open("wb") as file:
        directory = _part(file, "data.pkl", description, len(description))
        directory += _part(file, "version", b"3", 1) + _part(file, "byteorder", b"little", 6)
        for i, width in enumerate((4, 8, 8)):
            directory += _part(file, f"data/{i}", b"", rows * strides[i][0] * width)
        start = file.tell()
        end, length = start + len(directory), len(directory)
        file.write(directory)
        numbers = (6, 6, length, start)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 6, 6, length, NOWHERE, 0))


def _part(file: io.BufferedWriter, name: str, data: bytes, size: int) -> bytes:
    """Write header and data of a part, zeros up to its size; gives its directory entry."""
    full, header = f"archive/{name}".encode(), file.tell()
    fill = -(header + 30 + len(full) + 4) % 64
    crc = zlib.crc32(data)
    local = (b"PK\x03\x04", 45, 0, 0, 0, 0, crc, NOWHERE, NOWHERE, len(full), 4 + fill)
    file.write(struct.pack("<4s5H3L2H", *local) + full + struct.pack("<2H", 0x4246, fill))
    file.write(bytes(fill) + data)
    file.seek(size - len(data), io.SEEK_CUR)
    fields = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, crc, NOWHERE, NOWHERE)
    extra = struct.pack("<2H3Q", 1, 24, size, size, header)
    more = (len(full), len(extra), 0, 0, 0, 0, NOWHERE)
    return struct.pack("<4s6H3L", *fields) + struct.pack("<5H2L", *more) + full + extra
