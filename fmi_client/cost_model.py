"""What an operation costs: messages, bytes, seconds and US dollars, before it is run.

Hockney's model (1994) with a term for arithmetic, as in Thakur, Rabenseifner and Gropp 2005,
"Optimization of Collective Communication Operations in MPICH": a message of n bytes takes
`latency` + n / `bandwidth` seconds, and to combine n bytes takes n / `reduction`. The numbers of
messages and bytes are those of the algorithms in `fmi_client.collectives`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgpack
import numpy as np

from fmi_client import collectives, reductions
from fmi_client.collectives import DIRECT_BYTES, SEGMENT_BYTES, Step, Steps
from fmi_client.errors import ProtocolError
from fmi_client.payloads import allocate
from fmi_client.protocol.peer import Payload

PROBE_BYTES = 4 * 1024 * 1024
"""What is exchanged to measure the bandwidth: more than fits in a core's cache."""

PROBE_SECONDS = 0.1
"""About so long each of the two measurements takes, but `FEWEST` repetitions at least."""

FEWEST, MOST = 3, 100


class Work(NamedTuple):
    """What an operation does.

    `rounds` of messages follow each other, in which `nbytes` must pass through the busiest rank
    one way, and `reduced` bytes must be combined one after the other. The busiest rank sends (or
    receives) `messages`; all ranks together send `total`.
    """

    rounds: int
    nbytes: float
    reduced: float
    messages: int
    total: int


@dataclass(frozen=True, slots=True)
class Model:
    """Costs of operations on a job's links.

    Args:
        latency: seconds that a small message takes.
        bandwidth: bytes a second one way, while all ranks send and receive.
        reduction: bytes a second that a rank can add up.
    """

    latency: float
    bandwidth: float
    reduction: float

    def seconds(self, op: str, nbytes: int, size: int) -> float:
        """Return how long an operation takes when all ranks begin it at once.

        Args:
            op: name of a method, one of `OPERATIONS`.
            nbytes: bytes of the array that each rank gives to it (for scatter and alltoall, of
                one item of its list; for bcast, of the root's array; for barrier, any).
            size: number of ranks.

        Raises:
            ValueError: there is no such operation.
        """
        work = predict(op, nbytes, size)
        bulk = work.nbytes / self.bandwidth + work.reduced / self.reduction
        return work.rounds * self.latency + bulk

    def price(
        self,
        op: str,
        nbytes: int,
        size: int,
        *,
        rank_second: float,
        message: float = 0.0,
    ) -> float:
        """Return what an operation costs in US dollars.

        Args:
            op: as of `seconds`, as are the next two.
            nbytes: bytes that each rank gives to it.
            size: number of ranks.
            rank_second: dollars for one second of one rank.
            message: dollars for the requests of one message, on the object channel (which cuts
                messages of more than 16 MiB: these cost more than is said here).
        """
        total = predict(op, nbytes, size).total
        return size * self.seconds(op, nbytes, size) * rank_second + total * message


