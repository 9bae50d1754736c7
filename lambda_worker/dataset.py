"""Reading `.pt` files that nobody vouches for.

A file holds a TensorDataset (or a tuple) of images (N, 5, 32, 32), magnitudes (N, 5) and redshift
(N,), each float32 or float64. It is read with `weights_only=True`: nothing in it is ever executed.
Local files are mapped, so that only the rows that are used are read.
"""

from __future__ import annotations

import pickle
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from lambda_worker import storage
from lambda_worker.shard import Piece, cut

Array = NDArray[Any]

SHAPES = {"images": (5, 32, 32), "magnitudes": (5,), "redshift": ()}
# Both torch's list of safe classes and Python's warning filters belong to the whole process.
_one_at_a_time = threading.Lock()
# What torch.load raises, besides refusing a global, when a file is damaged or was forged.
DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    OSError,
)
FORBIDDEN = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")


class DatasetError(ValueError):
    """A data file cannot be used; the text names the file and the problem."""


class Rows(NamedTuple):
    """Rows of a dataset: images (N, 5, 32, 32) nanomaggies ugriz, magnitudes (N, 5), redshift
    (N,), each float32 or float64; views of mapped files where possible."""

    images: Array
    magnitudes: Array
    redshift: Array

    def part(self, start: int, stop: int) -> Rows:
        return Rows(*(array[start:stop] for array in self))


class Shard:
    """The rows of a rank, over one or many files, in order.

    Args:
        pieces: which rows; may be empty, and may name a file several times.
        folder: takes downloads of files that are not on this machine.

    Raises:
        DatasetError: a file is missing, damaged, or has other rows than the pieces say.
        StorageError: a file cannot be downloaded.
    """

    def __init__(self, pieces: Sequence[Piece], folder: Path) -> None:
        self.pieces = [piece for piece in pieces if piece.start < piece.stop]
        files = {piece.file for piece in self.pieces}
        loaded = {file: load(storage.fetch(file, folder), file) for file in sorted(files)}
        self._parts = {str(i): _part(loaded, piece) for i, piece in enumerate(self.pieces)}
        self._lengths = {name: len(part.redshift) for name, part in self._parts.items()}

    def __len__(self) -> int:
        return sum(self._lengths.values())

    def batch(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the shard; copied only where they span pieces."""
        spans = cut(self._lengths, start, stop)
        parts = [self._parts[span.file].part(span.start, span.stop) for span in spans]
        return parts[0] if len(parts) == 1 else Rows(*map(np.concatenate, zip(*parts, strict=True)))

    def flaw(self, row: int) -> str | None:
        """Which part of a row is not finite (or, for a redshift, not above -1), if any."""
        rows = self.batch(row, row + 1)
        for name, array in zip(SHAPES, rows, strict=True):
            if not np.isfinite(array).all():
                return name
        return None if float(rows.redshift[0]) > -1 else "redshift"

    def name(self, row: int) -> str:
        """Which file and row the shard's row is, for messages."""
        span = cut(self._lengths, row, row + 1)[0]
        piece = self.pieces[int(span.file)]
        return f"{piece.file} row {piece.start + span.start}"


def load(path: Path, name: str) -> Rows:
    """All rows of a local file, mapped.

    Args:
        name: what messages call the file.

    Raises:
        DatasetError: missing, truncated, not a `.pt` file, needs code to be loaded, or holds
            other tensors than a dataset's.
    """
    if not path.is_file():
        raise DatasetError(f"{name}: no such file")
    with path.open("rb") as file:
        _check_zip(file.read(4), name)
    tensors = _tensors(_load(str(path), name, mmap=True), name)
    return Rows(*(tensor.detach().numpy() for tensor in tensors))


def count(url: str) -> int:
    """Number of rows of a file, without reading them.

    Raises:
        DatasetError: as `load`.
        StorageError: an object cannot be read.
    """
    path = storage.local_path(url)
    if path is not None:
        return len(load(path, url).redshift)
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch.load's documented dry run

    with storage.open_ranged(url) as file, FakeTensorMode():
        _check_zip(file.peek(4), url)
        return len(_tensors(_load(file, url), url)[2])


def _part(files: Mapping[str, Rows], piece: Piece) -> Rows:
    rows = len(files[piece.file].redshift)
    if piece.stop > rows:
        raise DatasetError(
            f"{piece.file}: has {rows} rows, and row {piece.stop - 1} is wanted: "
            "it is not the file that init saw"
        )
    return files[piece.file].part(piece.start, piece.stop)


def _check_zip(start: bytes, name: str) -> None:
    if not start.startswith(b"PK\x03\x04"):
        raise DatasetError(
            f"{name}: not a .pt file as PyTorch writes it since 1.6 (a zip archive): "
            "save it again with torch.save"
        )


def _load(file: Any, name: str, **options: Any) -> object:
    try:
        with (
            _one_at_a_time,
            warnings.catch_warnings(),
            torch.serialization.safe_globals([TensorDataset]),
        ):
            warnings.simplefilter("ignore")  # advice for whoever saved the file, not for its reader
            return torch.load(file, map_location="cpu", weights_only=True, **options)
    except storage.StorageError:
        raise
    except pickle.UnpicklingError as error:
        raise DatasetError(
            f"{name}: refused, it holds something else than plain tensors: {_reason(error)}"
        ) from error
    except DAMAGE as error:
        raise DatasetError(f"{name}: truncated or damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of torch's answer that matters: it wraps it in paragraphs of advice."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    if found := FORBIDDEN.search(text):
        return f"it needs {found[1]} to be loaded"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def _tensors(content: object, name: str) -> Sequence[Tensor]:
    tensors = getattr(content, "tensors", None) if type(content) is TensorDataset else content
    if not isinstance(tensors, tuple | list) or len(tensors) != len(SHAPES):
        raise DatasetError(
            f"{name}: holds a {type(content).__name__}, expected a TensorDataset of "
            "images, magnitudes and redshift"
        )
    for (what, shape), tensor in zip(SHAPES.items(), tensors, strict=True):
        _check(name, what, shape, tensor)
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise DatasetError(
            f"{name}: images, magnitudes and redshift have {lengths} rows, expected equal numbers"
        )
    return tensors


def _check(name: str, what: str, shape: tuple[int, ...], tensor: object) -> None:
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    if not isinstance(tensor, Tensor) or not dense or tensor.device.type != "cpu":
        raise DatasetError(f"{name}: {what} is a {type(tensor).__name__}, expected a dense tensor")
    if tensor.ndim == 0 or tuple(tensor.shape[1:]) != shape:
        wanted = ", ".join(["N", *map(str, shape)])
        raise DatasetError(f"{name}: {what} has shape {tuple(tensor.shape)}, expected ({wanted})")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise DatasetError(f"{name}: {what} is {tensor.dtype}, expected float32 or float64")
