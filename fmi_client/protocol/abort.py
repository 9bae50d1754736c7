"""What ends a job for all its ranks, as they and the server tell it. No I/O.

It goes through the server, or through a store where there is no server.
"""

from __future__ import annotations

from dataclasses import dataclass

from fmi_client.errors import ProtocolError
from fmi_client.protocol import frames
from fmi_client.protocol.frames import Message
from fmi_client.protocol.hello import MAX_SIZE

SERVER = -1
"""The `by` of an abort that no rank asked for."""

MAX_REASON = 2048
MAX_OPERATION = 64
MAX_RANKS_NAMED = 1000


@dataclass(frozen=True, slots=True)
class JobAborted:
    """A rank (or the server, `by` is `SERVER`) ended the job for everybody."""

    by: int
    kind: str
    reason: str
    op: str | None = None
    seq: int | None = None
    ranks: tuple[int, ...] = ()
    """Whom it is about: who was lost or is missing, or whom `by` waits for in vain."""
    context: int = 0
    """The communicator that counts `seq`, where that is asked for."""


def abort_message(kind: str, event: JobAborted) -> Message:
    """Return the wire form of an abort, "abort" to the server and "aborted" from it."""
    return {
        "t": kind,
        "by": event.by,
        "kind": event.kind,
        "reason": event.reason[:MAX_REASON],
        "op": event.op,
        "seq": event.seq,
        "ranks": list(event.ranks[:MAX_RANKS_NAMED]),
        "context": event.context,
    }


def read_abort(message: Message, by: int) -> JobAborted:
    """Read an abort, from a rank (the server knows who it is) or from the server."""
    op, seq, context = message.get("op"), message.get("seq"), message.get("context")
    ranks = frames.field(message, "ranks", list, high=MAX_RANKS_NAMED)
    if not all(isinstance(rank, int) and 0 <= rank < MAX_SIZE for rank in ranks):
        raise ProtocolError("abort: not ranks")
    return JobAborted(
        by,
        frames.field(message, "kind", str, high=32),
        frames.field(message, "reason", str, high=MAX_REASON),
        op[:MAX_OPERATION] if isinstance(op, str) else None,
        seq if isinstance(seq, int) else None,
        tuple(ranks),
        context if isinstance(context, int) else 0,
    )