def predict(op: str, nbytes: int, size: int) -> Work:
    """Return what operation `op` does; see `Model.seconds` for the arguments.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in OPERATIONS:
        raise ValueError(f"{op!r} is none of {', '.join(OPERATIONS)}")
    if size == 1:
        return Work(0, 0, 0, 0, 0)
    return OPERATIONS[op](nbytes, size)


def _depth(size: int) -> int:
    """⌈log₂ size⌉, exactly."""
    return (size - 1).bit_length()


def _barrier(_: int, p: int) -> Work:
    return Work(_depth(p), 0, 0, _depth(p), p * _depth(p))


def _bcast(n: int, p: int) -> Work:
    depth = _depth(p)
    segments = math.ceil(n / SEGMENT_BYTES) if n > SEGMENT_BYTES else 0
    rounds = depth * (2 if segments else 1)
    # The root feeds all its children, and its bytes leave one after the other.
    each = 1 + segments
    return Work(rounds, depth * n, 0, depth * each, (p - 1) * each)


def _gather(n: int, p: int) -> Work:
    # Large items go straight to the root.
    return _rooted(n, p, p - 1)


def _scatter(n: int, p: int) -> Work:
    # Those of the root's own children go with the tree.
    return _rooted(n, p, p - 1 - _depth(p))


def _rooted(n: int, p: int, past_the_tree: int) -> Work:
    depth = _depth(p)
    direct = past_the_tree if n >= DIRECT_BYTES else 0
    return Work(depth + (direct > 0), (p - 1) * n, 0, depth + direct, p - 1 + direct)


def _allgather(n: int, p: int) -> Work:
    return Work(_depth(p), (p - 1) * n, 0, _depth(p), p * _depth(p))


def _alltoall(n: int, p: int) -> Work:
    return Work(p - 1, (p - 1) * n, 0, p - 1, p * (p - 1))


def _reduce(n: int, p: int) -> Work:
    # Up the tree, then down it again: all have agreed.
    depth = _depth(p)
    return Work(2 * depth, depth * n, depth * n, depth, 2 * (p - 1))


def _allreduce(n: int, p: int) -> Work:
    if reductions.choose(n, p) != "doubling":
        # Halving and doubling again where p is a power of two, or else a ring: the same bytes.
        steps = 2 * (p - 1 if p & (p - 1) else _depth(p))
        return Work(steps, 2 * (p - 1) * n / p, (p - 1) * n / p, steps, p * steps)
    doublings = p.bit_length() - 1
    extra = p - (1 << doublings)
    # Where p is no power of two, some combine in pairs before, and are told the result after.
    longest = doublings + 2 * (extra > 0)
    busiest = doublings + (extra > 0)
    total = (doublings << doublings) + 2 * extra
    return Work(longest, busiest * n, busiest * n, busiest, total)


def _reduce_scatter(n: int, p: int) -> Work:
    return Work(p - 1, (p - 1) * n / p, (p - 1) * n / p, p - 1, p * (p - 1))


def _scan(n: int, p: int) -> Work:
    depth = _depth(p)
    return Work(depth, depth * n, depth * n, depth, p * depth)


OPERATIONS: dict[str, Callable[[int, int], Work]] = {
    "barrier": _barrier,
    "bcast": _bcast,
    "gather": _gather,
    "scatter": _scatter,
    "allgather": _allgather,
    "reduce": _reduce,
    "allreduce": _allreduce,
    "reduce_scatter": _reduce_scatter,
    "alltoall": _alltoall,
    "scan": _scan,
}
"""The operations that are modelled."""


# ----------------------------------------------------------------------------- measuring
def calibrate(rank: int, size: int) -> Steps[Model]:
    """Measure the links between all ranks, all at work at once: in pairs they may be faster.

    Returns:
        the same model on every rank: the mean of what the ranks saw.
    """
    reduction = _measure_reduction()
    if size == 1:
        return Model(0.0, math.inf, reduction)
    probe = Payload(b"", (allocate(PROBE_BYTES),))

    def shift() -> Steps[None]:
        # Into new memory, as operations receive.
        yield Step((rank + 1) % size, probe, (rank - 1) % size, allocate(PROBE_BYTES))

    def small() -> Steps[None]:
        # What carries data takes longer than a barrier, and most operations do.
        yield from collectives.allgather(Payload(b"", (bytes(8),)), rank, size)

    latency = (yield from _time(small, rank, size)) / _depth(size)
    transfer = yield from _time(shift, rank, size)
    bandwidth = PROBE_BYTES / max(transfer - latency, transfer / 10)
    mine = Payload(msgpack.packb([latency, bandwidth, reduction]), ())
    items = yield from collectives.allgather(mine, rank, size)
    everybody = np.array([msgpack.unpackb(item.meta) for item in items], float)
    if everybody.shape != (size, 3):
        raise ProtocolError("a rank's measurements are malformed")
    return Model(*(float(mean) for mean in everybody.mean(0)))


def _time(make: Callable[[], Steps[None]], rank: int, size: int) -> Steps[float]:
    """Return the seconds of one repetition; all ranks repeat as often as rank 0 says."""
    yield from make()  # it makes the links
    start = time.perf_counter()
    yield from make()
    count = PROBE_SECONDS / max(time.perf_counter() - start, 1e-9)
    count = min(max(int(count), FEWEST), MOST)
    told = Payload(msgpack.packb(count), ()) if rank == 0 else None
    meta, _ = yield from collectives.bcast(told, rank, size, 0)
    count = msgpack.unpackb(meta)
    if not isinstance(count, int) or not 0 < count <= MOST:
        raise ProtocolError("rank 0's number of repetitions is out of bounds")
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        yield from make()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _measure_reduction() -> float:
    """Return how many bytes of float32 are added up in a second, into new memory."""
    left, right = (np.zeros(PROBE_BYTES // 4, np.float32) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.add(left, right)
        seconds.append(time.perf_counter() - start)
    return PROBE_BYTES / max(float(np.median(seconds)), 1e-9)
