"""Which operations of torch the time of a batch goes to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lambda_worker.atomic import replacing

if TYPE_CHECKING:
    from lambda_worker.engine import Predict
    from lambda_worker.reading import Shard

__all__ = ["BATCHES", "profile"]

BATCHES = 3
_OPERATIONS = 12


def profile(predict: Predict, shard: Shard, batch_size: int, folder: Path) -> dict[str, Any]:
    """Run the first batches of a shard inside torch's profiler.

    Args:
        predict: a model in torch.
        shard: at least one row.
        folder: gets ``trace.json``, for chrome://tracing or ui.perfetto.dev.

    Returns:
        batches, rows, the path of the trace, and ``operations`` by falling share of the time:
        name, calls, self_cpu_ms (in the operation itself, on the calling thread), share (0 to 1).

    Raises:
        OSError: the trace cannot be written.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    rows = min(BATCHES * batch_size, len(shard))
    starts = range(0, rows, batch_size)
    batches = [shard.batch(start, min(start + batch_size, rows)) for start in starts]
    inputs = [tuple(a.astype(np.float32, copy=False) for a in batch[:2]) for batch in batches]
    seen = profiler(activities=[ProfilerActivity.CPU])
    with _quiet():
        seen.start()
    for images, magnitudes in inputs:
        predict(images, magnitudes)
    with _quiet():
        seen.stop()
    trace = folder / "trace.json"
    with replacing(trace) as partial:
        seen.export_chrome_trace(str(partial))
    return {
        "batches": len(batches),
        "rows": rows,
        "trace": str(trace),
        "operations": _operations(seen.key_averages()),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what goes to stderr: some builds of the profiler announce each start and stop."""
    own, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)


def _operations(averages: Iterable[Any]) -> list[dict[str, Any]]:
    found = sorted(averages, key=lambda each: each.self_cpu_time_total, reverse=True)
    total = sum(each.self_cpu_time_total for each in found)
    return [
        {
            "name": each.key,
            "calls": each.count,
            "self_cpu_ms": each.self_cpu_time_total / 1000,
            "share": each.self_cpu_time_total / total if total else 0.0,
        }
        for each in found[:_OPERATIONS]
    ]
