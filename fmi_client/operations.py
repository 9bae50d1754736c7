"""The methods of a communicator, once for the async and the blocking one.

Each method checks its arguments, chooses the algorithm and hands it to the driver
(`_run`). In the async communicator the result is awaited; in the sync one it is returned.
Those that combine nothing are in `movement`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator
from typing import Any, Self

from fmi_client import reductions
from fmi_client.calls import context_of
from fmi_client.collectives import Steps
from fmi_client.cost_model import Model, calibrate
from fmi_client.movement import Movement
from fmi_client.ops import SUM, Op, as_op
from fmi_client.payloads import Array, is_array, pack
from fmi_client.reductions import Algorithm
from fmi_client.values import ArrayValue, as_like, check_out, make_value

OpLike = Op | Callable[[Any, Any], Any]


class Operations(Movement):
    """Point-to-point and collective operations between the ranks of a communicator.

    On the async communicator each returns what is to be awaited; on the blocking one it returns
    when it is done.

    **What can be sent**: numpy arrays and torch tensors of any shape and memory layout, and of any
    dtype that needs no pickle; numpy scalars count as arrays without an axis. Everything else must
    be made of None, bool, int, float, complex, str, bytes, lists, tuples, dicts and arrays. It
    arrives as what it was, an array with dtype and shape as numpy array, a tensor as tensor on the
    CPU. The memory is the receiver's own, or that of ``out=``, which is what is returned then, and
    may be the input. No other input is ever modified.

    **Time**: ``timeout=`` is in seconds; without it the communicator's own counts.

    **A wrong argument** raises TypeError or ValueError on its rank before anything is sent, and the
    call may be repeated. The others wait for it, until the exception leaves the ``with`` block:
    then they raise `Aborted`. Where what comes does not fit ``out=``, or a function given as `op`
    raises, that rank raises TypeError, ValueError or the function's error, and the others
    `Aborted`: the job is over.

    **A failed collective** raises an `FmiError` on all ranks: `RankFailed`, `CollectiveTimeout`,
    `CollectiveMismatch` where they called different things, `Aborted`, or `PunchFailed` where there
    is no way to one of them. Then the job is over: every later call, on all of its communicators,
    raises the same. Errors name ranks as the job numbers them, which `group` translates.
    """

    model: Model | None = None
    """What `calibrate` measured, or what you put here: predicts times and prices."""

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
        """Combine everybody's `obj` at the root.

        Args:
            obj: as of `allreduce`.
            op: as of `allreduce`.
            root: rank in this communicator.
            out: at the root, array for the result, of the input's dtype and shape; may be the
                input. Ignored elsewhere.
            timeout: seconds.

        Returns:
            at the root the combination, as of `allreduce`; None elsewhere.

        Raises:
            TypeError, ValueError: as of `allreduce`, or there is no such root.
            CollectiveMismatch: dtype, shape, operation or root differ; on all ranks.
            FmiError: it failed on all ranks, and the job is over; see the class.
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
        """Combine everybody's `obj`, with the same bits as result on every rank.

        Args:
            obj: array or tensor, of one dtype and shape on all ranks; or a number or anything else
                that can be sent and `op` combines.
            op: one of `fmi_client.ops`, or an associative function of two values, which is given
                them in rank order.
            out: array for the result, of the input's dtype and shape; may be the input.
            algorithm: "doubling", "halving" or "ring", for experiments; default FMI_ALLREDUCE,
                or what suits the size. All ranks must say the same.
            timeout: seconds.

        Returns:
            on every rank a new array or tensor of the input's dtype and shape, or `out`; of
            anything else, what `op` makes of it.

        Raises:
            TypeError: `op` is no operation, or not defined for the dtype; `out` is of another kind.
            ValueError: `out` has another dtype or shape, or is read-only; the algorithm is none, or
                cannot do this.
            CollectiveMismatch: dtype, shape, operation or algorithm differ; on all ranks.
            FmiError: it failed on all ranks, and the job is over; see the class.

        The dtype never changes: integers wrap. Halves (float16, bfloat16) travel as halves: each
        combination is done in float32 and rounded, up to size - 1 times for an element, so cast to
        float32 before where that is too coarse.
        """
        op = as_op(op)
        value = make_value(obj, op, out)
        algorithm = algorithm or reductions.preferred()
        steps = reductions.allreduce(value, self.rank, self.size, op.commutative, algorithm)
        how = f", {algorithm}" if algorithm else ""
        signature = f"allreduce({op.name}, {value.description}{how})"
        return self._collective(signature, _then(steps, lambda _: value.result()), timeout)

    def reduce_scatter(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Combine everybody's array, and give each rank its part of the result.

        Args:
            obj: array or tensor, of one dtype and shape on all ranks, with at least one axis, the
                first of which is split.
            op: as of `allreduce`.
            out: array of the input's dtype, with this rank's rows.
            timeout: seconds.

        Returns:
            on every rank a new array or tensor, or `out`: part `rank` of
            ``numpy.array_split(combination, size)``. That are ``len(obj) // size`` rows, and one
            more on the first ``len(obj) % size`` ranks.

        Raises:
            TypeError: `obj` has no axis, or is no array; or as of `allreduce`.
            ValueError: `out` does not fit.
            CollectiveMismatch: dtype, shape or operation differ; on all ranks.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        op = as_op(op)
        if not is_array(obj) or obj.ndim == 0:
            found = "one without" if is_array(obj) else type(obj).__name__
            raise TypeError(
                f"reduce_scatter needs an array or tensor with at least one axis, not {found}"
            )
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
        """Combine the values of ranks 0 … `rank`, on every rank.

        Arguments, result and errors are those of `allreduce`.
        """
        return self._scan("scan", obj, op, out, timeout)

    def exscan(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Combine the values of ranks 0 … `rank` - 1, on every rank.

        Arguments, result and errors are those of `allreduce`, but rank 0 gets None, and its `out`
        stays as it is.
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

        Takes about a quarter of a second, more where messages are slow.

        Args:
            timeout: seconds.

        Returns:
            a `fmi_client.Model`, the same on every rank; it is kept in `model`, too.

        Raises:
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        return self._collective("calibrate()", self._calibrate(), timeout)

    def _calibrate(self) -> Steps[Model]:
        self.model = yield from calibrate(self.rank, self.size)
        return self.model

    # -------------------------------------------------------------------- groups
    def split(self, color: int | None, key: int = 0, *, timeout: float | None = None) -> Any:
        """Make a communicator of the ranks with the same `color`; all ranks must call it.

        The links are shared, and so is the end: after a failed collective of a part the whole job
        is over. It needs no closing.

        Args:
            color: any integer, or None for a rank that is to be in no part.
            key: ranks of the new communicator are numbered by it, and by their rank here.
            timeout: seconds. The new communicator's own default is this one's.

        Returns:
            a communicator of the same kind as this one; None where `color` is.

        Raises:
            TypeError: `color` or `key` is no integer.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        try:
            group = None if color is None else operator.index(color)
            steps = self._split(group, operator.index(key), self.seq)
        except TypeError:
            raise TypeError(f"color={color!r}, key={key!r}: split needs integers") from None
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
        next operation on this rank does. After the job's end it changes nothing.

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
        """Return what happened so far on this rank; asks nobody.

        Returns:
            a dict with the keys ``join_seconds`` (from connect to all ranks present),
            ``operations`` (collectives begun on this communicator), ``collective_seconds`` (spent
            in them, waiting for the other ranks included; not in those begun without waiting, as by
            ``iallreduce``), and ``links``: for each peer that was needed, by its number in the job,
            its ``kind`` ("direct", "relay", "object"; "pending" before it is made), ``tls``
            (whether it is encrypted), ``bytes_sent`` and ``bytes_received`` (payload), and
            ``messages_received``.
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
            if peer != self.world_rank
        }
        joined = self._endpoint.join_seconds
        return {
            "join_seconds": joined,
            "operations": self.seq,
            "collective_seconds": self._collective_seconds,
            "links": links,
        }


def _then(steps: Steps[Any], finish: Callable[[Any], Any]) -> Generator[Any, Any, Any]:
    got = yield from steps
    return finish(got)
