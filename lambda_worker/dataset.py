"""Reading `.pt` files that nobody vouches for.

A file holds a TensorDataset (or a tuple) of images (N, 5, 32, 32), magnitudes (N, 5) and redshift
(N,), each float32 or float64. Only the bytes of the rows that are used are read (`ptfile`), local
or from S3, a block at a time and the next one in advance. What cannot be read so is read whole by
torch with `weights_only=True`. Nothing in a file is ever executed.
"""

from __future__ import annotations

import logging
import pickle
import re
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lambda_worker import aside, ptfile, storage
from lambda_worker.archive import Damaged, FormatError, Refused, Unusual
from lambda_worker.shard import Piece, cut

log = logging.getLogger("lambda_worker")

Array = NDArray[Any]
Item = TypeVar("Item")

SHAPES = {"images": (5, 32, 32), "magnitudes": (5,), "redshift": ()}
BLOCK = 8 << 20  # bytes; a request to S3 takes some 30 ms, as long as 2 MB take to come
WINDOW = 1 << 20  # bytes of magnitudes or redshift that are read at once: rows of several blocks
READER_SECONDS = 1.0  # a block takes less, where all is well
OPENERS = 16  # files at a time: to open one takes five requests, one after the other


class DatasetError(ValueError):
    """A data file cannot be used; the text names the file and the problem."""


class Rows(NamedTuple):
    """Rows of a dataset, each column float32 or float64.

    Images (N, 5, 32, 32) are in nanomaggies, in the bands ugriz; magnitudes are (N, 5); redshift
    is (N,).
    """

    images: Array
    magnitudes: Array
    redshift: Array

    def part(self, start: int, stop: int) -> Rows:
        return Rows(*(array[start:stop] for array in self))


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


