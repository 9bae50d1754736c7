"""The algorithms, once for both drivers, without I/O.

An algorithm is a generator: it yields a `Step` (send something, receive something, or both
at once) and is resumed with what was received. Ranks are those of the communicator. A step
never names the own rank.

Order of evaluation: values are combined in rank order, lower ranks on the left, with any
bracketing that associativity allows. Only for commutative operations on large arrays does
the ring start each block at another rank. Every result is computed once and copied, or
computed from the same operands in the same order everywhere: all ranks hold the same bits.

Agreement: in barrier, allreduce, reduce_scatter, allgather, alltoall, reduce, scan and
exscan no rank finishes before all have begun, so a rank that calls something else is found
out by all. gather, scatter and bcast return as soon as a rank's own part is done.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np

from fmi_client.errors import ProtocolError
from fmi_client.payloads import Array, allocate, flat_bytes
from fmi_client.protocol.inbox import Fold, Receive
from fmi_client.protocol.peer import Buffer, Payload
from fmi_client.values import ArrayValue, Value

RING_BYTES = 64 * 1024
"""Arrays from this size on are reduced in a ring: each rank moves 2 (n-1)/n of the bytes."""

FOLD_BYTES = 256 * 1024
"""Of a large array, so much is received and combined at a time."""

DIRECT_BYTES = 64 * 1024
"""Items from this size on go straight between root and owner, past the tree."""

SEGMENT_BYTES = 4 * 1024 * 1024
"""A large broadcast moves down the tree in pieces of this size, one level behind the other."""

EMPTY = Payload(b"", ())


class Step(NamedTuple):
    """Send `payload` to `dest` and receive from `source`, at the same time; None: don't.

    `fold` takes in what comes piece by piece; then `into` is not given.
    """

    dest: int | None
    payload: Payload
    source: int | None
    into: memoryview | None = None
    fold: Fold | None = None


T = TypeVar("T")
Steps = Generator[Step, Any, T]
"""Yields steps, is sent the `Receive` of each (or None), returns T."""


class Item(NamedTuple):
    """One rank's contribution on its way through a tree; `data` None: it comes directly."""

    rank: int
    meta: bytes
    data: Buffer | None


def send(dest: int, payload: Payload) -> Step:
    return Step(dest, payload, None)


def receive(source: int, into: memoryview | None = None) -> Step:
    return Step(None, EMPTY, source, into)


def _distances(size: int) -> Iterator[int]:
    """1, 2, 4, … below `size`."""
    distance = 1
    while distance < size:
        yield distance
        distance *= 2


def barrier(rank: int, size: int) -> Steps[None]:
    """Dissemination (Hensgen, Finkel, Manber 1988): ⌈log₂ n⌉ rounds for any n."""
    for distance in _distances(size):
        yield Step((rank + distance) % size, EMPTY, (rank - distance) % size)


# ---------------------------------------------------------------- one to all, all to one


def _parent(virtual: int) -> int:
    """Binomial tree rooted at 0: clear the lowest bit."""
    return virtual & (virtual - 1)


def _children(virtual: int, size: int) -> list[int]:
    """Nearest first; child c covers the ranks c … c + (c - virtual) - 1."""
    return [
        virtual + distance
        for distance in _distances(size)
        if not virtual & (2 * distance - 1) and virtual + distance < size
    ]


def bcast(
    payload: Payload | None, rank: int, size: int, root: int, into: memoryview | None = None
) -> Steps[tuple[bytes, Buffer]]:
    """Send the root's payload down a binomial tree; large ones in segments.

    Returns:
        meta and data, on every rank; the root's own parts where there is just one.
    """
    virtual = (rank - root) % size
    children = [(child + root) % size for child in reversed(_children(virtual, size))]
    if payload is None:
        parent = (_parent(virtual) + root) % size
        first = yield receive(parent)
        meta, total = msgpack.unpackb(first.meta)
        data: Buffer = first.data
        segments = total > SEGMENT_BYTES
        if segments:
            data = into if into is not None and len(into) == total else allocate(total)
    else:
        parent = -1
        meta, total = payload.meta, payload.nbytes
        data = _join(payload)
        segments = total > SEGMENT_BYTES
    top = msgpack.packb([meta, total])
    for child in children:
        yield send(child, Payload(top, () if segments else (data,)))
    if segments:
        yield from _pipeline(memoryview(data), parent, children)
    return meta, data


def _pipeline(data: memoryview, parent: int, children: list[int]) -> Steps[None]:
    """Receive segments from the parent (-1: we are the root) and pass them on."""
    pieces = [data[at : at + SEGMENT_BYTES] for at in range(0, len(data), SEGMENT_BYTES)]
    if parent >= 0:
        yield receive(parent, pieces[0])
    for i, piece in enumerate(pieces):
        # The next segment arrives while this one leaves.
        ahead = pieces[i + 1] if parent >= 0 and i + 1 < len(pieces) else None
        for child in children:
            part = Payload(b"", (piece,))
            yield Step(child, part, parent, ahead) if ahead is not None else send(child, part)
            ahead = None
        if ahead is not None:
            yield receive(parent, ahead)


def _bundle(items: Sequence[Item]) -> Payload:
    lengths = [-1 if item.data is None else len(item.data) for item in items]
    heads = [[i.rank, i.meta, n] for i, n in zip(items, lengths, strict=True)]
    return Payload(msgpack.packb(heads), [item.data for item in items if item.data is not None])


