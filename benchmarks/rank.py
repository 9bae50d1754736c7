"""One rank of a benchmark: ``python -m benchmarks.rank PEER``, started by `collectives.py`.

Prints one JSON line: for each case the seconds of an operation on this rank.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.peers import Array, Peer, join

BATCHES = 5
BUDGET = 0.4
"""Seconds that a case may take, by rank 0's estimate."""

MOST = 400
"""Operations in one batch."""


class Case(NamedTuple):
    """An operation on float32 arrays of so many bytes (a rank's, for gather)."""

    op: str
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.nbytes}"


MIB = 1 << 20
CASES = [
    Case("barrier", 0),
    *(Case("allreduce", n) for n in (8, 1024, MIB, 16 * MIB, 64 * MIB)),
    *(Case("gather", n) for n in (1024, MIB)),
    Case("bcast", 16 * MIB),
]
SWEEP = [Case(op, 4**k) for op in ("allreduce", "bcast", "gather") for k in range(2, 13)]


def operation(peer: Peer, case: Case) -> Callable[[], None]:
    """Return the operation to time, after a look at whether its result is right."""
    array: Array = np.full(case.nbytes // 4, peer.rank + 1, np.float32)
    parts = [np.zeros_like(array) for _ in range(peer.size)]
    if case.op == "barrier":
        return peer.barrier
    if case.op == "allreduce":
        peer.allreduce(array)
        assert (array == peer.size * (peer.size + 1) / 2).all()
        array[:] = 0  # repeated sums must not overflow
        return lambda: peer.allreduce(array)
    if case.op == "gather":
        peer.gather(array, parts)
        return lambda: peer.gather(array, parts)
    peer.bcast(array)
    assert (array == 1).all()
    return lambda: peer.bcast(array)


def seconds(run: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def measure(peer: Peer, case: Case) -> float:
    """Return the median over batches of the seconds of one operation, here."""
    run = operation(peer, case)
    peer.barrier()
    estimate = seconds(run, 2)
    share: Array = np.array([BUDGET / BATCHES / estimate], np.float32)
    peer.bcast(share)  # all ranks repeat it as often as rank 0 says
    count = int(min(max(share[0], 1), MOST))
    batches = []
    for _ in range(BATCHES):
        peer.barrier()
        batches.append(seconds(run, count))
    return statistics.median(batches)


def main(name: str, cases: list[Case]) -> None:
    with join(name) as peer:
        peer.barrier()
        print(json.dumps({case.name: measure(peer, case) for case in cases}), flush=True)
        peer.barrier()


if __name__ == "__main__":
    main(sys.argv[1], SWEEP if sys.argv[2:] == ["sweep"] else CASES)
