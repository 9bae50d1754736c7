"""The operations that bring objects from rank to rank as they are; see `operations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fmi_client import collectives, delivery
from fmi_client.calls import Caller
from fmi_client.collectives import Steps
from fmi_client.payloads import pack, unpack
from fmi_client.protocol.peer import Payload
from fmi_client.protocol.transfers import Receive


class Movement(Caller):
    """Point-to-point operations, and the collectives that combine nothing."""

    # ------------------------------------------------------------ point to point
    def send(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> Any:
        """Send `obj` to rank `dest`; returns when the system has taken it all.

        Args:
            obj: array, tensor, or what the class says of everything else.
            dest: rank in this communicator; may be this one.
            tag: from 0 to 2**63 - 1; messages of different tags do not get in each other's way.
            timeout: seconds; default: the communicator's, as in all methods.

        Returns:
            None.

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
            source: rank in this communicator; there is no "any".
            tag: that of the `send`.
            out: array of the dtype and shape that is coming; it is filled and returned.
            timeout: seconds.

        Returns:
            the object: arrays as numpy arrays, tensors as tensors, of the sender's dtype and shape.

        Raises:
            TypeError: what came is no array, but `out` is given; it is lost.
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

        Args:
            timeout: seconds.

        Returns:
            None, on all ranks.

        Raises:
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        steps = collectives.barrier(self.rank, self.size)
        return self._collective("barrier()", steps, timeout)

    def bcast(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the root's `obj` on every rank; a rank is done when its own part is.

        Args:
            obj: what the root sends, of any kind, dtype and shape; ignored elsewhere, where None
                will do.
            root: rank in this communicator.
            out: array of the root's dtype and shape; it is filled and returned.
            timeout: seconds.

        Returns:
            at the root `obj` itself, elsewhere an object of its own; `out` where that is given.

        Raises:
            TypeError, ValueError: `obj` cannot be sent, there is no such root, or `out` does not
                fit what came, which ends the job.
            FmiError: it failed on all ranks, and the job is over; see the class.
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
        """Collect everybody's `obj` at the root; the others are done when their own part is.

        Args:
            obj: may be of another type, dtype or shape on each rank.
            root: rank in this communicator.
            out: at the root, a list of `size` arrays, or one of shape (size, …) whose rows are
                filled, each of its rank's dtype and shape; ignored elsewhere.
            timeout: seconds.

        Returns:
            at the root the list of all `size` objects in rank order (the arrays of `out`, where
            that is given), None elsewhere.

        Raises:
            TypeError, ValueError: `obj` cannot be sent, there is no such root, or `out` has not
                one place for each rank; or a place does not fit what came, which ends the job.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        self._check_rank(root, "root")
        places = delivery.places(out, self.size) if self.rank == root else None
        steps = self._gather(pack(obj), root, places)
        return self._collective(f"gather(root={root})", steps, timeout)

    def _gather(self, payload: Payload, root: int, places: list[Any] | None) -> Steps[Any]:
        rooms = None if places is None else [delivery.memory(place) for place in places]
        items = yield from collectives.gather(payload, self.rank, self.size, root, rooms)
        return None if items is None else delivery.collected(items, places, self.rank)

    def allgather(self, obj: Any, *, out: Any = None, timeout: float | None = None) -> Any:
        """Collect everybody's `obj` on every rank.

        Args:
            obj: may be of another type, dtype or shape on each rank.
            out: as of `gather`, on each rank that wants it.
            timeout: seconds.

        Returns:
            on every rank the list of all `size` objects in rank order, or the arrays of `out`.

        Raises:
            TypeError, ValueError: as of `gather`.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        steps = self._allgather(pack(obj), delivery.places(out, self.size))
        return self._collective("allgather()", steps, timeout)

    def _allgather(self, payload: Payload, places: list[Any] | None) -> Steps[Any]:
        items = yield from collectives.allgather(payload, self.rank, self.size)
        return delivery.collected(items, places, self.rank)

    def scatter(
        self,
        objs: Sequence[Any] | None,
        root: int = 0,
        *,
        out: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Give each rank its item of the root's list; a rank is done when its own part is.

        Args:
            objs: at the root, one item for each rank, of any type, dtype and shape; an array is
                `size` rows. Ignored elsewhere, where None will do.
            root: rank in this communicator.
            out: array of this rank's item's dtype and shape; it is filled and returned.
            timeout: seconds.

        Returns:
            item `rank` of the list: at the root itself, elsewhere an object of its own; `out` where
            that is given.

        Raises:
            TypeError, ValueError: the root's list has another length, or holds what cannot be sent;
                there is no such root; or `out` does not fit what came, which ends the job.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        self._check_rank(root, "root")
        delivery.check_place(out)
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
        """Send ``objs[i]`` to rank i, on every rank.

        Args:
            objs: one item for each rank, in rank order, of any type, dtype and shape; an array is
                `size` rows.
            out: as of `gather`, on each rank that wants it.
            timeout: seconds.

        Returns:
            on every rank the list of what each rank sent to it, in rank order, or the arrays of
            `out`.

        Raises:
            TypeError, ValueError: the list has another length, or holds what cannot be sent; or
                as of `gather`.
            FmiError: it failed on all ranks, and the job is over; see the class.
        """
        payloads = [pack(obj) for obj in self._check_items(objs, "alltoall")]
        steps = self._alltoall(payloads, delivery.places(out, self.size))
        return self._collective("alltoall()", steps, timeout)

    def _alltoall(self, payloads: list[Payload], places: list[Any] | None) -> Steps[Any]:
        items = yield from collectives.alltoall(payloads, self.rank, self.size)
        return delivery.collected(items, places, self.rank)

    # -------------------------------------------------------------------- checks
    def _check_rank(self, rank: int, name: str) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"{name} must be a rank, not {rank!r}")
        if not 0 <= rank < self.size:
            raise ValueError(f"{name}={rank} is not a rank of a communicator of {self.size}")

    def _check_items(self, objs: Sequence[Any] | None, name: str) -> Sequence[Any]:
        wanted = f"{name} needs a list of {self.size} items, one a rank"
        if objs is None:
            raise ValueError(f"{wanted}, not None")
        try:
            count = len(objs)
        except TypeError:
            raise TypeError(f"{wanted}, not {type(objs).__name__}") from None
        if count != self.size:
            raise ValueError(f"{wanted}, not {count} items")
        return objs


def _one(step: collectives.Step, finish: Callable[[Receive], Any]) -> Steps[Any]:
    received = yield step
    return finish(received)
