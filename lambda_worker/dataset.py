"""One `.pt` file of a dataset, that nobody vouches for.

A file holds a TensorDataset (or a tuple) of images (N, 5, 32, 32), magnitudes (N, 5) and redshift
(N,), each float32 or float64. Only the bytes of the rows that are used are read (`ptfile`), local
or from S3. What cannot be read so is read whole by torch with `weights_only=True`. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import logging
import pickle
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lambda_worker import ptfile, storage
from lambda_worker.archive import Damaged, FormatError, Refused, Unusual

log = logging.getLogger("lambda_worker")

Array = NDArray[Any]

SHAPES = {"images": (5, 32, 32), "magnitudes": (5,), "redshift": ()}
WINDOW = 1 << 20  # bytes of magnitudes or redshift that are read at once: rows of several blocks
OPENERS = 16  # files at a time: to open one takes five requests, one after the other


class DatasetError(ValueError):
    """A data file cannot be used; the text names the file and the problem."""


class File(Protocol):
    """An open data file; `dtypes` are those of images, magnitudes and redshift."""

    rows: int
    dtypes: list[np.dtype[Any]]

    @property
    def bytes_read(self) -> int: ...

    @property
    def requests(self) -> int: ...

    def fill(self, column: int, start: int, limit: int, out: Array) -> None:
        """Put rows of a column from `start` on into `out`; up to `limit` they may be read."""


def count(url: str) -> int:
    """Number of rows of a file, without reading them.

    Raises:
        DatasetError, StorageError: as `open_file`.
    """
    try:
        file = _tensor_file(_ranged(url))
        tensors = _tensors(file.content, url)
        with _format_errors(url):
            for tensor in tensors:
                file.check(tensor)
        return tensors[0].shape[0]
    except Unusual:
        with storage.scratch() as folder:
            return _Whole(url, folder).rows


class _ByRange:
    """A file of which the rows that are wanted are read.

    Raises:
        DatasetError, StorageError; Unusual: it has to be read whole.
    """

    def __init__(self, url: str) -> None:
        self._ranged = _ranged(url)
        file = _tensor_file(self._ranged)
        tensors = _tensors(file.content, url)
        for name, tensor in zip(SHAPES, tensors, strict=True):
            if tensor.dtype == "bfloat16":
                raise Unusual(f"its {name} are bfloat16: save them again as float32")
            if not tensor.contiguous:
                raise Unusual(f"its {name} are strided: save them again as contiguous()")
        with _format_errors(url):
            self._starts = [file.start(tensor) for tensor in tensors]
        self.rows = tensors[0].shape[0]
        self.dtypes = [np.dtype(tensor.dtype).newbyteorder("<") for tensor in tensors]
        self._windows = [
            (0, np.empty((0, *shape), dtype))
            for shape, dtype in zip(SHAPES.values(), self.dtypes, strict=True)
        ]

    @property
    def bytes_read(self) -> int:
        return self._ranged.bytes_read

    @property
    def requests(self) -> int:
        return self._ranged.requests

    def fill(self, column: int, start: int, limit: int, out: Array) -> None:
        if out[:1].nbytes > 1024:
            self._read(column, start, out)
        else:
            self._fill_from_window(column, start, limit, out)

    def _fill_from_window(self, column: int, start: int, limit: int, out: Array) -> None:
        """Rows of a few bytes: those of many blocks are read at once, and kept meanwhile."""
        at, stop = start, start + len(out)
        while at < stop:
            first, window = self._windows[column]
            if not first <= at < first + len(window):
                length = min(limit - at, max(WINDOW // out[:1].nbytes, 1))
                first, window = at, np.empty((length, *out.shape[1:]), out.dtype)
                self._read(column, at, window)
            end = min(stop, first + len(window))
            out[at - start : end - start] = window[at - first : end - first]
            used = end == first + len(window)
            self._windows[column] = (first, window[:0] if used else window)
            at = end

    def _read(self, column: int, start: int, out: Array) -> None:
        dtype = self.dtypes[column]
        values = out if out.dtype == dtype else np.empty(out.shape, dtype)
        row = values[:1].nbytes
        view = values.reshape(-1).view(np.uint8).data
        self._ranged.read_into(self._starts[column] + start * row, view)
        if values is not out:
            out[...] = values


class _Whole:
    """A file that torch has read whole."""

    def __init__(self, url: str, folder: Path) -> None:
        path = storage.fetch(url, folder)
        self.bytes_read, self.requests = path.stat().st_size, 1
        content = _load(path, url)
        if storage.local_path(url) is None:
            path.unlink()
        self.rows = _tensors(_described(content), url)[0].shape[0]
        self._tensors = getattr(content, "tensors", content)
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in self._tensors]
        self.dtypes = [np.dtype("float32" if n == "bfloat16" else n) for n in names]

    def fill(self, column: int, start: int, limit: int, out: Array) -> None:
        part = self._tensors[column][start : start + len(out)].detach()
        out[...] = (part.float() if part.element_size() == 2 else part).numpy()


def open_file(url: str, folder: Path) -> File:
    """Open a data file.

    Args:
        folder: takes the download of an object that cannot be read by range.

    Raises:
        DatasetError: it is missing, damaged, or holds something else.
        StorageError: an object cannot be read.
    """
    try:
        return _ByRange(url)
    except Unusual as reason:
        whole = _Whole(url, folder)
        size = whole.bytes_read / 1e6
        log.warning("%s: read whole, %.0f MB, because %s", url, size, reason)
        return whole


def _ranged(url: str) -> storage.Ranged:
    path = storage.local_path(url)
    if path is not None and path.is_dir():
        raise DatasetError(f"{url}: is a folder, expected a .pt file")
    if path is not None and not path.is_file():
        raise DatasetError(f"{url}: no such file")
    return storage.open_ranged(url)


def _tensor_file(ranged: storage.Ranged) -> ptfile.TensorFile:
    with _format_errors(ranged.url):
        return ptfile.TensorFile(ranged.size, ranged.read)


@contextmanager
def _format_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise DatasetError(f"{url}: {error}") from error


def _tensors(content: object, name: str) -> list[ptfile.Tensor]:
    if not isinstance(content, list) or len(content) != len(SHAPES):
        what = f"a list of {len(content)}" if isinstance(content, list) else _kind(content)
        raise DatasetError(
            f"{name}: holds {what}, expected a TensorDataset of images, magnitudes and redshift"
        )
    for (what, shape), tensor in zip(SHAPES.items(), content, strict=True):
        _check(name, what, shape, tensor)
    lengths = [tensor.shape[0] for tensor in content]
    if len(set(lengths)) > 1:
        raise DatasetError(
            f"{name}: images, magnitudes and redshift have {lengths} rows, expected equal numbers"
        )
    return content


def _kind(value: object) -> str:
    """What stands in a tensor's place, for a message."""
    a_tensor = isinstance(value, ptfile.Tensor | ptfile.Other)
    return f"a {'Tensor' if a_tensor else type(value).__name__}"