def _unbundle(message: Receive) -> list[Item]:
    items, at = [], 0
    for rank, meta, length in msgpack.unpackb(message.meta):
        data = None if length < 0 else message.data[at : at + length]
        at += max(length, 0)
        items.append(Item(rank, meta, data))
    if at != len(message.data):
        raise ProtocolError("a bundle does not hold what it announces")
    return items


def _join(payload: Payload) -> Buffer:
    return payload.parts[0] if len(payload.parts) == 1 else b"".join(payload.parts)


def gather(payload: Payload, rank: int, size: int, root: int) -> Steps[list[Item] | None]:
    """Collect everybody's payload at the root, small ones in bundles up a binomial tree."""
    virtual = (rank - root) % size
    data = _join(payload)
    parent = (_parent(virtual) + root) % size
    direct = rank != root and parent != root and len(data) >= DIRECT_BYTES
    items = [Item(rank, payload.meta, None if direct else data)]
    for child in _children(virtual, size):
        message = yield receive((child + root) % size)
        items += _unbundle(message)
    if rank != root:
        yield send(parent, _bundle(items))
        if direct:
            yield send(root, Payload(b"", (data,)))
        return None
    for i, item in enumerate(items):
        if item.data is None:
            message = yield receive(item.rank)
            items[i] = item._replace(data=message.data)
    return sorted(items)


def scatter(payloads: Sequence[Payload] | None, rank: int, size: int, root: int) -> Steps[Item]:
    """Give each rank its payload from the root, small ones in bundles down the tree."""
    virtual = (rank - root) % size
    if payloads is not None:
        items = [
            Item((root + v) % size, p.meta, _join(p))
            for v in range(size)
            for p in [payloads[(root + v) % size]]
        ]
    else:
        message = yield receive((_parent(virtual) + root) % size)
        items = _unbundle(message)
    for child in reversed(_children(virtual, size)):
        covered = items[child - virtual :]
        items = items[: child - virtual]
        held = [_held_back(item, (child + root) % size, rank == root) for item in covered]
        yield send((child + root) % size, _bundle(held))
        if payloads is None:
            continue
        for item, announced in zip(covered, held, strict=True):
            if announced.data is None and item.data is not None:
                yield send(item.rank, Payload(b"", (item.data,)))
    own = items[0]
    if own.data is None:
        message = yield receive(root)
        own = own._replace(data=message.data)
    return own


def _held_back(item: Item, child: int, at_root: bool) -> Item:
    """Announce a large item instead of sending it, unless the child is its owner."""
    large = item.data is not None and len(item.data) >= DIRECT_BYTES
    return item._replace(data=None) if at_root and large and item.rank != child else item


# ------------------------------------------------------------------------- all to all


def allgather(payload: Payload, rank: int, size: int) -> Steps[list[Item]]:
    """Bruck et al. 1997: ⌈log₂ n⌉ rounds for any n; each item reaches each rank once."""
    items = [Item(rank, payload.meta, _join(payload))]
    for distance in _distances(size):
        bundle = _bundle(items[: size - distance])
        message = yield Step((rank - distance) % size, bundle, (rank + distance) % size)
        items += _unbundle(message)
    return sorted(items[:size], key=lambda item: item.rank)


def alltoall(payloads: Sequence[Payload], rank: int, size: int) -> Steps[list[Item]]:
    """Pairwise exchange: n - 1 rounds, in each of which everybody sends and receives once."""
    own = payloads[rank]
    items = [Item(rank, own.meta, _join(own))]
    for distance in range(1, size):
        dest, source = (rank + distance) % size, (rank - distance) % size
        message = yield Step(dest, payloads[dest], source)
        items.append(Item(source, message.meta, message.data))
    return sorted(items, key=lambda item: item.rank)


# ------------------------------------------------------------------------- reductions


def reduce(value: Value, rank: int, size: int, root: int, commutative: bool) -> Steps[bool]:
    """Combine up a binomial tree; then the root tells everybody that all agreed.

    Returns:
        whether this rank holds the result.
    """
    top = root if commutative else 0  # rotating the ranks would change their order
    virtual = (rank - top) % size
    for child in _children(virtual, size):
        message = yield receive((child + top) % size, value.scratch())
        value.absorb(message, lower=False)
    if virtual:
        yield send((_parent(virtual) + top) % size, value.payload())
    if top != root and rank == top:
        yield send(root, value.payload())
    if top != root and rank == root:
        message = yield receive(top, value.scratch())
        value.replace(message)
    yield from bcast(EMPTY if rank == root else None, rank, size, root)
    return rank == root


def allreduce(value: Value, rank: int, size: int, commutative: bool) -> Steps[None]:
    """Recursive doubling for small values; halving or a ring for large arrays."""
    if size == 1:
        return
    large = isinstance(value, ArrayValue) and value.source.nbytes >= RING_BYTES
    if large and commutative and isinstance(value, ArrayValue):
        algorithm = _ring_allreduce if size & (size - 1) else _halving_allreduce
        yield from algorithm(value, rank, size)
    else:
        yield from _doubling_allreduce(value, rank, size)


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
    for distance in _distances(power):
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
    for distance in _distances(size):
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
    for distance in _distances(size):
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
