"""The methods of a communicator, once for the async and the blocking one.

Each method checks its arguments, chooses the algorithm and hands it to the driver
(`_run`). In the async communicator the result is awaited; in the sync one it is returned.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from fmi_client import collectives
from fmi_client.collectives import Item, Steps
from fmi_client.endpoint import MAX_SECONDS, Endpoint, some_ranks
from fmi_client.errors import Aborted, CollectiveTimeout, FmiError
from fmi_client.ops import SUM, Op, as_op
from fmi_client.payloads import Array, is_array, is_tensor, pack, unpack
from fmi_client.protocol.peer import (
    COLLECTIVE,
    POINT_TO_POINT,
    Key,
    Payload,
    Receive,
    SignatureMismatch,
)
from fmi_client.protocol.rendezvous import JobAborted
from fmi_client.transport.link import Send
from fmi_client.values import ArrayValue, as_like, as_numpy, check_out, make_value

OpLike = Op | Callable[[Any, Any], Any]

MAX_TAG = 2**63 - 1

STUCK_SECONDS = 0.05
"""A send that takes longer may wait for a peer that itself waits to send; see `make_room`."""

LAST_SECONDS = 1.0
"""After the deadline of a collective, how long the search for the missing ranks may take."""


class UnderWay(NamedTuple):
    """A step that was started, and its two halves."""

    step: collectives.Step
    sent: Send | None
    received: Receive | None

    def halves(self) -> list[Send | Receive]:
        return [half for half in (self.sent, self.received) if half is not None]

    @property
    def done(self) -> bool:
        sent, received = self.sent, self.received
        return (sent is None or sent.done) and (received is None or received.done)

    @property
    def only_sending(self) -> bool:
        return self.received is None or self.received.done


@dataclass(slots=True)
class Call:
    """One operation under way: what the driver needs to run it and to speak of it."""

    op: str
    key: Key
    signature: bytes
    steps: Steps[Any]
    timeout: float
    under_way: UnderWay | None = None

    @property
    def collective(self) -> bool:
        return self.key[0] == COLLECTIVE

    @property
    def stuck(self) -> bool:
        """Whether only a send is left, whose peer may be stuck in one itself.

        In a collective the steps match, and what is under way is bound to be received.
        """
        under_way = self.under_way
        return not self.collective and under_way is not None and under_way.only_sending


class Operations:
    """Point-to-point and collective operations between the ranks of a communicator.

    Every method takes ``timeout=`` in seconds (default: the communicator's). After any
    `FmiError` in a collective the job is over on all ranks: every later call raises the
    same error. Arrays may be numpy arrays or torch tensors of any dtype that needs no
    pickle, in any memory layout; input is never modified. Everything else must be made of
    None, bool, int, float, complex, str, bytes, lists, tuples, dicts and arrays.

    Results of reductions are the same bits on every rank.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        group: Sequence[int],
        context: int,
        timeout: float,
        *,
        whole_job: bool = True,
    ) -> None:
        self._whole_job = whole_job  # closing a part of it must not leave the job
        self._endpoint = endpoint
        self._group = group
        self._context = context
        self._seq = 0
        self.timeout = timeout
        self.rank = group.index(endpoint.rank)
        """This process's number in the communicator, from 0."""
        self.size = len(group)
        """How many ranks the communicator has."""

    # ------------------------------------------------------------ point to point
    def send(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> Any:
        """Send `obj` to rank `dest`; returns when the system has taken it all."""
        self._check_rank(dest, "dest")
        step = collectives.send(dest, pack(obj))
        return self._point("send", tag, _one(step, lambda _: None), timeout)

    def recv(
        self, source: int, tag: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Receive what rank `source` sent under `tag`, in the order of sending.

        Args:
            out: array of the dtype and shape that is coming; it is filled and returned.
        """
        self._check_rank(source, "source")
        step = collectives.receive(source, _memory(out))
        return self._point("recv", tag, _one(step, lambda got: _received(got, out)), timeout)

    def sendrecv(
        self,
        obj: Any,
        dest: int,
        source: int | None = None,
        tag: int = 0,
        *,
        out: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Send to `dest` and receive from `source` (default: `dest`) at the same time."""
        source = dest if source is None else source
        self._check_rank(dest, "dest")
        self._check_rank(source, "source")
        step = collectives.Step(dest, pack(obj), source, _memory(out))
        return self._point("sendrecv", tag, _one(step, lambda got: _received(got, out)), timeout)

    # --------------------------------------------------------------- collectives
    def barrier(self, *, timeout: float | None = None) -> Any:
        """Return when all ranks have called it."""
        steps = collectives.barrier(self.rank, self.size)
        return self._collective("barrier()", steps, timeout)

    def bcast(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the root's `obj` on every rank; the others' `obj` is ignored."""
        self._check_rank(root, "root")
        payload = pack(obj) if self.rank == root else None
        steps = self._bcast(obj, payload, root, out, _memory(out))
        return self._collective(f"bcast(root={root})", steps, timeout)

    def _bcast(
        self, obj: Any, payload: Payload | None, root: int, out: Any, into: memoryview | None
    ) -> Steps[Any]:
        if payload is not None:
            yield from collectives.bcast(payload, self.rank, self.size, root)
            return obj if out is None else _fill(out, obj)
        meta, data = yield from collectives.bcast(None, self.rank, self.size, root, into)
        got = unpack(meta, data)
        return got if out is None else _fill(out, got)

    def gather(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the list of everybody's `obj` in rank order at the root, None elsewhere."""
        self._check_rank(root, "root")
        return self._collective(f"gather(root={root})", self._gather(pack(obj), root, out), timeout)

    def _gather(self, payload: Payload, root: int, out: Any) -> Steps[Any]:
        items = yield from collectives.gather(payload, self.rank, self.size, root)
        return None if items is None else _collected(items, out, self.rank)

    def allgather(self, obj: Any, *, out: Any = None, timeout: float | None = None) -> Any:
        """Return the list of everybody's `obj` in rank order, on every rank."""
        return self._collective("allgather()", self._allgather(pack(obj), out), timeout)

    def _allgather(self, payload: Payload, out: Any) -> Steps[Any]:
        items = yield from collectives.allgather(payload, self.rank, self.size)
        return _collected(items, out, self.rank)

    def scatter(
        self,
        objs: Sequence[Any] | None,
        root: int = 0,
        *,
        out: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Return item `rank` of the root's list of `size` items; the others' is ignored."""
        self._check_rank(root, "root")
        payloads = own = None
        if self.rank == root:
            items = self._check_items(objs, "scatter")
            payloads, own = [pack(obj) for obj in items], items[root]
        steps = self._scatter(payloads, own, root, out)
        return self._collective(f"scatter(root={root})", steps, timeout)

    def _scatter(self, payloads: list[Payload] | None, own: Any, root: int, out: Any) -> Steps[Any]:
        item = yield from collectives.scatter(payloads, self.rank, self.size, root)
        got = _item(item) if payloads is None else own
        return got if out is None else _fill(out, got)

    def alltoall(
        self, objs: Sequence[Any], *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Send ``objs[i]`` to rank i; return the list of what each rank sent to us."""
        payloads = [pack(obj) for obj in self._check_items(objs, "alltoall")]
        return self._collective("alltoall()", self._alltoall(payloads, out), timeout)

    def _alltoall(self, payloads: list[Payload], out: Any) -> Steps[Any]:
        items = yield from collectives.alltoall(payloads, self.rank, self.size)
        return _collected(items, out, self.rank)

    # ---------------------------------------------------------------- reductions
    def reduce(
        self,
        obj: Any,
        op: OpLike = SUM,
        root: int = 0,
        *,
        out: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the combination of everybody's `obj` at the root, None elsewhere.

        dtype and shape must agree; `CollectiveMismatch` on all ranks otherwise.
        """
        self._check_rank(root, "root")
        op = as_op(op)
        # Elsewhere than at the root, `out` must not see the partial results.
        value = make_value(obj, op, out if self.rank == root else None)
        steps = collectives.reduce(value, self.rank, self.size, root, op.commutative)
        signature = f"reduce({op.name}, root={root}, {value.description})"
        return self._collective(
            signature, _then(steps, lambda here: value.result() if here else None), timeout
        )

    def allreduce(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the combination of everybody's `obj`, the same bits on every rank.

        Args:
            obj: array, tensor, number, or anything that `op` combines and msgpack carries.
            out: array for the result, of the input's dtype and shape; may be the input.

        dtype and shape must agree; `CollectiveMismatch` on all ranks otherwise.
        """
        op = as_op(op)
        value = make_value(obj, op, out)
        steps = collectives.allreduce(value, self.rank, self.size, op.commutative)
        signature = f"allreduce({op.name}, {value.description})"
        return self._collective(signature, _then(steps, lambda _: value.result()), timeout)

    def reduce_scatter(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Combine everybody's array; return part `rank` of ``numpy.array_split(…, size)``."""
        op = as_op(op)
        if not is_array(obj) or obj.ndim == 0:
            raise TypeError("reduce_scatter needs an array or tensor with at least one axis")
        value = ArrayValue(obj, op)
        if out is not None:
            length, *rest = value.source.shape
            mine = length // self.size + (self.rank < length % self.size)
            check_out(out, obj, (mine, *rest))
        steps = collectives.reduce_scatter(value, self.rank, self.size, op.commutative)
        signature = f"reduce_scatter({op.name}, {value.description})"

        def finish(part: Array) -> Any:
            # A view into a larger array would keep all of it alive, or be the caller's input.
            return as_like(part if out is not None else part.copy(), obj, out)

        return self._collective(signature, _then(steps, finish), timeout)

    def scan(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the combination of the values of ranks 0 … `rank`."""
        return self._scan("scan", obj, op, out, timeout)

    def exscan(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the combination of the values of ranks 0 … `rank` - 1; None on rank 0."""
        return self._scan("exscan", obj, op, out, timeout)

    def _scan(self, name: str, obj: Any, op: OpLike, out: Any, timeout: float | None) -> Any:
        op = as_op(op)
        inclusive = name == "scan"
        value = make_value(obj, op, out)
        if not inclusive and out is not None:
            value = make_value(obj, op)
        steps = collectives.scan(value, self.rank, self.size, inclusive, out)
        signature = f"{name}({op.name}, {value.description})"
        return self._collective(
            signature, _then(steps, lambda got: None if got is None else got.result()), timeout
        )

    # -------------------------------------------------------------------- groups
    def split(self, color: int | None, key: int = 0, *, timeout: float | None = None) -> Any:
        """Return a communicator of the ranks with the same `color`, ordered by `key`, rank.

        A rank with color None takes part in the call, but gets None. The links are shared.
        """
        group = None if color is None else operator.index(color)
        steps = self._split(group, operator.index(key), self._seq)
        return self._collective("split()", steps, timeout)

    def _split(self, color: int | None, key: int, seq: int) -> Steps[Self | None]:
        everybody = yield from self._allgather(pack([color, key]), None)
        if color is None:
            return None
        members = sorted((k, r) for r, (c, k) in enumerate(everybody) if c == color)
        label = f"{self._context} {seq} {color}".encode()
        context = int.from_bytes(hashlib.blake2b(label, digest_size=8).digest(), "big")
        return self._child([self._group[r] for _, r in members], context)

    def abort(self, reason: str = "") -> Any:
        """End the job on all ranks: whatever they wait for raises `Aborted(by, reason)`.

        Takes effect at once (awaiting it is allowed, not needed) and does not raise here; the
        next operation on this rank does.
        """
        self._abort(reason)

    def _abort(self, reason: str) -> None:
        by = self._endpoint.rank
        self._endpoint.tell(JobAborted(by, "abort", reason))
        self._endpoint.fail(Aborted(by=by, reason=reason, rank=by))

    def stats(self) -> dict[str, Any]:
        """Return what happened so far.

        Keys: ``join_seconds`` (from connect to all ranks present), ``operations``
        (collectives begun on this communicator), and ``links``: for each peer that was
        needed its ``kind`` ("direct", "relay"; "pending" before it is made), ``bytes_sent``
        and ``bytes_received`` (payload), and ``messages_received``.
        """
        links = {
            peer: {
                "kind": link.kind,
                "bytes_sent": link.bytes_sent,
                "bytes_received": link.inbox.payload_bytes,
                "messages_received": link.inbox.messages,
            }
            for peer, link in sorted(self._endpoint.links.items())
            if peer != self._endpoint.rank
        }
        joined = getattr(self._endpoint, "join_seconds", 0.0)
        return {"join_seconds": joined, "operations": self._seq, "links": links}

    # ---------------------------------------------------------------- for drivers
    def _run(self, call: Call) -> Any:
        raise NotImplementedError

    def _child(self, group: list[int], context: int) -> Self:
        raise NotImplementedError

    def _collective(self, signature: str, steps: Steps[Any], timeout: float | None) -> Any:
        seq = self._seq
        self._seq += 1
        name = signature.split("(")[0]
        key = (COLLECTIVE, self._context, seq)
        return self._run(Call(name, key, signature.encode(), steps, self._seconds(timeout)))

    def _point(self, op: str, tag: int, steps: Steps[Any], timeout: float | None) -> Any:
        if not 0 <= operator.index(tag) <= MAX_TAG:
            raise ValueError(f"tag must be from 0 to 2**63 - 1, not {tag}")
        key = (POINT_TO_POINT, self._context, int(tag))
        return self._run(Call(op, key, b"", steps, self._seconds(timeout)))

    def _seconds(self, timeout: float | None) -> float:
        seconds = self.timeout if timeout is None else timeout
        if not seconds >= 0:
            raise ValueError(f"timeout={timeout} is not a number of seconds")
        return min(seconds, MAX_SECONDS)

    def _begin(self, call: Call) -> None:
        if self._endpoint.failure is None and call.collective:
            self._endpoint.begin(self._context, call.key[2], call.signature)
        self._raise_failure(call)

    def _raise_failure(self, call: Call) -> None:
        failure = self._endpoint.failure
        if failure is not None:
            raise failure.fresh().at(rank=self._endpoint.rank, op=call.op, seq=_seq(call))

    def _post(self, step: collectives.Step, call: Call) -> UnderWay:
        """Start a step: the receive first, so that what comes finds its place."""
        self._raise_failure(call)  # it may have come while the last step was ending
        received = sent = None
        dest, payload, source, into = step
        if source is not None:
            received = Receive(call.key, call.signature, into)
            self._endpoint.link(self._group[source]).post(received)
        if dest is not None:
            link = self._endpoint.link(self._group[dest])
            sent = link.send(call.key, call.signature, payload)
        call.under_way = UnderWay(step, sent, received)
        return call.under_way

    def _check(self, call: Call, under_way: UnderWay) -> None:
        """Raise what went wrong in a step that is done."""
        step, sent, received = under_way
        for half, peer in ((received, step.source), (sent, step.dest)):
            if half is None or half.error is None or peer is None:
                continue
            world, error = self._group[peer], half.error
            if isinstance(error, SignatureMismatch):
                self._endpoint.mismatch(world, call.signature, error.theirs, call.key[2])
            self._raise_failure(call)
            if isinstance(error, FmiError):
                error = error.fresh().at(
                    rank=self._endpoint.rank, peer=world, op=call.op, seq=_seq(call)
                )
                if call.collective:
                    self._endpoint.give_up(error)
            raise error

    def _late(self, call: Call, under_way: UnderWay) -> None:
        """The deadline passed: raise, or (in a collective) let all ranks find who is missing."""
        self._raise_failure(call)
        step, sent, received = under_way
        pairs = ((received, step.source), (sent, step.dest))
        missing = {self._group[p] for half, p in pairs if half and not half.done and p is not None}
        within = f"within {call.timeout:.3g} s"
        for peer in missing:
            excuse = self._endpoint.excuse(peer)
            if excuse is not None:
                self._endpoint.give_up(excuse.at(op=call.op, seq=_seq(call)))
                self._raise_failure(call)
        if call.collective:
            event = JobAborted(
                self._endpoint.rank, "timeout", within, call.op, _seq(call), tuple(missing)
            )
            self._endpoint.late(event)
            return
        intact = self._withdraw(under_way)
        error = CollectiveTimeout(
            f"no answer from rank {some_ranks(sorted(missing))} {within}",
            missing=sorted(missing),
            rank=self._endpoint.rank,
            op=call.op,
        )
        if not intact:
            self._endpoint.give_up(error)
        raise error

    def _withdraw(self, under_way: UnderWay) -> bool:
        """Take back a step; False if a message has left in part, so that its link is useless."""
        step, sent, received = under_way
        if received is not None and not received.done and step.source is not None:
            self._endpoint.link(self._group[step.source]).cancel(received)
        if sent is None or sent.done or step.dest is None:
            return True
        return self._endpoint.link(self._group[step.dest]).withdraw(sent)

    def _interrupted(self, call: Call, error: BaseException) -> None:
        """Something of ours stopped the call in the middle: the others must not wait for it."""
        if self._endpoint.failure is not None:
            return
        intact = call.under_way is None or self._withdraw(call.under_way)
        if call.collective or not intact:
            self._abort(f"{_name(error)} during {call.op}")

    def _tell_error(self, error: BaseException) -> None:
        """The caller's code raised: the others would wait for us in vain."""
        if self._endpoint.failure is None:
            self._abort(_name(error))

    # -------------------------------------------------------------------- checks
    def _check_rank(self, rank: int, name: str) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"{name} must be a rank, not {rank!r}")
        if not 0 <= rank < self.size:
            raise ValueError(f"{name}={rank} is not a rank of a communicator of {self.size}")

    def _check_items(self, objs: Sequence[Any] | None, name: str) -> Sequence[Any]:
        if objs is None or len(objs) != self.size:
            found = "None" if objs is None else f"{len(objs)} items"
            raise ValueError(f"{name} needs a list of {self.size} items, one a rank, not {found}")
        return objs


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _seq(call: Call) -> int | None:
    return call.key[2] if call.collective else None


def _one(step: collectives.Step, finish: Callable[[Receive], Any]) -> Steps[Any]:
    received = yield step
    return finish(received)


def _then(steps: Steps[Any], finish: Callable[[Any], Any]) -> Generator[Any, Any, Any]:
    got = yield from steps
    return finish(got)


def _memory(out: Any) -> memoryview | None:
    """Return where a message for `out` can be received, if it can be received in place."""
    if out is None:
        return None
    array = as_numpy(out)
    if not array.flags.writeable:
        raise ValueError("out= is read-only")
    in_place = is_tensor(out) or array is out
    if not in_place or not array.nbytes:
        return None
    return array.reshape(-1).view(np.uint8).data


def _received(received: Receive, out: Any) -> Any:
    got = unpack(received.meta, received.data)
    return got if out is None else _fill(out, got)


def _fill(out: Any, got: Any) -> Any:
    """Put what came into `out`, if it has not been received there already."""
    if not is_array(got):
        raise TypeError(f"out= needs an array, but a {type(got).__name__} came")
    check_out(out, got, tuple(got.shape))
    return as_like(as_numpy(got), got, out)


def _item(item: Item) -> Any:
    return unpack(item.meta, item.data if item.data is not None else b"")


def _collected(items: list[Item], out: Any, own: int) -> list[Any]:
    if out is not None:
        places = (
            list(out) if isinstance(out, list | tuple) else [out[i, ...] for i in range(len(out))]
        )
        return [_fill(place, _item(item)) for place, item in zip(places, items, strict=True)]
    # Our own item lies in the caller's memory, which the result must not share.
    items[own] = items[own]._replace(data=bytearray(items[own].data or b""))
    return [_item(item) for item in items]
