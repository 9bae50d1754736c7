"""What ``cosmic data split`` does: a dataset of any size into partitions ``1.pt`` to ``K.pt``."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lambda_worker import dataset, storage
from lambda_worker.atomic import replacing
from lambda_worker.events import Payload
from lambda_worker.planning import dataset_files
from lambda_worker.reading import BLOCK, Shard
from lambda_worker.shard import Piece
from workflow.alone import alone
from workflow.ptwriter import OVERHEAD, write_pt

__all__ = ["PLAN", "Cut", "Done", "SplitError", "split"]

PLAN = "split.json"
"""What a folder of partitions says about itself: out of what it was made, and how."""

_AHEAD = 4  # blocks that are read while one is written: a request to S3 waits some 30 ms


class SplitError(ValueError):
    """The dataset cannot be split so, or not into this folder; the text says what to do."""


@dataclass(frozen=True)
class Cut:
    """Where to cut; exactly one is given. ``mb`` are 10^6 bytes, the most that a file may have."""

    rows: int | None = None
    mb: float | None = None
    parts: int | None = None


@dataclass(frozen=True)
class Done:
    """Partitions in the folder, how many of them were there before, and what they hold."""

    parts: int
    kept: int
    rows: int
    largest_rows: int
    largest_bytes: int


class _Span(NamedTuple):
    column: int
    start: int
    stop: int


def split(source: str, out: Path, cut: Cut, progress: Callable[[int, int], None]) -> Done:
    """Write the partitions that are not there yet, each whole or not at all.

    Args:
        source: path or URL of a ``.pt`` file, or of a folder of them in natural order.
        out: folder on this machine, made if needed.
        progress: called with the bytes that are done and all bytes.

    Raises:
        SplitError: see there. DatasetError, StorageError: the source cannot be read.
        OSError: a partition cannot be written. What is finished by then stays, and the same call
            goes on from there.
    """
    place = storage.local_path(source)
    if place is not None and place.is_file() and place.suffix != ".pt":
        raise SplitError(f"{source}: is no .pt file")
    files = dataset_files(Payload(data=source))
    sizes = dict(zip(files, storage.in_parallel(dataset.count, files), strict=True))
    storage.check_writable(str(out))
    with TemporaryDirectory(prefix="cosmic-") as scratch, alone(out, "choose another folder"):
        shard = Shard([Piece(url, 0, rows) for url, rows in sizes.items()], Path(scratch))
        edges = _edges(cut, len(shard), _row_bytes(shard), source)
        _agree(out, _plan(source, sizes, shard, edges, cut))
        _sweep(out)
        todo = [k for k in range(1, len(edges)) if not _is_there(out, k, edges)]
        _check_room(out, sum(edges[k] - edges[k - 1] for k in todo) * _row_bytes(shard))
        _write(shard, out, edges, todo, progress)
    largest = max(last - first for first, last in pairwise(edges))
    parts = len(edges) - 1
    return Done(parts, parts - len(todo), len(shard), largest, largest * _row_bytes(shard))


def _row_bytes(shard: Shard) -> int:
    shapes = dataset.SHAPES.values()
    return sum(
        int(np.prod(shape)) * dtype.itemsize
        for shape, dtype in zip(shapes, shard.dtypes, strict=True)
    )


def _edges(cut: Cut, rows: int, row_bytes: int, source: str) -> list[int]:
    """First row of each partition, and the number of rows."""
    if not rows:
        raise SplitError(f"{source}: has no rows")
    if cut.parts is not None:
        if cut.parts > rows:
            raise SplitError(f"{source}: has {rows:,} rows, too few for {cut.parts:,} partitions")
        return [k * rows // cut.parts for k in range(cut.parts + 1)]
    each = cut.rows or int((cut.mb or 0) * 1e6 - OVERHEAD) // row_bytes
    if each < 1:
        least = (row_bytes + OVERHEAD) / 1e6
        raise SplitError(f"a partition of one row has {least:.3f} MB: give more than {cut.mb:g} MB")
    return [*range(0, rows, each), rows]


def _plan(
    source: str, sizes: dict[str, int], shard: Shard, edges: list[int], cut: Cut
) -> dict[str, Any]:
    """What has to be the same for a split to go on where an earlier one stopped."""
    versions = storage.in_parallel(_version, list(sizes))
    return {
        "source": storage.absolute(source),
        "files": [
            {"file": url, "rows": rows, "version": version}
            for (url, rows), version in zip(sizes.items(), versions, strict=True)
        ],
        "rows": len(shard),
        "dtypes": [str(dtype) for dtype in shard.dtypes],
        "cut": {key: value for key, value in asdict(cut).items() if value is not None},
        "partitions": len(edges) - 1,
    }


def _version(url: str) -> str:
    path = storage.local_path(url)
    if path is None:
        return storage.open_ranged(url).version
    stat = path.stat()  # without the numbers that another mount of the same disk would change
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"


def _agree(out: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder of other data; else say in it what is going to be there."""
    path = out / PLAN
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name.endswith(".pt"))
    if path.exists():
        with suppress(ValueError):
            if json.loads(path.read_bytes()) == plan:
                return
        if foreign:
            raise SplitError(
                f"{out}: holds another split, or one of a file that was changed since (see "
                f"{path}): remove it, or choose another folder"
            )
    elif foreign:
        raise SplitError(
            f"{out}: holds {foreign[0]} already, and all .pt files of a folder are one dataset: "
            "choose another folder"
        )
    storage.write(str(path), json.dumps(plan, indent=1).encode() + b"\n")


