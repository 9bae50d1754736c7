"""Inference of a rank's shard, batch by batch, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lambda_worker import aside, metrics
from lambda_worker.dataset import DatasetError
from lambda_worker.engine import Engine, Precision, Predict, open_engine
from lambda_worker.reading import Rows, Shard
from lambda_worker.shard import Piece, place

# What of a row may not be usable, in the order in which it is looked at.
PARTS = ("images", "magnitudes", "redshift", "z_phot")

Item = TypeVar("Item")

# Rows that a lower precision is judged by: some runs of them, evenly spread over the shard.
SAMPLE_RUNS, SAMPLE_RUN = 8, 32


class Excluded(NamedTuple):
    """A row that no metric counts, and which of PARTS is to blame."""

    file: str
    row: int
    part: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row} ({self.part})"


@dataclass(frozen=True)
class Inferred:
    """Predictions of a shard and what they took.

    Attributes:
        z_phot: (N,) float32; NaN where the row is excluded from the metrics, because an input, the
            redshift or the prediction is not finite, or z_spec is not above -1 (1 + z divides).
        z_spec: (N,) float64.
        flaws: (N,) uint8: 0 where a row counts, else 1 + which of PARTS is the first to blame.
        bits: size of the images and magnitudes in the file's number formats.
        batch_seconds: (batches,) float64, elapsed time of each batch: reading, model, progress.
        wall_seconds, cpu_seconds: the loop's elapsed time, and the process's CPU time in it.
        read_seconds: how much of the elapsed time the loop has waited for rows to be read.
    """

    z_phot: NDArray[np.float32]
    z_spec: NDArray[np.float64]
    flaws: NDArray[np.uint8]
    bits: int
    batch_seconds: NDArray[np.float64]
    wall_seconds: float
    cpu_seconds: float
    read_seconds: float

    @property
    def batches(self) -> int:
        """How many times the model was called."""
        return len(self.batch_seconds)

    @property
    def excluded(self) -> NDArray[np.intp]:
        """Rows of the shard that are excluded from the metrics."""
        return np.flatnonzero(self.flaws)

    def named(self, pieces: Sequence[Piece]) -> list[Excluded]:
        """The first excluded rows, by file and row; `pieces` are the shard's."""
        rows = [int(row) for row in self.excluded[: metrics.NAMED]]
        return [Excluded(*place(pieces, row), PARTS[self.flaws[row] - 1]) for row in rows]


class Deviation(NamedTuple):
    """Largest difference in z_phot to full precision, and how many rows were compared."""

    max_dz: float
    rows: int


def run(
    predict: Predict,
    shard: Shard,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    look: aside.Look = aside.nothing,
) -> Inferred:
    """Predict every row of the shard, in order.

    Args:
        predict: the model.
        shard: may be empty.
        batch_size: rows at a time; the last batch may be smaller. Batches span files.
        progress: called after each batch with rows done and rows in all.
        look: called now and then while rows are waited for; it may raise to end that.
    """
    total, bits, waited = len(shard), 0, 0.0
    z_phot = np.empty(total, np.float32)
    z_spec = np.empty(total, np.float64)
    flaws = np.empty(total, np.uint8)
    wall, cpu = time.perf_counter(), time.process_time()
    moments = [wall]
    with closing(shard.batches(batch_size, look)) as parts:
        while part := _timed_next(parts):
            (start, stop, rows), seconds = part
            waited += seconds
            found = _predict(predict, rows)
            flaws[start:stop] = _flaws(shard, start, found)
            z_phot[start:stop] = np.where(flaws[start:stop] == 0, found, np.float32(np.nan))
            z_spec[start:stop] = rows.redshift
            bits += 8 * (rows.images.nbytes + rows.magnitudes.nbytes)
            progress(stop, total)
            moments.append(time.perf_counter())
    elapsed = moments[-1] - wall, time.process_time() - cpu
    return Inferred(z_phot, z_spec, flaws, bits, np.diff(moments), *elapsed, waited)


def judge(inferred: Inferred, pieces: Sequence[Piece], strict: bool) -> str | None:
    """What to warn of: rows that no metric counts, or None.

    Raises:
        DatasetError: there are such rows, and `strict` does not allow any.
    """
    named = inferred.named(pieces)
    if not named:
        return None
    count, total = len(inferred.excluded), len(inferred.flaws)
    names = ", ".join(map(str, named)) + (", ..." if count > len(named) else "")
    why = f"what stands in brackets is not finite (or z_spec not above -1): {names}"
    if strict:
        text = f"{count:,} of {total:,} rows cannot be used, as {why}"
        raise DatasetError(f"{text}; mend the data, or let the metrics skip them without strict")
    return f"no metric counts {count:,} of {total:,} rows, as {why}"


def _timed_next(items: Iterator[Item]) -> tuple[Item, float] | None:
    """The next item and the seconds until it was there; None at the end."""
    start = time.perf_counter()
    item = next(items, None)
    return None if item is None else (item, time.perf_counter() - start)


def deviation(
    model: Path,
    engine: Engine,
    precision: Precision,
    threads: int | None,
    shard: Shard,
    z_phot: NDArray[np.float32],
    look: aside.Look = aside.nothing,
) -> Deviation | None:
    """What a precision costs on the shard's own rows; None: it is full, or there are no rows.

    Args:
        model, engine, precision, threads: as `open_engine` took them.
        z_phot, look: as of `compare`.
    """
    if precision == "fp32" or not len(shard):
        return None
    return compare(open_engine(model, engine=engine, threads=threads), shard, z_phot, look)


def compare(
    exact: Predict, shard: Shard, z_phot: NDArray[np.float32], look: aside.Look = aside.nothing
) -> Deviation:
    """Predict a sample of the shard again in full precision, 256 rows at most.

    Args:
        z_phot: of all rows of the shard, in lower precision. Rows that are NaN do not count.
        look: as of `run`.
    """
    starts = list(range(0, len(shard), SAMPLE_RUN))
    if len(starts) > SAMPLE_RUNS:
        starts = np.linspace(0, len(shard) - SAMPLE_RUN, SAMPLE_RUNS).astype(int).tolist()
    largest, count = 0.0, 0
    for start in starts:
        stop = min(start + SAMPLE_RUN, len(shard))
        reading = aside.start(partial(shard.batch, start, stop), "read")
        rows = aside.result(reading, look, "rows to be read again")
        off = np.abs(_predict(exact, rows) - z_phot[start:stop])
        off = off[~np.isnan(off)]
        largest, count = max(largest, float(off.max(initial=0))), count + len(off)
    return Deviation(largest, count)


def _predict(predict: Predict, rows: Rows) -> NDArray[np.float32]:
    """z_phot of a batch, (B,) float32, NaN where it is not finite."""
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is told
        images, magnitudes = (array.astype(np.float32, copy=False) for array in rows[:2])
    z_phot = predict(images, magnitudes)
    # An infinite prediction must not count either, and NaN is the one mark.
    return np.where(np.isfinite(z_phot), z_phot, np.float32(np.nan))


def _flaws(shard: Shard, start: int, z_phot: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What is wrong with rows of the shard from `start` on, (B,) as `Inferred.flaws`."""
    found = [shard.flaw(row) for row in range(start, start + len(z_phot))]
    flaws = np.array([PARTS.index(flaw) + 1 if flaw else 0 for flaw in found], np.uint8)
    flaws[(flaws == 0) & np.isnan(z_phot)] = len(PARTS)
    return flaws
