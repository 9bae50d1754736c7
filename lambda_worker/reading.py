"""A rank's rows, over one or many files, a block at a time and the next one in advance."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lambda_worker import aside
from lambda_worker.dataset import OPENERS, SHAPES, Array, DatasetError, File, open_file
from lambda_worker.shard import Piece, cut

Item = TypeVar("Item")

BLOCK = 8 << 20  # bytes; a request to S3 takes some 30 ms, as long as 2 MB take to come
READER_SECONDS = 1.0  # a block takes less, where all is well


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
        files = aside.in_parallel(lambda url: open_file(url, folder), urls, OPENERS)
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