def _sweep(out: Path) -> None:
    """Remove what a split that was killed has left half written."""
    for entry in list(out.iterdir()):
        if re.fullmatch(r"\.\d+\.pt\.\d+\.part", entry.name):
            entry.unlink()


def _is_there(out: Path, number: int, edges: list[int]) -> bool:
    path, rows = out / f"{number}.pt", edges[number] - edges[number - 1]
    if not path.exists():
        return False
    if dataset.count(str(path)) != rows:
        raise SplitError(f"{path}: is not of this split, which has {rows:,} rows there: remove it")
    return True


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise SplitError(
            f"{out}: {needed / 1e6:,.0f} MB are still to be written, and {free / 1e6:,.0f} MB are "
            "free: make room, or choose another folder"
        )


def _write(
    shard: Shard,
    out: Path,
    edges: list[int],
    todo: list[int],
    progress: Callable[[int, int], None],
) -> None:
    of = len(shard) * _row_bytes(shard)
    done = of - sum(edges[k] - edges[k - 1] for k in todo) * _row_bytes(shard)

    def counted(blocks: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        nonlocal done
        for block in blocks:
            progress(done, of)
            yield block
            done += block.nbytes

    spans = (span for k in todo for span in _spans(shard, edges[k - 1], edges[k]))
    with ThreadPoolExecutor(_AHEAD, "read") as pool:
        blocks = counted(_read(shard, spans, pool))
        for k in todo:
            _write_one(out / f"{k}.pt", edges[k] - edges[k - 1], shard, blocks)
    progress(of, of)


def _write_one(path: Path, rows: int, shard: Shard, blocks: Iterator[NDArray[Any]]) -> None:
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            write_pt(file, rows, shard.dtypes, blocks)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name with no content
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room, and give the same command again"
            raise OSError(error.errno, f"{error.strerror}: {advice}") from error
        raise


def _spans(shard: Shard, start: int, stop: int) -> Iterator[_Span]:
    for column, dtype in enumerate(shard.dtypes):
        row = int(np.prod(list(dataset.SHAPES.values())[column])) * dtype.itemsize
        step = max(BLOCK // row, 1)
        for at in range(start, stop, step):
            yield _Span(column, at, min(at + step, stop))


def _read(shard: Shard, spans: Iterator[_Span], pool: ThreadPoolExecutor) -> Iterator[NDArray[Any]]:
    """The rows of the spans in order, a few of them read in advance."""
    shapes = list(dataset.SHAPES.values())

    def read(span: _Span) -> NDArray[Any]:
        rows = span.stop - span.start
        out = np.empty((rows, *shapes[span.column]), shard.dtypes[span.column])
        shard.fill(span.column, span.start, span.stop, out)
        return out

    coming = deque(pool.submit(read, span) for _, span in zip(range(_AHEAD), spans, strict=False))
    while coming:
        block = coming.popleft().result()
        coming.extend(pool.submit(read, span) for _, span in zip(range(1), spans, strict=False))
        yield block
