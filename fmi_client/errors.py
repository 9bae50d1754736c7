"""Every error of this project, in one tree.

    FmiError
    ├── RendezvousError             the server refused, or cannot be reached
    │   ├── AuthenticationFailed    one generic answer, whatever was wrong
    │   ├── JobFull                 the job has another size, or is already running
    │   ├── RankTaken               another live process has this rank
    │   ├── ServerDraining          the server is about to stop: come back later
    │   └── JoinTimeout             `missing` ranks never came
    ├── PunchFailed                 no direct connection to `peer`
    ├── RankFailed                  `rank` died or left while it was needed
    ├── CollectiveTimeout           the deadline passed; `missing` are not there
    ├── CollectiveMismatch          ranks called different things
    ├── Aborted                     a rank called `abort(reason)`
    └── ProtocolError               the other side sent what the protocol forbids

Each error carries where it happened: ``rank`` (ours), ``peer``, ``op`` and ``seq`` (the
number of the operation on its communicator), each None where it does not apply.
This module imports nothing of the project, so that everything may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

__all__ = [
    "Aborted",
    "AuthenticationFailed",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "FmiError",
    "JobFull",
    "JoinTimeout",
    "ProtocolError",
    "PunchFailed",
    "RankFailed",
    "RankTaken",
    "RendezvousError",
    "ServerDraining",
]


class FmiError(Exception):
    """Base of all errors of this library.

    After one that a collective raised, the job is over on all ranks: every later call on any of
    its communicators raises the same. After one that a `send` or `recv` raised by its timeout the
    communicator can be used, unless a message had left in part.

    Args:
        message: what happened, without the place.
        rank: of the process that raises; None where it has none yet.
        peer: the other rank, if there is one.
        op: name of the operation, as of the method.
        seq: number of the collective on its communicator, from 0.
    """

    def __init__(
        self,
        message: str = "",
        *,
        rank: int | None = None,
        peer: int | None = None,
        op: str | None = None,
        seq: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.peer = peer
        self.op = op
        self.seq = seq

    def __str__(self) -> str:
        where = [
            f"rank {self.rank}" if self.rank is not None else "",
            f"peer {self.peer}" if self.peer not in (None, self.rank) else "",
            self.op or "",
            f"#{self.seq}" if self.seq is not None else "",
        ]
        place = ", ".join(filter(None, where))
        return f"[{place}] {self.message}" if place else self.message

    def at(
        self,
        *,
        rank: int | None = None,
        peer: int | None = None,
        op: str | None = None,
        seq: int | None = None,
    ) -> Self:
        """Fill in what is not yet known about the place, and return the same error.

        Arguments are those of the class; what is known already stays as it is.
        """
        self.rank = rank if self.rank is None else self.rank
        self.peer = peer if self.peer is None else self.peer
        self.op = op if self.op is None else self.op
        self.seq = seq if self.seq is None else self.seq
        return self

    def fresh(self) -> Self:
        """Return an equal error without traceback: one failure ends many operations."""
        copy: Self = _rebuild(type(self), self.args, self.__dict__)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries: the default would call __init__ without keywords.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[Any], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class RendezvousError(FmiError):
    """The rendezvous server (or store) refused the request, or cannot be reached."""


class AuthenticationFailed(RendezvousError):
    """Server or peer, or we, could not prove what they must know.

    The server does not say which part was wrong; what our error adds is a guess.
    """


class JobFull(RendezvousError):
    """The job runs already, or was opened with another size."""


class RankTaken(RendezvousError):
    """Another live process holds this rank of the job."""


class ServerDraining(RendezvousError):
    """The server is shutting down and takes no new ranks.

    `connect` raises it only after some seconds in which no other server took its place.
    """

    retry_after = 1.0
    """Seconds after which the server wants to be asked again, or another one in its place."""


class _Missing(FmiError):
    """An error that names the ranks that did not show up."""

    def __init__(
        self, message: str = "", *, missing: Sequence[int] = (), **place: int | str | None
    ) -> None:
        super().__init__(message, **place)  # type: ignore[arg-type]
        self.missing = sorted(missing)


class JoinTimeout(_Missing, RendezvousError):
    """Not all ranks joined in time; ``missing`` lists those that the server has not seen.

    It is empty where nobody could say, such as in a store that rank 0 has tidied up already.
    This rank has left the job again, and may join anew.
    """


class CollectiveTimeout(_Missing):
    """The deadline passed; ``missing`` lists the ranks that are not there (1,000 at most).

    After a collective all ranks raise the same: missing are those that were asked and did not
    answer, be it that somebody waits for them or not. Who takes part, is done with its part and
    calls something else, or has left in order is not. There are cases that nobody can tell apart:

    * A blocking rank that is done with its part and computes cannot answer. It is named, and the
      text says that nobody waits for it. `poll` now and then keeps it from that.
    * A rank whose way to the server and back takes longer than 70 ms is named as one that is late.
    * While there is no server, only those are named that this rank itself, or one it has heard
      from, waits for.
    * A rank that stops while a link to it is being made, where nothing can be relayed, is found out
      as one that cannot be reached (`PunchFailed`).

    The communicator cannot be used any more: its ranks disagree on where they are. Of `send` and
    `recv`, ``missing`` is the peer, and the communicator can be used unless a message left in part.
    """


class PunchFailed(FmiError):
    """No connection to ``peer`` could be made before the deadline.

    Nor was it relayed: the server relays nothing, or ``channel="direct"`` forbids it.
    """


class RankFailed(FmiError):
    """Rank ``rank`` of the job died, or left while others needed it.

    All other ranks raise it. The job cannot go on; a new attempt takes the next ``epoch``. Here
    ``rank`` and ``peer`` both name the rank that failed, not the one that noticed.
    """

    def __init__(
        self, message: str = "", *, rank: int, op: str | None = None, seq: int | None = None
    ) -> None:
        super().__init__(message, rank=rank, peer=rank, op=op, seq=seq)


class CollectiveMismatch(FmiError):
    """Ranks of a communicator called different operations; ``details`` says who called what.

    All ranks raise it. Different roots, reduce operations, dtypes and shapes count, too.
    """

    def __init__(self, message: str = "", *, details: str = "", **place: int | str | None) -> None:
        super().__init__(message or details, **place)  # type: ignore[arg-type]
        self.details = details or message


class Aborted(FmiError):
    """Rank ``by`` called ``abort(reason)``, or left its ``with`` block by an exception.

    The reason then is that exception's class and text.
    """

    def __init__(
        self, message: str = "", *, by: int, reason: str = "", **place: int | str | None
    ) -> None:
        super().__init__(message or f"aborted by rank {by}: {reason}", **place)  # type: ignore[arg-type]
        self.by = by
        self.reason = reason


class ProtocolError(FmiError):
    """The other side sent bytes that the protocol does not allow.

    None of it reaches the caller.
    """
