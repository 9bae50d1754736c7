"""Inference of a rank's shard, batch by batch, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lambda_worker.dataset import Rows, Shard

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
    model: Callable[[Tensor, Tensor], Tensor],
    shard: Shard,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> Inferred:
    """Predict every row of the shard, in order.

    Args:
        model: takes images (B, 5, 32, 32) and magnitudes (B, 5), float32; returns (B,).
        shard: may be empty.
        batch_size: rows at a time; the last batch may be smaller. Batches span files.
        progress: called after each batch with rows done and rows in all.
    """
    total, bits, batches = len(shard), 0, 0
    z_phot = np.empty(total, np.float32)
    z_spec = np.empty(total, np.float64)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            rows = shard.batch(start, stop)
            z_phot[start:stop] = predict(model, rows)
            z_spec[start:stop] = rows.redshift.numpy()
            bits += 8 * (rows.images.nbytes + rows.magnitudes.nbytes)
            batches += 1
            progress(stop, total)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Inferred(z_phot, z_spec, batches, bits, *seconds)


def predict(model: Callable[[Tensor, Tensor], Tensor], rows: Rows) -> NDArray[Any]:
    """z_phot of a batch, (B,) float32, NaN where `Inferred` says."""
    z_phot = model(rows.images.float(), rows.magnitudes.float())
    finite = [torch.isfinite(tensor).flatten(1).all(1) for tensor in rows[:2]]
    usable = finite[0] & finite[1] & torch.isfinite(rows.redshift) & (rows.redshift > -1)
    # An infinite prediction must not count either, and NaN is the one mark.
    usable &= torch.isfinite(z_phot)
    return torch.where(usable, z_phot, torch.nan).numpy()
