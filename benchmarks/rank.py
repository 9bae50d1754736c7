"""One rank of a benchmark: ``python -m benchmarks.rank PEER [CASE ...]``; see `collectives.py`.

Prints one JSON line: for each case the seconds of an operation on this rank.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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


KIB, MIB = 1 << 10, 1 << 20
SIZES = (8, 128, KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
CASES = [
    Case("barrier", 0),
    *(Case("allreduce", n) for n in SIZES),
    *(Case("gather", n) for n in (KIB, MIB)),
    Case("bcast", 16 * MIB),
]


def operation(peer: Peer, case: Case) -> Callable[[], Any]:
    """Return the operation to time, after a look at whether its result is right."""
    array: Array = np.full(case.nbytes // 4, peer.rank + 1, np.float32)
    parts = [np.zeros_like(array) for _ in range(peer.size)]
    run: dict[str, Callable[[], Any]] = {
        "barrier": peer.barrier,
        "allreduce": lambda: peer.allreduce(array),
        "gather": lambda: peer.gather(array, parts),
        "bcast": lambda: peer.bcast(array),
    }
    peer.repeat(run[case.op], 1)
    if case.op == "allreduce":
        assert (array == peer.size * (peer.size + 1) / 2).all()
        array[:] = 0  # repeated sums must not overflow
    if case.op == "bcast":
        assert (array == 1).all()
    return run[case.op]


def measure(peer: Peer, case: Case) -> float:
    """Return the median over batches of the seconds of one operation, here."""
    run = operation(peer, case)
    peer.repeat(peer.barrier, 1)
    share: Array = np.array([BUDGET / BATCHES / peer.repeat(run, 2)], np.float32)
    peer.repeat(lambda: peer.bcast(share), 1)  # all ranks repeat it as often as rank 0 says
    count = int(min(max(share[0], 1), MOST))
    batches = []
    for _ in range(BATCHES):
        peer.repeat(peer.barrier, 1)
        batches.append(peer.repeat(run, count))
    return statistics.median(batches)


def main(name: str, cases: list[Case]) -> None:
    with join(name) as peer:
        peer.repeat(peer.barrier, 1)
        print(json.dumps({case.name: measure(peer, case) for case in cases}), flush=True)
        peer.repeat(peer.barrier, 1)


if __name__ == "__main__":
    main(sys.argv[1], [case for case in CASES if not sys.argv[2:] or case.name in sys.argv[2:]])
