"""What a rank tells all others of its job: that it is over and why, or who is there. No I/O.

It goes through the server, or through a store where there is no server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from fmi_client.errors import (
    Aborted,
    CollectiveMismatch,
    CollectiveTimeout,
    FmiError,
    ProtocolError,
    RankFailed,
    RendezvousError,
)
from fmi_client.protocol import frames
from fmi_client.protocol.frames import Message
from fmi_client.protocol.hello import MAX_SIZE

SERVER = -1
"""The `by` of a notice that is no rank's."""

MAX_REASON = 2048
MAX_OPERATION = 64
MAX_RANKS_NAMED = 1000


class Kind(StrEnum):
    """What a notice says. All but three end the job; so does any that we do not know."""

    ABORT = "abort"
    LOST = "lost"
    """`by` cannot reach the rank any more that it names."""
    MISMATCH = "mismatch"
    TIMEOUT = "timeout"
    """The job goes on: `by` calls the roll (see `roll`)."""
    HERE = "here"
    """The job goes on: `by` answers."""
    MISSING = "missing"
    LEFT = "left"
    """The job goes on without `by`. In a store only: the server announces it by itself."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What rank `by` (or the server, `SERVER`) tells all ranks."""

    by: int
    kind: str
    """A `Kind`, or one of a later version."""
    reason: str
    op: str | None = None
    seq: int | None = None
    ranks: tuple[int, ...] = ()
    """Whom it is about: who was lost or is missing, or whom `by` waits for in vain."""
    context: int = 0
    """The communicator that counts `seq`, where that is asked for."""

    @classmethod
    def of(cls, error: FmiError, by: int) -> Self:
        """Return what the others must know when this error ends the job for rank `by`."""
        if isinstance(error, RankFailed) and error.rank is not None:
            return cls(by, Kind.LOST, error.message, error.op, error.seq, (error.rank,))
        return cls(by, Kind.ABORT, error.message, error.op, error.seq)

    def error(self, rank: int) -> FmiError:
        """Return what `rank` is to raise when it hears that the job is over."""
        if self.kind == Kind.MISMATCH:
            return CollectiveMismatch(
                details=self.reason, rank=rank, peer=self.by, op=self.op, seq=self.seq
            )
        if self.kind == Kind.MISSING:
            return CollectiveTimeout(
                f"no answer from rank {some_ranks(self.ranks)} {self.reason}",
                missing=self.ranks,
                rank=rank,
                op=self.op,
                seq=self.seq,
            )
        if self.kind == Kind.LOST and self.ranks:
            return RankFailed(self.reason, rank=self.ranks[0])
        if self.by == SERVER:
            return RendezvousError(self.reason, rank=rank)
        return Aborted(by=self.by, reason=self.reason, rank=rank, op=self.op, seq=self.seq)

    def encode(self, to: str) -> Message:
        """Return the wire form, "abort" to the server and "aborted" from it or in a store."""
        return {
            "t": to,
            "by": self.by,
            "kind": self.kind,
            "reason": self.reason[:MAX_REASON],
            "op": self.op,
            "seq": self.seq,
            "ranks": list(self.ranks[:MAX_RANKS_NAMED]),
            "context": self.context,
        }

    @classmethod
    def decode(cls, message: Message, by: int) -> Self:
        """Read what `by` tells: on the wire, the server knows who it is.

        Raises:
            ProtocolError: a field is missing, of another type, or out of bounds.
        """
        op, seq, context = message.get("op"), message.get("seq"), message.get("context")
        ranks = frames.field(message, "ranks", list, high=MAX_RANKS_NAMED)
        if not all(isinstance(rank, int) and 0 <= rank < MAX_SIZE for rank in ranks):
            raise ProtocolError("abort: not ranks")
        return cls(
            by,
            frames.field(message, "kind", str, high=32),
            frames.field(message, "reason", str, high=MAX_REASON),
            op[:MAX_OPERATION] if isinstance(op, str) else None,
            seq if isinstance(seq, int) else None,
            tuple(ranks),
            context if isinstance(context, int) else 0,
        )


def some_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks as text, the first ten of them."""
    shown = ", ".join(map(str, ranks[:10]))
    return f"{shown}, …" if len(ranks) > 10 else shown
