"""The methods of a communicator, once for the async and the blocking one.

Each method checks its arguments, chooses the algorithm and hands it to the driver
(`_run`). In the async communicator the result is awaited; in the sync one it is returned.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Generator, Sequence
from functools import cache, partial
from typing import Any, Self, cast, get_args

import numpy as np

from fmi_client import collectives, delivery, reductions
from fmi_client.calls import Caller, context_of
from fmi_client.collectives import Steps
from fmi_client.cost_model import Model, calibrate
from fmi_client.ops import SUM, Op, as_op
from fmi_client.payloads import Array, is_array, pack, unpack
from fmi_client.protocol.inbox import Receive
from fmi_client.protocol.peer import Payload
from fmi_client.reductions import Algorithm
from fmi_client.values import ArrayValue, as_like, check_out, make_value

OpLike = Op | Callable[[Any, Any], Any]


class Operations(Caller):
    """Point-to-point and collective operations between the ranks of a communicator.

    Every method takes ``timeout=`` in seconds (default: the communicator's). After any
    `FmiError` in a collective the job is over on all ranks: every later call raises the
    same error. Arrays may be numpy arrays or torch tensors of any dtype that needs no
    pickle, in any memory layout; input is never modified. Everything else must be made of
    None, bool, int, float, complex, str, bytes, lists, tuples, dicts and arrays.

    Results of reductions are the same bits on every rank.

    An argument that is wrong by itself raises TypeError or ValueError on its rank before anything
    is sent. The others wait for it, until the exception leaves the ``with`` block: then they raise
    `Aborted`.
    """

    model: Model | None = None
    """What `calibrate` measured, or what you put here: predicts times and prices."""

    # ------------------------------------------------------------ point to point
    def send(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> Any:
        """Send `obj` to rank `dest`; returns when the system has taken it all.

        Args:
            obj: array, tensor, or what the class says of everything else.
            dest: rank in this communicator.
            tag: from 0 to 2**63 - 1; messages of different tags do not get in each other's way.
            timeout: seconds; default: the communicator's, as in all methods.

        Raises:
            TypeError: `obj` is nothing that can be sent; nothing was.
            ValueError: there is no such rank or tag.
            CollectiveTimeout: the peer does not take it; usable afterwards unless part of it left.
            FmiError: the job is over, or there is no way to the peer.
        """
        self._check_rank(dest, "dest")
        step = collectives.send(dest, pack(obj))
        return self._point("send", tag, _one(step, lambda _: None), timeout)

    def recv(
        self, source: int, tag: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Receive what rank `source` sent under `tag`, in the order of sending.

        Args:
            source: rank in this communicator.
            tag: that of the `send`.
            out: array of the dtype and shape that is coming; it is filled and returned.
            timeout: seconds.

        Returns:
            the object: arrays as numpy arrays, tensors as tensors, of the sender's dtype and shape.

        Raises:
            TypeError: what came is no array, but `out` is given.
            ValueError: what came has another dtype or shape than `out`; it is lost.
            CollectiveTimeout: nothing came; the communicator can still be used.
            FmiError: the job is over, or there is no way to the peer.
        """
        self._check_rank(source, "source")
        step = collectives.receive(source, delivery.memory(out))
        return self._point("recv", tag, _one(step, partial(delivery.received, out=out)), timeout)

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
        """Send to `dest` and receive from `source` (default: `dest`) at the same time.

        Arguments, result and errors are those of `send` and `recv`; `out` may be `obj`.
        """
        source = dest if source is None else source
        self._check_rank(dest, "dest")
        self._check_rank(source, "source")
        payload, into = pack(obj), delivery.memory(out)
        if into is not None and any(np.may_share_memory(into, part) for part in payload.parts):
            into = None  # what comes must not overwrite what has not left yet
        step = collectives.Step(dest, payload, source, into)
        steps = _one(step, partial(delivery.received, out=out))
        return self._point("sendrecv", tag, steps, timeout)

    # --------------------------------------------------------------- collectives
    def barrier(self, *, timeout: float | None = None) -> Any:
        """Return when all ranks have called it.

        Raises:
            FmiError: as every collective; see the class.
        """
        steps = collectives.barrier(self.rank, self.size)
        return self._collective("barrier()", steps, timeout)

    def bcast(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the root's `obj` on every rank; the others' `obj` is ignored.

        Args:
            obj: what the root sends; None elsewhere will do.
            root: rank in this communicator.
            out: array of the root's dtype and shape; it is filled and returned.
            timeout: seconds.
        """
        self._check_rank(root, "root")
        payload = pack(obj) if self.rank == root else None
        steps = self._bcast(obj, payload, root, out, delivery.memory(out))
        return self._collective(f"bcast(root={root})", steps, timeout)

    def _bcast(
        self, obj: Any, payload: Payload | None, root: int, out: Any, into: memoryview | None
    ) -> Steps[Any]:
        if payload is not None:
            yield from collectives.bcast(payload, self.rank, self.size, root)
            return obj if out is None else delivery.fill(out, obj)
        meta, data = yield from collectives.bcast(None, self.rank, self.size, root, into)
        got = unpack(meta, data)
        return got if out is None else delivery.fill(out, got)

    def gather(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the list of everybody's `obj` in rank order at the root, None elsewhere.

        Args:
            obj: may be of another type, dtype or shape on each rank.
            root: rank in this communicator.
            out: at the root, a list of `size` arrays, or one of shape (size, …), whose rows are
                filled; ignored elsewhere.
            timeout: seconds.
        """
        self._check_rank(root, "root")
        return self._collective(f"gather(root={root})", self._gather(pack(obj), root, out), timeout)

    def _gather(self, payload: Payload, root: int, out: Any) -> Steps[Any]:
        places = None
        if out is not None and self.rank == root:
            places = [delivery.memory(place) for place in delivery.places(out)]
        items = yield from collectives.gather(payload, self.rank, self.size, root, places)
        return None if items is None else delivery.collected(items, out, self.rank)

    def allgather(self, obj: Any, *, out: Any = None, timeout: float | None = None) -> Any:
        """Return the list of everybody's `obj` in rank order, on every rank.

        Args:
            obj: may be of another type, dtype or shape on each rank.
            out: a list of `size` arrays, or one of shape (size, …), whose rows are filled.
            timeout: seconds.
        """
        return self._collective("allgather()", self._allgather(pack(obj), out), timeout)

    def _allgather(self, payload: Payload, out: Any) -> Steps[Any]:
        items = yield from collectives.allgather(payload, self.rank, self.size)
        return delivery.collected(items, out, self.rank)

    def scatter(
        self,
        objs: Sequence[Any] | None,
        root: int = 0,
        *,
        out: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Return item `rank` of the root's list of `size` items; the others' is ignored.

        Args:
            objs: at the root, one item for each rank; None elsewhere will do. An array is `size`
                rows.
            root: rank in this communicator.
            out: array of this rank's item's dtype and shape; it is filled and returned.
            timeout: seconds.

        Raises:
            ValueError: at the root, the list has another length; nothing was sent, and the others
                wait. An exception that leaves the ``with`` block tells them.
        """
        self._check_rank(root, "root")
        payloads = own = None
        if self.rank == root:
            items = self._check_items(objs, "scatter")
            payloads, own = [pack(obj) for obj in items], items[root]
        steps = self._scatter(payloads, own, root, out)
        return self._collective(f"scatter(root={root})", steps, timeout)

    def _scatter(self, payloads: list[Payload] | None, own: Any, root: int, out: Any) -> Steps[Any]:
        item = yield from collectives.scatter(payloads, self.rank, self.size, root)
        got = delivery.item(item) if payloads is None else own
        return got if out is None else delivery.fill(out, got)

    def alltoall(
        self, objs: Sequence[Any], *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Send ``objs[i]`` to rank i; return the list of what each rank sent to us.

        Args:
            objs: one item for each rank, in rank order.
            out: a list of `size` arrays, or one of shape (size, …), whose rows are filled.
            timeout: seconds.

        Raises:
            ValueError: the list has another length; nothing was sent.
        """
        payloads = [pack(obj) for obj in self._check_items(objs, "alltoall")]
        return self._collective("alltoall()", self._alltoall(payloads, out), timeout)

    def _alltoall(self, payloads: list[Payload], out: Any) -> Steps[Any]:
        items = yield from collectives.alltoall(payloads, self.rank, self.size)
        return delivery.collected(items, out, self.rank)

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

        Args:
            obj: as of `allreduce`.
            op: one of `fmi_client.ops`, or an associative function of two values.
            root: rank in this communicator.
            out: at the root, array for the result, of the input's dtype and shape; may be the
                input.
            timeout: seconds.

        Raises:
            CollectiveMismatch: dtype, shape, operation or root differ; on all ranks.
        """
        self._check_rank(root, "root")
        op = as_op(op)
        # Elsewhere than at the root, `out` must not see the partial results.
        value = make_value(obj, op, out if self.rank == root else None)
        steps = reductions.reduce(value, self.rank, self.size, root, op.commutative)
        signature = f"reduce({op.name}, root={root}, {value.description})"
        return self._collective(
            signature, _then(steps, lambda here: value.result() if here else None), timeout
        )

    def allreduce(
        self,
        obj: Any,
        op: OpLike = SUM,
        *,
        out: Any = None,
        algorithm: Algorithm | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the combination of everybody's `obj`, the same bits on every rank.

        Args:
            obj: array, tensor, number, or anything that `op` combines and msgpack carries.
            op: one of `fmi_client.ops`, or an associative function of two values, which is given
                them in rank order.
            out: array for the result, of the input's dtype and shape; may be the input.
            algorithm: "doubling", "halving" or "ring", for experiments; default FMI_ALLREDUCE,
                or what suits the size. All ranks must say the same.
            timeout: seconds.

        Raises:
            CollectiveMismatch: dtype, shape, operation or algorithm differ; on all ranks.

        Halves (float16, bfloat16) travel as halves: each combination is done in float32 and
        rounded, up to size - 1 times for an element, so cast to float32 before where that is too
        coarse.
        """
        op = as_op(op)
        value = make_value(obj, op, out)
        algorithm = algorithm or _preferred()
        steps = reductions.allreduce(value, self.rank, self.size, op.commutative, algorithm)
        how = f", {algorithm}" if algorithm else ""
        signature = f"allreduce({op.name}, {value.description}{how})"
        return self._collective(signature, _then(steps, lambda _: value.result()), timeout)

    def reduce_scatter(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Combine everybody's array; return part `rank` of ``numpy.array_split(…, size)``.

        Args:
            obj: array or tensor of at least one axis, which is the one that is split.
            op: as of `allreduce`.
            out: array of the input's dtype, with this rank's rows: ``len(obj) // size``, and one
                more on the first ``len(obj) % size`` ranks.
            timeout: seconds.

        Raises:
            TypeError: `obj` has no axis, or is no array.
            CollectiveMismatch: dtype, shape or operation differ; on all ranks.
        """
        op = as_op(op)
        if not is_array(obj) or obj.ndim == 0:
            raise TypeError("reduce_scatter needs an array or tensor with at least one axis")
        value = ArrayValue(obj, op)
        if out is not None:
            length, *rest = value.source.shape
            mine = length // self.size + (self.rank < length % self.size)
            check_out(out, obj, (mine, *rest))
        steps = reductions.reduce_scatter(value, self.rank, self.size, op.commutative)
        signature = f"reduce_scatter({op.name}, {value.description})"

        def finish(part: Array) -> Any:
            # A view into a larger array would keep all of it alive, or be the caller's input.
            return as_like(part if out is not None else part.copy(), obj, out)

        return self._collective(signature, _then(steps, finish), timeout)

    def scan(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the combination of the values of ranks 0 … `rank`; arguments as of `allreduce`."""
        return self._scan("scan", obj, op, out, timeout)

    def exscan(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the combination of the values of ranks 0 … `rank` - 1; None on rank 0.

        Arguments are those of `allreduce`.
        """
        return self._scan("exscan", obj, op, out, timeout)

    def _scan(self, name: str, obj: Any, op: OpLike, out: Any, timeout: float | None) -> Any:
        op = as_op(op)
        inclusive = name == "scan"
        value = make_value(obj, op, out)
        if not inclusive and out is not None:
            value = make_value(obj, op)
        steps = reductions.scan(value, self.rank, self.size, inclusive, out)
        signature = f"{name}({op.name}, {value.description})"
        return self._collective(
            signature, _then(steps, lambda got: None if got is None else got.result()), timeout
        )

    # --------------------------------------------------------------------- costs
    def calibrate(self, *, timeout: float | None = None) -> Any:
        """Measure latency, bandwidth and speed of addition; all ranks must call it.

        Takes about a quarter of a second, more where messages are slow. Returns a
        `fmi_client.Model`, the same on every rank, and keeps it in ``model``.
        """
        return self._collective("calibrate()", self._calibrate(), timeout)

    def _calibrate(self) -> Steps[Model]:
        self.model = yield from calibrate(self.rank, self.size)
        return self.model

    # -------------------------------------------------------------------- groups
    def split(self, color: int | None, key: int = 0, *, timeout: float | None = None) -> Any:
        """Return a communicator of the ranks with the same `color`, ordered by `key`, rank.

        A rank with color None takes part in the call, but gets None. The links are shared, and so
        is the end: after a failed collective of a part the whole job is over.

        Args:
            color: any integer; all ranks of the communicator call this.
            key: ranks of the new communicator are numbered by it, and by their rank here.
            timeout: seconds; also the new communicator's default is this one's.
        """
        group = None if color is None else operator.index(color)
        steps = self._split(group, operator.index(key), self.seq)
        return self._collective("split()", steps, timeout)

    def _split(self, color: int | None, key: int, seq: int) -> Steps[Self | None]:
        everybody = yield from self._allgather(pack([color, key]), None)
        if color is None:
            return None
        members = sorted((k, r) for r, (c, k) in enumerate(everybody) if c == color)
        context = context_of(f"{self.context} {seq} {color}")
        return self.part([self.group[r] for _, r in members], context)

    def abort(self, reason: str = "") -> Any:
        """End the job on all ranks: whatever they wait for raises `Aborted(by, reason)`.

        Takes effect at once (awaiting it is allowed, not needed) and does not raise here; the
        next operation on this rank does.

        Args:
            reason: what the errors say, as ``reason``.
        """
        self._abort(reason)

    def poll(self) -> Any:
        """Take in what has come, without waiting: for a rank that computes for long.

        Between operations a rank is deaf. Called now and then, say after each batch, this lets it
        hear that another rank has failed, instead of working on in vain; and it carries on what
        `isend` and its like began. Through a store (channel "object") one call asks, in the
        background, and a later one hears the answer.

        Raises:
            FmiError: what the next operation would raise now: `RankFailed`, `Aborted`, ...
        """
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Return what happened so far.

        Keys: ``join_seconds`` (from connect to all ranks present), ``operations``
        (collectives begun on this communicator), ``collective_seconds`` (spent in them,
        waiting for the other ranks included; not in those begun without waiting, as by
        ``iallreduce``), and ``links``: for each peer that was
        needed its ``kind`` ("direct", "relay", "object"; "pending" before it is made), ``tls``
        (whether it is encrypted),
        ``bytes_sent`` and ``bytes_received`` (payload), and ``messages_received``.
        """
        links = {
            peer: {
                "kind": link.kind,
                "tls": link.tls,
                "bytes_sent": link.bytes_sent,
                "bytes_received": link.inbox.payload_bytes,
                "messages_received": link.inbox.messages,
            }
            for peer, link in sorted(self._endpoint.links.items())
            if peer != self._endpoint.rank
        }
        joined = getattr(self._endpoint, "join_seconds", 0.0)
        return {
            "join_seconds": joined,
            "operations": self.seq,
            "collective_seconds": self._collective_seconds,
            "links": links,
        }

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


@cache
def _preferred() -> Algorithm | None:
    """Return the algorithm that the environment names, as it was at the first allreduce."""
    named = os.environ.get("FMI_ALLREDUCE")
    for each in get_args(Algorithm):
        if each == named:
            return cast(Algorithm, each)
    if named:
        raise ValueError(f"FMI_ALLREDUCE={named!r} is none of {', '.join(get_args(Algorithm))}")
    return None


def _one(step: collectives.Step, finish: Callable[[Receive], Any]) -> Steps[Any]:
    received = yield step
    return finish(received)


def _then(steps: Steps[Any], finish: Callable[[Any], Any]) -> Generator[Any, Any, Any]:
    got = yield from steps
    return finish(got)
