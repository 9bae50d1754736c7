"""Dataset files of any size, written a block at a time, as `torch.save` would write them whole.

torch.save wants all numbers in memory at once, and a partition may be larger than that. The file is
an uncompressed zip of a pickle, which describes the tensors, and of one part of numbers for each.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lambda_worker.dataset import SHAPES

__all__ = ["OVERHEAD", "write_pt"]

OVERHEAD = 4096
"""More bytes than a file has beside its numbers."""

_ALIGNMENT = 64  # of each part's numbers, as torch has them, for those who map the file
_HEADER, _LARGE = 30, 20  # bytes of a part's header without name, and of its sizes in 64 bits


def write_pt(
    file: IO[bytes], rows: int, dtypes: Sequence[np.dtype[Any]], blocks: Iterable[NDArray[Any]]
) -> None:
    """Write a TensorDataset of images, magnitudes and redshift.

    The same content makes the same bytes.

    Args:
        file: a new file that can seek.
        rows: of each tensor.
        dtypes: of each tensor, float32 or float64.
        blocks: the rows of the images in order, then of the magnitudes, then of the redshift, each
            in blocks of any length; of those not one more is taken than is needed.

    Raises:
        OSError: it cannot be written.
    """
    taken = iter(blocks)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {
            "data.pkl": _pickled(rows, dtypes),
            "byteorder": b"little",
            "version": b"3\n",
        }.items():
            with _part(archive, name) as part:
                part.write(data)
        for column, dtype in enumerate(dtypes):
            with _part(archive, f"data/{column}") as part:
                done = 0
                while done < rows:
                    block = next(taken)
                    little = np.ascontiguousarray(block, dtype.newbyteorder("<"))
                    part.write(little.reshape(-1).view(np.uint8).data)
                    done += len(block)


def _part(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Begin a part whose data are aligned."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    start = archive.start_dir + _HEADER + len(entry.filename) + 4 + _LARGE
    fill = -start % _ALIGNMENT
    entry.extra = b"FB" + fill.to_bytes(2, "little") + bytes(fill)
    return archive.open(entry, "w", force_zip64=True)


class _Tensor:
    """What is pickled as a contiguous tensor, whose numbers are the part `key`."""

    def __init__(self, key: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.storage, self.shape = _Storage(key, int(np.prod(shape)), dtype), shape

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        strides = [int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape))]
        hooks: OrderedDict[str, Any] = OrderedDict()
        numbers = (0, self.shape, tuple(strides), False, hooks)
        return torch._utils._rebuild_tensor_v2, (self.storage, *numbers)


class _Storage:
    def __init__(self, key: int, numel: int, dtype: np.dtype[Any]) -> None:
        import torch

        kind = {4: torch.FloatStorage, 8: torch.DoubleStorage}[dtype.itemsize]
        self.identity = ("storage", kind, str(key), "cpu", numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None


def _pickled(rows: int, dtypes: Sequence[np.dtype[Any]]) -> bytes:
    from torch.utils.data import TensorDataset

    content = TensorDataset()
    content.tensors = tuple(
        _Tensor(key, (rows, *shape), dtype)  # type: ignore[misc]
        for key, (shape, dtype) in enumerate(zip(SHAPES.values(), dtypes, strict=True))
    )
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()
