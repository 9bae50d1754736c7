"""Running an operation: what the async and the blocking driver have in common.

A `Call` is one operation under way. A driver asks `_begin`, then feeds its steps to `_post`,
waits until they are done, and lets `_check` or `_late` say what that means.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

from fmi_client import collectives
from fmi_client.collectives import Steps
from fmi_client.endpoint import MAX_SECONDS, Endpoint
from fmi_client.errors import Aborted, CollectiveTimeout, FmiError
from fmi_client.protocol.notice import Kind, Notice, some_ranks
from fmi_client.protocol.peer import COLLECTIVE, POINT_TO_POINT, Key
from fmi_client.protocol.transfers import Receive, Send, SignatureMismatch
from fmi_client.transport.link import Link

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

    def halves(self) -> list[tuple[Send | Receive, int]]:
        """Return what was started, each with the peer, receiving first."""
        found: list[tuple[Send | Receive, int]] = []
        if self.received is not None and self.step.source is not None:
            found.append((self.received, self.step.source))
        if self.sent is not None and self.step.dest is not None:
            found.append((self.sent, self.step.dest))
        return found

    @property
    def done(self) -> bool:
        """Whether both halves are, well or not."""
        sent, received = self.sent, self.received
        return (sent is None or sent.done) and (received is None or received.done)

    @property
    def only_receiving(self) -> bool:
        """Whether nothing is left to be sent."""
        return self.sent is None or self.sent.done

    @property
    def well(self) -> bool:
        """Whether nothing has gone wrong so far."""
        sent, received = self.sent, self.received
        return (sent is None or sent.error is None) and (received is None or received.error is None)

    @property
    def only_sending(self) -> bool:
        """Whether nothing is left to be received."""
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
        """Whether all ranks of the communicator take part."""
        return self.key[0] == COLLECTIVE

    @property
    def stuck(self) -> bool:
        """Whether only a send is left, whose peer may be stuck in one itself.

        In a collective the steps match, and what is under way is bound to be received.
        """
        under_way = self.under_way
        return not self.collective and under_way is not None and under_way.only_sending


class Caller:
    """A rank's place in a communicator, and the operations that it has under way.

    What has no underscore is for all modules of this package; `rank`, `size`, `group` and `timeout`
    are for users, too.
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
        self._collective_seconds = 0.0
        self.group = group
        """The members' numbers in the job, by rank: 0 … size - 1, unless `split` made it."""
        self.world_rank: int = endpoint.rank
        """This process's number in the job."""
        self.context = context
        """Number of the communicator, alike on all its ranks: its messages carry it."""
        self.seq = 0
        """How many collectives have begun here, which is the next one's number."""
        self.timeout = timeout
        """Seconds that an operation may take which says nothing else; may be changed."""
        self.rank = group.index(self.world_rank)
        """This process's number in the communicator, from 0."""
        self.size = len(group)
        """How many ranks the communicator has."""

    def part(self, group: Sequence[int], context: int) -> Self:
        """Return a communicator of some ranks of the job, which all must name alike.

        Args:
            group, context: as the attributes.
        """
        raise NotImplementedError

    def link(self, peer: int) -> Link:
        """Return the link with a rank of this communicator, which may still have to be made."""
        return self._endpoint.link(self.group[peer])

    def _run(self, call: Call) -> Any:
        raise NotImplementedError

    def _collective(self, signature: str, steps: Steps[Any], timeout: float | None) -> Any:
        name, encoded = _signed(signature)
        call = Call(
            name, (COLLECTIVE, self.context, self.seq), encoded, steps, self.seconds(timeout)
        )
        self.seq += 1  # only now: what is refused has no number
        return self._run(call)

    def _spent(self, call: Call, seconds: float) -> None:
        if call.collective:
            self._collective_seconds += seconds
        self._ended(call)

    def _ended(self, call: Call) -> None:
        self._endpoint.running.discard(call.key)

    def _point(self, op: str, tag: int, steps: Steps[Any], timeout: float | None) -> Any:
        if not 0 <= operator.index(tag) <= MAX_TAG:
            raise ValueError(f"tag must be from 0 to 2**63 - 1, not {tag}")
        key = (POINT_TO_POINT, self.context, int(tag))
        return self._run(Call(op, key, b"", steps, self.seconds(timeout)))

    def seconds(self, timeout: float | None) -> float:
        """Return how long an operation may take that was given this ``timeout=``.

        Raises:
            TypeError, ValueError: that is no number from 0 on.
        """
        seconds = self.timeout if timeout is None else timeout
        kind: type[Exception] = ValueError
        try:
            if seconds >= 0:
                return min(seconds, MAX_SECONDS)
        except TypeError:
            kind = TypeError
        raise kind(f"timeout={seconds!r} is not a number of seconds from 0 on")

    def _begin(self, call: Call) -> None:
        if self._endpoint.failure is None and call.collective:
            self._endpoint.begin(self.context, call.key[2], call.signature)
            self._endpoint.running.add(call.key)
        self._raise_failure(call)

    def _raise_failure(self, call: Call) -> None:
        self.raise_ended(call.op, _seq(call))

    def raise_ended(self, op: str, seq: int | None = None) -> None:
        """Raise why the job is over, if it is."""
        failure = self._endpoint.failure
        if failure is not None:
            raise failure.fresh().at(rank=self.world_rank, op=op, seq=seq)

    def _post(self, step: collectives.Step, call: Call) -> UnderWay:
        """Start a step: the receive first, so that what comes finds its place."""
        self._raise_failure(call)  # it may have come while the last step was ending
        received = sent = None
        dest, payload, source, into, fold = step
        if source is not None:
            received = Receive(call.key, call.signature, into, fold)
            self.link(source).post(received)
        if dest is not None:
            sent = self.link(dest).send(call.key, call.signature, payload)
        call.under_way = UnderWay(step, sent, received)
        return call.under_way

    def _ask(self, call: Call) -> None:
        """A step takes long: where ranks call different things, each may wait for the other."""
        under_way = call.under_way
        if not call.collective or under_way is None or under_way.received is None:
            return
        source = under_way.step.source
        if source is not None and not under_way.received.done:
            _, context, seq = call.key
            self._endpoint.ask(self.group[source], context, seq, call.signature)

    def _check(self, call: Call, under_way: UnderWay) -> None:
        """Raise what went wrong in a step; it is done, or nobody found out in time why not."""
        if not under_way.done:
            self._raise_failure(call)
            raise CollectiveTimeout("no answer, and no word of who is missing")
        if under_way.well:
            return
        for half, peer in under_way.halves():
            if half.error is None:
                continue
            world, error = self.group[peer], half.error
            if isinstance(error, SignatureMismatch):
                self._endpoint.mismatch(world, call.signature, error.theirs, call.key[2])
            self._raise_failure(call)
            if isinstance(error, FmiError):
                error = error.fresh().at(peer=world)
            raise error

    def _late(self, call: Call, under_way: UnderWay) -> None:
        """The deadline passed: raise, or (in a collective) let all ranks find who is missing."""
        self._raise_failure(call)
        missing = {self.group[peer] for half, peer in under_way.halves() if not half.done}
        within = f"within {call.timeout:.3g} s"
        for peer in missing:
            excuse = self._endpoint.excuse(peer)
            if excuse is not None:
                self._endpoint.give_up(excuse.at(op=call.op, seq=_seq(call)))
                self._raise_failure(call)
        if call.collective:
            _, context, seq = call.key
            by, ranks = self.world_rank, tuple(missing)
            event = Notice(by, Kind.TIMEOUT, within, call.op, seq, ranks, context)
            self._endpoint.late(event, self.group)
            return
        intact = self._withdraw(under_way)
        why = f"no answer from rank {some_ranks(sorted(missing))} {within}"
        error = CollectiveTimeout(why, missing=sorted(missing)).at(rank=self.world_rank, op=call.op)
        if not intact:
            self._endpoint.give_up(error)
        raise error

    def _withdraw(self, under_way: UnderWay) -> bool:
        """Take back a step; False if a message has left in part, so that its link is useless."""
        step, sent, received = under_way
        if received is not None and not received.done and step.source is not None:
            self.link(step.source).cancel(received)
        if sent is None or sent.done or step.dest is None:
            return True
        return self.link(step.dest).withdraw(sent)

    def _interrupted(self, call: Call, error: BaseException) -> None:
        """An error stopped the call: it learns its place, and the others not to wait for us."""
        if isinstance(error, FmiError):
            error.at(rank=self.world_rank, op=call.op, seq=_seq(call))
            if call.collective:
                self._endpoint.give_up(error)
        elif self._endpoint.failure is None:
            intact = call.under_way is None or self._withdraw(call.under_way)
            if call.collective or not intact:
                self._abort(f"{_name(error)} during {call.op}")

    def _tell_error(self, error: BaseException) -> None:
        """The caller's code raised: the others would wait for us in vain."""
        if self._endpoint.failure is None:
            self._abort(_name(error))

    def _abort(self, reason: str) -> None:
        by = self.world_rank
        self._endpoint.tell(Notice(by, Kind.ABORT, reason))
        self._endpoint.fail(Aborted(by=by, reason=reason, rank=by))


def context_of(label: str) -> int:
    """Return the number of a communicator that all its ranks describe alike."""
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=1024)
def _signed(signature: str) -> tuple[str, bytes]:
    return signature.split("(")[0], signature.encode()


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _seq(call: Call) -> int | None:
    return call.key[2] if call.collective else None
