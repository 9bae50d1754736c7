"""Inference of a rank's shard, batch by batch, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lambda_worker.dataset import Rows, Shard
from lambda_worker.engine import Predict

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
    """

    z_phot: NDArray[np.float32]
    z_spec: NDArray[np.float64]
    batches: int
    bits: int
    wall_seconds: float
    cpu_seconds: float

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
    total, bits, batches = len(shard), 0, 0
    z_phot = np.empty(total, np.float32)
    z_spec = np.empty(total, np.float64)
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        rows = shard.batch(start, stop)
        z_phot[start:stop] = _predict(predict, rows)
        z_spec[start:stop] = rows.redshift
        bits += 8 * (rows.images.nbytes + rows.magnitudes.nbytes)
        batches += 1
        progress(stop, total)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Inferred(z_phot, z_spec, batches, bits, *seconds)


def _predict(predict: Predict, rows: Rows) -> NDArray[np.float32]:
    """z_phot of a batch, (B,) float32, NaN where `Inferred` says."""
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is told
        images, magnitudes = (array.astype(np.float32, copy=False) for array in rows[:2])
    z_phot = predict(images, magnitudes)
    usable = np.isfinite(rows.images).all((1, 2, 3)) & np.isfinite(rows.magnitudes).all(1)
    # An infinite prediction must not count either, and NaN is the one mark.
    usable &= np.isfinite(rows.redshift) & (rows.redshift > -1) & np.isfinite(z_phot)
    return np.where(usable, z_phot, np.float32(np.nan))
