"""The algorithms, once for both drivers, without I/O. Those that combine are in `reductions`.

An algorithm is a generator: it yields a `Step` (send something, receive something, or both
at once) and is resumed with what was received. Ranks are those of the communicator. A step
never names the own rank.

Agreement: in barrier, allreduce, reduce_scatter, allgather, alltoall, reduce, scan and
exscan no rank finishes before all have begun, so a rank that calls something else is found
out by all. gather, scatter and bcast return as soon as a rank's own part is done.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgpack

from fmi_client.errors import ProtocolError
from fmi_client.payloads import allocate
from fmi_client.protocol.peer import Buffer, Payload
from fmi_client.protocol.transfers import Fold, Receive

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
    later: int = 0
    """Bytes that come directly."""


def send(dest: int, payload: Payload) -> Step:
    """Return a step that only sends."""
    return Step(dest, payload, None)


def receive(source: int, into: memoryview | None = None) -> Step:
    """Return a step that only receives, in place where there is room."""
    return Step(None, EMPTY, source, into)


def distances(size: int) -> Iterator[int]:
    """1, 2, 4, … below `size`."""
    distance = 1
    while distance < size:
        yield distance
        distance *= 2


def barrier(rank: int, size: int) -> Steps[None]:
    """Dissemination (Hensgen, Finkel, Manber 1988): ⌈log₂ n⌉ rounds for any n."""
    for distance in distances(size):
        yield Step((rank + distance) % size, EMPTY, (rank - distance) % size)


# ---------------------------------------------------------------- one to all, all to one


def parent_of(virtual: int) -> int:
    """Binomial tree rooted at 0: clear the lowest bit."""
    return virtual & (virtual - 1)


def children_of(virtual: int, size: int) -> list[int]:
    """Nearest first; child c covers the ranks c … c + (c - virtual) - 1."""
    return [
        virtual + distance
        for distance in distances(size)
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
    children = [(child + root) % size for child in reversed(children_of(virtual, size))]
    if payload is None:
        parent = (parent_of(virtual) + root) % size
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
    lengths = [-1 - item.later if item.data is None else len(item.data) for item in items]
    heads = [[i.rank, i.meta, n] for i, n in zip(items, lengths, strict=True)]
    return Payload(msgpack.packb(heads), [item.data for item in items if item.data is not None])


def _unbundle(message: Receive) -> list[Item]:
    items, at = [], 0
    for rank, meta, length in msgpack.unpackb(message.meta):
        data = None if length < 0 else message.data[at : at + length]
        at += max(length, 0)
        items.append(Item(rank, meta, data, max(-1 - length, 0)))
    if at != len(message.data):
        raise ProtocolError("a bundle does not hold what it announces")
    return items


def _join(payload: Payload) -> Buffer:
    return payload.parts[0] if len(payload.parts) == 1 else b"".join(payload.parts)


def gather(
    payload: Payload,
    rank: int,
    size: int,
    root: int,
    places: Sequence[memoryview | None] | None = None,
) -> Steps[list[Item] | None]:
    """Collect everybody's payload at the root, small ones in bundles up a binomial tree.

    Args:
        places: where the root wants each rank's bytes, in case they come alone.
    """
    virtual = (rank - root) % size
    data = _join(payload)
    parent = (parent_of(virtual) + root) % size
    direct = rank != root and len(data) >= DIRECT_BYTES
    items = [Item(rank, payload.meta, None if direct else data, len(data))]
    for child in children_of(virtual, size):
        message = yield receive((child + root) % size)
        items += _unbundle(message)
    if rank != root:
        yield send(parent, _bundle(items))
        if direct:
            yield send(root, Payload(b"", (data,)))
        return None
    for i, item in enumerate(items):
        if item.data is None:
            into = places[item.rank] if places is not None else None
            fits = into is not None and len(into) == item.later
            message = yield receive(item.rank, into if fits else None)
            items[i] = item._replace(data=message.data)
    return sorted(items, key=lambda item: item.rank)


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
        message = yield receive((parent_of(virtual) + root) % size)
        items = _unbundle(message)
    for child in reversed(children_of(virtual, size)):
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
    if not at_root or not large or item.rank == child or item.data is None:
        return item
    return item._replace(data=None, later=len(item.data))


# ------------------------------------------------------------------------- all to all


def allgather(payload: Payload, rank: int, size: int) -> Steps[list[Item]]:
    """Bruck et al. 1997: ⌈log₂ n⌉ rounds for any n; each item reaches each rank once."""
    items = [Item(rank, payload.meta, _join(payload))]
    for distance in distances(size):
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
