"""Batches cut into slices that fit the cache, one thread to a slice, for every engine.

Threads that share each operation wait for each other some hundreds of times per batch. Here each
takes a slice through the whole model by itself. It is faster, takes memory for the slices alone,
and gives the same bits for any number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from lambda_worker.engine import Array, Predict

SLICE = 32
"""Rows at most that go through the model together: what they leave behind fits the cache."""


def in_slices(run: Predict, mapped: Any = map, at_once: int = 1, size: int = SLICE) -> Predict:
    """Return `run` for batches of any size.

    Args:
        run: the model; several threads may call it if `mapped` has several.
        mapped: `map`, or the same of a pool of threads.
        at_once: slices that it works on at one time.
        size: rows of a slice at most.
    """
    return partial(_predict, run, mapped, at_once, size)


def _predict(
    run: Predict, mapped: Any, at_once: int, size: int, images: Array, magnitudes: Array
) -> Array:
    def one(part: slice) -> Array:
        arrays = images[part], magnitudes[part]
        if part.stop - part.start > 1:
            return run(*arrays)
        # For a single row engines have kernels of their own, which add up in another order.
        return run(*(np.concatenate((array, array)) for array in arrays))[:1]

    return np.concatenate(list(mapped(one, cut(len(images), at_once, size))))


def cut(rows: int, at_once: int, size: int = SLICE) -> list[slice]:
    """Cut rows evenly into slices, a multiple of `at_once` if there are enough rows."""
    count = -(-rows // size)
    count = max(1, min(-(-count // at_once) * at_once, rows))
    return [slice(rows * n // count, rows * (n + 1) // count) for n in range(count)]
