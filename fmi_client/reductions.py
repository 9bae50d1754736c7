"""The algorithms that combine values, again as generators of steps; see `collectives`.

Order of evaluation: values are combined in rank order, lower ranks on the left, with any
bracketing that associativity allows. Only for commutative operations on large arrays do
halving and the ring combine each block in an order of its own. Every result is computed once
and copied, or computed from the same operands in the same order everywhere: all ranks hold
the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast, get_args

import numpy as np

from fmi_client.collectives import (
    EMPTY,
    Step,
    Steps,
    bcast,
    children_of,
    distances,
    parent_of,
    receive,
    send,
)
from fmi_client.payloads import Array, flat_bytes
from fmi_client.protocol.peer import Payload
from fmi_client.values import ArrayValue, Value

LARGE_BYTES, LARGE_BYTES_OF_TWO = 128 * 1024, 512 * 1024
"""Arrays from this size on are reduced in parts: each rank moves 2 (n-1)/n of the bytes, not
log₂ n times all of them. Crossings on loopback: 0.5 MiB; where bandwidth is scarcer, earlier,
but never for two ranks, which move the same bytes either way (docs/performance.md)."""

FOLD_BYTES = 256 * 1024
"""Of a large array, so much is received and combined at a time."""


def reduce(value: Value, rank: int, size: int, root: int, commutative: bool) -> Steps[bool]:
    """Combine up a binomial tree; then the root tells everybody that all agreed.

    Returns:
        whether this rank holds the result.
    """
    top = root if commutative else 0  # rotating the ranks would change their order
    virtual = (rank - top) % size
    for child in children_of(virtual, size):
        message = yield receive((child + top) % size, value.scratch())
        value.absorb(message, lower=False)
    if virtual:
        yield send((parent_of(virtual) + top) % size, value.payload())
    if top != root and rank == top:
        yield send(root, value.payload())
    if top != root and rank == root:
        message = yield receive(top, value.scratch())
        value.replace(message)
    yield from bcast(EMPTY if rank == root else None, rank, size, root)
    return rank == root


Algorithm = Literal["doubling", "halving", "ring"]
"""How an allreduce goes about it; `choose` says which when."""


def choose(nbytes: int, size: int) -> Algorithm:
    """Return the algorithm for an array of `nbytes` where the operation is commutative."""
    if nbytes < (LARGE_BYTES_OF_TWO if size == 2 else LARGE_BYTES):
        return "doubling"
    return "ring" if size & (size - 1) else "halving"


@cache
def preferred() -> Algorithm | None:
    """Return the algorithm that the environment names, as it was at the first allreduce.

    Raises:
        ValueError: it names none.
    """
    name = os.environ.get("FMI_ALLREDUCE")
    return _named("FMI_ALLREDUCE", name) if name else None


def _named(what: str, name: str) -> Algorithm:
    if name not in get_args(Algorithm):
        raise ValueError(f"{what}={name!r} is none of {', '.join(get_args(Algorithm))}")
    return cast(Algorithm, name)


def allreduce(
    value: Value, rank: int, size: int, commutative: bool, algorithm: Algorithm | None = None
) -> Steps[None]:
    """Recursive doubling for small values; halving or a ring for large arrays.

    Raises:
        ValueError: at once, not when the steps begin: the algorithm is none, or cannot do this.
    """
    if algorithm is not None:
        _named("algorithm", algorithm)
    if size == 1:
        return _doubling_allreduce(value, rank, size)  # which then has nothing to do
    if not isinstance(value, ArrayValue) or not commutative:
        if algorithm not in (None, "doubling"):
            raise ValueError(f"{algorithm} is for arrays and commutative operations only")
        return _doubling_allreduce(value, rank, size)
    algorithm = algorithm or choose(value.source.nbytes, size)
    if algorithm == "halving" and size & (size - 1):
        raise ValueError(f"halving needs 2, 4, 8, … ranks, not {size}")
    return _ALLREDUCE[algorithm](value, rank, size)


def _doubling_allreduce(value: Value, rank: int, size: int) -> Steps[None]:
    """Partners 1, 2, 4, … apart exchange what they have; blocks stay contiguous in rank.

    Where n is no power of two, the first 2·(n - 2^k) ranks first combine in pairs.
    """
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    if rank < 2 * extra and rank % 2 == 0:
        yield send(rank + 1, value.payload())
        message = yield receive(rank + 1, value.scratch())
        value.replace(message)
        return
    if rank < 2 * extra:
        message = yield receive(rank - 1, value.scratch())
        value.absorb(message, lower=True)
    place = rank // 2 if rank < 2 * extra else rank - extra
    for distance in distances(power):
        other = place ^ distance
        partner = 2 * other + 1 if other < extra else other + extra
        message = yield Step(partner, value.payload(), partner, value.scratch())
        value.absorb(message, lower=other < place)
    if rank < 2 * extra:
        yield send(rank - 1, value.payload())


def _blocks(length: int, size: int) -> list[slice]:
    """Split as numpy.array_split does: the first ones are one longer."""
    each, longer = divmod(length, size)
    ends = [each * (i + 1) + min(i + 1, longer) for i in range(size)]
    return [slice(end - each - (i < longer), end) for i, end in enumerate(ends)]


class _Combine:
    """Combines a peer's part of an array with ours as it comes, while it is in the cache.

    Args:
        mine, result: our part, and where the combination goes; may be the same memory.
        lower: whether what comes is the left operand.
        room: memory for at least one row; what comes passes through it.
    """

    def __init__(
        self, value: ArrayValue, mine: Array, result: Array, lower: bool, room: Array
    ) -> None:
        self.nbytes = mine.nbytes
        self._rows = room
        self.room = flat_bytes(room)
        self._row = room[:1].nbytes
        self._value, self._mine, self._result, self._lower = value, mine, result, lower
        self._done = 0

    def take(self, filled: int) -> int:
        count, left = divmod(filled, self._row)
        part = slice(self._done, self._done + count)
        pair = (self._rows[:count], self._mine[part])
        self._value.combine(*(pair if self._lower else pair[::-1]), self._result[part])
        self._done += count
        if left and count:
            self.room[:left] = bytes(self.room[filled - left : filled])
        return left


def _room(source: Array) -> Array:
    """Return memory for some rows of `source`."""
    row = source[:1].nbytes or 1
    return np.empty_like(source[: max(1, FOLD_BYTES // row)])


def _exchange(peer: int, out: Array, fold: _Combine, source: int | None = None) -> Step:
    source = peer if source is None else source
    return Step(peer, Payload(b"", (flat_bytes(out),)), source, None, fold if fold.nbytes else None)


def _halving_allreduce(value: ArrayValue, rank: int, size: int) -> Steps[None]:
    """Recursive halving, then doubling (Rabenseifner 2004): 2 log₂ n steps, n a power of two.

    Partners exchange halves of what they still share, and combine the half that they keep, until
    block `rank` is complete here; then the blocks come back the same way.
    """
    source, total = value.source.reshape(-1), value.owned.reshape(-1)
    blocks = _blocks(source.size, size)
    room = _room(source)

    def span(first: int, count: int) -> slice:
        return slice(blocks[first].start, blocks[first + count - 1].stop)

    distance, leaving = size // 2, source
    while distance:
        partner = rank ^ distance
        first = rank & ~(2 * distance - 1)
        mine, theirs = (first, first + distance) if partner > rank else (first + distance, first)
        keep = span(mine, distance)
        fold = _Combine(value, leaving[keep], total[keep], partner < rank, room)
        yield _exchange(partner, leaving[span(theirs, distance)], fold)
        leaving, distance = total, distance // 2
    for distance in distances(size):
        partner = rank ^ distance
        mine, theirs = rank & ~(distance - 1), partner & ~(distance - 1)
        out, into = total[span(mine, distance)], total[span(theirs, distance)]
        yield Step(partner, Payload(b"", (flat_bytes(out),)), partner, flat_bytes(into))
    value.current = value.owned


def _ring_allreduce(value: ArrayValue, rank: int, size: int) -> Steps[None]:
    source, total = value.source.reshape(-1), value.owned.reshape(-1)
    blocks = _blocks(source.size, size)
    yield from _ring_reduce(value, source, total, blocks, rank)
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        out, into = blocks[(rank + 1 - step) % size], blocks[(rank - step) % size]
        yield Step(right, Payload(b"", (flat_bytes(total[out]),)), left, flat_bytes(total[into]))
    value.current = value.owned


def _ring_reduce(
    value: ArrayValue, source: Array, total: Array, blocks: list[slice], rank: int
) -> Steps[None]:
    """Let each block travel once around the ring; block rank + 1 ends complete at `rank`."""
    size = len(blocks)
    right, left = (rank + 1) % size, (rank - 1) % size
    room = _room(source)
    leaving = source
    for step in range(size - 1):
        going, coming = blocks[(rank - step) % size], blocks[(rank - step - 1) % size]
        fold = _Combine(value, source[coming], total[coming], True, room)
        yield _exchange(right, leaving[going], fold, left)
        leaving = total


_ALLREDUCE: dict[Algorithm, Callable[[ArrayValue, int, int], Steps[None]]] = {
    "doubling": _doubling_allreduce,
    "halving": _halving_allreduce,
    "ring": _ring_allreduce,
}


def reduce_scatter(value: ArrayValue, rank: int, size: int, commutative: bool) -> Steps[Array]:
    """Reduce, and leave each rank its part of axis 0, split as numpy.array_split does."""
    rows = _blocks(value.source.shape[0], size)
    if not commutative or size == 1:
        yield from allreduce(value, rank, size, commutative)
        return value.current[rows[rank]]
    # The ring completes block rank + 1 at a rank, so everybody plays its left neighbour.
    length, *rest = value.source.shape
    source = value.source.reshape(length, math.prod(rest))
    total = np.empty_like(source)
    turned = [rows[(i - 1) % size] for i in range(size)]
    yield from _ring_reduce(value, source, total, turned, rank)
    part = total[rows[rank]]
    return part.reshape(part.shape[0], *rest)


def scan(
    value: Value, rank: int, size: int, inclusive: bool, out: Any = None
) -> Steps[Value | None]:
    """Prefix reduction (Hillis, Steele 1986), ⌈log₂ n⌉ rounds.

    Who has nothing to send in a round sends an empty message all the same, so that no rank
    finishes before all have begun.

    Returns:
        the accumulator of the ranks up to this one (`inclusive`) or before it; None at
        rank 0 of an exclusive scan.
    """
    before: Value | None = None
    for distance in distances(size):
        dest, source = (rank + distance) % size, (rank - distance) % size
        payload = value.payload() if dest > rank else EMPTY
        useful = source < rank
        message = yield Step(dest, payload, source, value.scratch() if useful else None)
        if not useful:
            continue
        # First into `value`: from here on it has its own memory, so that `out` may be the input.
        value.absorb(message, lower=True)
        if before is not None:
            before.absorb(message, lower=True)
        elif not inclusive:
            before = value.fork(message, out)
    return value if inclusive else before