def _check(name: str, what: str, shape: tuple[int, ...], tensor: object) -> None:
    if not isinstance(tensor, ptfile.Tensor):
        raise DatasetError(f"{name}: {what} is {_kind(tensor)}, expected a dense tensor")
    if not tensor.shape or tensor.shape[1:] != shape:
        wanted = ", ".join(["N", *map(str, shape)])
        raise DatasetError(f"{name}: {what} has shape {tensor.shape}, expected ({wanted})")
    if tensor.dtype not in ("float32", "float64", "bfloat16"):
        found = f"{name}: {what} is torch.{tensor.dtype}"
        raise DatasetError(f"{found}, expected float32 or float64: save it again as that")


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
# Both torch's list of safe classes and Python's warning filters belong to the whole process.
_one_at_a_time = threading.Lock()


def _load(path: Path, name: str) -> Any:
    """What torch reads from a file."""
    import torch
    from torch.utils.data import TensorDataset

    try:
        with (
            _one_at_a_time,
            warnings.catch_warnings(),
            torch.serialization.safe_globals([TensorDataset]),
        ):
            warnings.simplefilter("ignore")  # advice for whoever saved the file, not for its reader
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DatasetError(f"{name}: {Refused(_reason(error), ptfile.ALLOWED.kind)}") from error
    except DAMAGE as error:
        raise DatasetError(f"{name}: {Damaged(_reason(error))}") from error


def _reason(error: Exception) -> str:
    """The line of torch's answer that matters: it wraps it in paragraphs of advice."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    if found := FORBIDDEN.search(text):
        return f"it needs {found[1]} to be loaded"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def _described(content: object) -> object:
    """What torch has read in the form of what `ptfile` reads."""
    import torch
    from torch.utils.data import TensorDataset

    def described(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout != torch.strided or value.device.type != "cpu":
            return ptfile.Other()
        dtype = str(value.dtype).removeprefix("torch.")
        return ptfile.Tensor(dtype, tuple(value.shape), value.stride(), 0, "", value.numel())

    if type(content) is TensorDataset:
        content = getattr(content, "tensors", None)
    if isinstance(content, tuple | list):
        return [described(item) for item in content]
    return described(content)