class Shard:
    """The rows of a rank, over one or many files, in order.

    Args:
        pieces: which rows; may be empty, and may name a file several times.
        folder: takes downloads of objects that cannot be read by range.

    Raises:
        DatasetError: a file is missing, damaged, or has other rows than the pieces say.
        StorageError: a file cannot be read.
    """

    def __init__(self, pieces: Sequence[Piece], folder: Path) -> None:
        self.pieces = [piece for piece in pieces if piece.start < piece.stop]
        urls = sorted({piece.file for piece in self.pieces})
        files = aside.in_parallel(lambda url: _open(url, folder), urls, OPENERS)
        self._files = dict(zip(urls, files, strict=True))
        for piece in self.pieces:
            _check_rows(piece, self._files[piece.file].rows)
        self._lengths = {str(i): p.stop - p.start for i, p in enumerate(self.pieces)}
        self._checked, self._flaws = 0, dict[int, str]()

    def __len__(self) -> int:
        return sum(self._lengths.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the files that were read so far, directories included."""
        return sum(file.bytes_read for file in self._files.values())

    @property
    def requests(self) -> int:
        """Reads of local files and requests to S3 so far."""
        return sum(file.requests for file in self._files.values())

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """Of each column the widest number format of all files."""
        return [array.dtype for array in _empty(0, list(self._files.values()))]

    def batches(
        self, batch_size: int, look: aside.Look = aside.nothing
    ) -> Generator[tuple[int, int, Rows]]:
        """All rows in order as (start, stop, rows `start` to `stop` of the shard).

        They are views of blocks of 8 MiB, or of one batch if that is larger, and the next block is
        read meanwhile, in a thread that ends with the iterator: close that, if it is left early. At
        most three blocks are in memory, one of which is that of the rows that the caller keeps.
        `look` is called now and then while a block is waited for; it may raise to end that.

        Raises:
            StorageError: a file cannot be read, or was changed meanwhile.
        """
        row = sum(array.nbytes for array in _empty(1, list(self._files.values())))
        step = batch_size * max(1, BLOCK // (batch_size * row))
        total = len(self)
        blocks = (self._block(at, min(at + step, total)) for at in range(0, total, step))
        for first, block in _ahead(blocks, look):
            for at in range(0, len(block.redshift), batch_size):
                part = block.part(at, at + batch_size)
                yield first + at, first + at + len(part.redshift), part

    def batch(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the shard, read now.

        Raises:
            StorageError: a file cannot be read, or was changed meanwhile.
        """
        spans = cut(self._lengths, start, stop)
        files = [self._files[self.pieces[int(span.file)].file] for span in spans]
        rows = _empty(stop - start, files)
        for column in range(len(rows)):
            self.fill(column, start, stop, rows[column])
        return rows

    def fill(self, column: int, start: int, stop: int, out: Array) -> None:
        """Read rows `start` to `stop` of one column into `out`.

        A column is a number, in the order of `SHAPES`. Several threads may do so at once.

        Raises:
            StorageError: a file cannot be read, or was changed meanwhile.
        """
        at = 0
        for span in cut(self._lengths, start, stop):
            piece = self.pieces[int(span.file)]
            part = out[at : (at := at + span.stop - span.start)]
            self._files[piece.file].fill(column, piece.start + span.start, piece.stop, part)

    def flaw(self, row: int) -> str | None:
        """Which part of a row is not finite (or, for a redshift, not above -1), if any."""
        if row < self._checked:  # read by `batches`, which remembers
            return self._flaws.get(row)
        return _flaws(self.batch(row, row + 1)).get(0)

    def _block(self, start: int, stop: int) -> tuple[int, Rows]:
        rows = self.batch(start, stop)
        self._flaws |= {start + row: flaw for row, flaw in _flaws(rows).items()}
        self._checked = max(self._checked, stop)
        return start, rows


def count(url: str) -> int:
    """Number of rows of a file, without reading them.

    Raises:
        DatasetError: as `Shard`.
        StorageError: an object cannot be read.
    """
    try:
        archive = _archive(_ranged(url), url)
        tensors = _tensors(archive.content, url)
        with _format_errors(url):
            for tensor in tensors:
                archive.check(tensor)
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
        archive = _archive(self._ranged, url)
        tensors = _tensors(archive.content, url)
        for name, tensor in zip(SHAPES, tensors, strict=True):
            if tensor.dtype == "bfloat16":
                raise Unusual(f"its {name} are bfloat16: save them again as float32")
            if not tensor.contiguous:
                raise Unusual(f"its {name} are strided: save them again as contiguous()")
        with _format_errors(url):
            self._starts = [archive.start(tensor) for tensor in tensors]
        self.rows = tensors[0].shape[0]
        self.dtypes = [np.dtype(tensor.dtype).newbyteorder("<") for tensor in tensors]
        self._windows = [(0, array) for array in _empty(0, [self])]

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


def _open(url: str, folder: Path) -> File:
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


def _archive(ranged: storage.Ranged, url: str) -> ptfile.TensorFile:
    with _format_errors(url):
        return ptfile.TensorFile(ranged.size, ranged.read)


@contextmanager
def _format_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise DatasetError(f"{url}: {error}") from error


def _check_rows(piece: Piece, rows: int) -> None:
    if piece.stop > rows:
        raise DatasetError(
            f"{piece.file}: has {rows} rows, and row {piece.stop - 1} is wanted: "
            "it is not the file that init saw"
        )


def _empty(rows: int, files: Sequence[File]) -> Rows:
    """Room for rows of these files, in the widest number format of each column."""
    columns = zip(*(file.dtypes for file in files), strict=True) if files else [[np.float32]] * 3
    kinds = [np.result_type(*column) for column in columns]
    shapes = [(rows, *shape) for shape in SHAPES.values()]
    return Rows(*map(np.empty, shapes, kinds))


def _flaws(rows: Rows) -> dict[int, str]:
    """Rows that cannot be used, and the first part of each that is why."""
    found: dict[int, str] = {}
    for name, array in reversed(list(zip(SHAPES, rows, strict=True))):
        good = np.isfinite(array).all(tuple(range(1, array.ndim)))
        if name == "redshift":
            good &= array > -1
        found |= {int(row): name for row in np.flatnonzero(~good)}
    return found


def _ahead(items: Iterator[Item], look: aside.Look) -> Generator[Item]:
    """The items, each made in a thread while the one before is in use."""
    reader = aside.Helper("read")
    following = reader.start(partial(next, items, None))
    try:
        while (item := aside.result(following, look, "rows to be read")) is not None:
            following = reader.start(partial(next, items, None))
            yield item
    finally:
        # Whoever stops early has a reason, and a read may hang for minutes: then it is left alone.
        reader.end(READER_SECONDS)


def _tensors(content: object, name: str) -> list[ptfile.Tensor]:
    if not isinstance(content, list) or len(content) != len(SHAPES):
        many = f"{len(content)} tensors" if isinstance(content, list) else _kind(content)
        raise DatasetError(
            f"{name}: holds {many}, expected a TensorDataset of images, magnitudes and redshift"
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
        raise DatasetError(f"{name}: {what} is torch.{tensor.dtype}, expected float32 or float64")


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

    if type(content) is TensorDataset:
        content = getattr(content, "tensors", None)
    if isinstance(content, tuple | list):
        return [_described(item) for item in content[: len(SHAPES) + 1]]
    if not isinstance(content, torch.Tensor):
        return content
    if content.layout != torch.strided or content.device.type != "cpu":
        return ptfile.Other()
    dtype = str(content.dtype).removeprefix("torch.")
    return ptfile.Tensor(dtype, tuple(content.shape), content.stride(), 0, "", content.numel())
