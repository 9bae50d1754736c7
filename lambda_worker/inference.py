"""Inference of a rank's shard, batch by batch, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lambda_worker.dataset import Rows, Shard
from lambda_worker.engine import Predict

Item = TypeVar("Item")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inferred:
    """Predictions of a shard and what they took.

    Attributes:
        z_phot: (N,) float32; NaN where the row is excluded from the metrics, because an input, the
            redshift or the prediction is not finite, or z_spec is not above -1 (1 + z divides).
        z_spec: (N,) float64.
        batches: how many times the model was called.
        bits: size of the images and magnitudes in the file's number formats.
        wall_seconds, cpu_seconds: the loop's elapsed time, and the process's CPU time in it.
        read_seconds: how much of the elapsed time the loop has waited for rows to be read.
    """

    z_phot: NDArray[np.float32]
    z_spec: NDArray[np.float64]
    batches: int
    bits: int
    wall_seconds: float
    cpu_seconds: float
    read_seconds: float

    @property
    def excluded(self) -> NDArray[np.intp]:
        """Rows of the shard that are excluded from the metrics."""
        return np.flatnonzero(np.isnan(self.z_phot))


def run(
    predict: Predict,
    shard: Shard,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> Inferred:
    """Predict every row of the shard, in order.

    Args:
        predict: the model.
        shard: may be empty.
        batch_size: rows at a time; the last batch may be smaller. Batches span files.
        progress: called after each batch with rows done and rows in all.
    """
    total, bits, batches, waited = len(shard), 0, 0, 0.0
    z_phot = np.empty(total, np.float32)
    z_spec = np.empty(total, np.float64)
    wall, cpu = time.perf_counter(), time.process_time()
    with closing(shard.batches(batch_size)) as parts:
        while part := _timed_next(parts):
            (start, stop, rows), seconds = part
            waited += seconds
            z_phot[start:stop] = _predict(predict, rows)
            z_phot[[row for row in range(start, stop) if shard.flaw(row)]] = np.nan
            z_spec[start:stop] = rows.redshift
            bits += 8 * (rows.images.nbytes + rows.magnitudes.nbytes)
            batches += 1
            progress(stop, total)
    elapsed = time.perf_counter() - wall, time.process_time() - cpu
    return Inferred(z_phot, z_spec, batches, bits, *elapsed, waited)


def _timed_next(items: Iterator[Item]) -> tuple[Item, float] | None:
    """The next item and the seconds until it was there; None at the end."""
    start = time.perf_counter()
    item = next(items, None)
    return None if item is None else (item, time.perf_counter() - start)


def _predict(predict: Predict, rows: Rows) -> NDArray[np.float32]:
    """z_phot of a batch, (B,) float32, NaN where it is not finite."""
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is told
        images, magnitudes = (array.astype(np.float32, copy=False) for array in rows[:2])
    z_phot = predict(images, magnitudes)
    # An infinite prediction must not count either, and NaN is the one mark.
    return np.where(np.isfinite(z_phot), z_phot, np.float32(np.nan))
