"""A job's objects in a store: their names, and the proof that a rank of the job wrote them.

Everything lives below ``<job>/<epoch>-<size>``::

    <ticket>                    a rank is there; it made its nonce just now
    <nonce>.answer              rank 0's answer: the name of this run's folder, made just now
    <run>/here/<ticket>         the rank got the answer, so it is alive, and no rank of an old run
    <run>/go                    rank 0: all are here
    <run>/<src>-<dst>/<number>  a piece of the stream of messages from src to dst
    <run>/over                  look at what is in events/
    <run>/events/<rank>-<n>     a rank aborts, or waits in vain; <rank>-left: it leaves

A ticket is ``<rank>-<nonce>-<code>``, an empty object whose name says everything: to list is
to read. Every other object begins with a code over its own name and the rest of it, so that
none can stand in another's place. Without a job key the codes only detect damage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b, sha256
from typing import NamedTuple
from urllib.parse import quote

from fmi_client.errors import ProtocolError
from fmi_client.protocol import auth
from fmi_client.protocol.peer import Buffer

SEAL_BYTES = auth.MAC_BYTES

_TICKET = re.compile(r"(\d{1,6})-([0-9a-f]{32})-([0-9a-f]{64})")
_RUN = re.compile(rb"[0-9a-f]{32}")
_EVENT = re.compile(r"(\d{1,6})-(\d{1,6}|left)")


class Ticket(NamedTuple):
    """A rank that is there, or was once: `proven` if it has our key."""

    rank: int
    nonce: str
    proven: bool


class Scheme:
    """Names and codes of one job's objects."""

    def __init__(self, job: str, epoch: int, size: int, key: bytes | None) -> None:
        # Readable where that is possible; the rest keeps jobs of similar names apart.
        readable = quote(job, safe="").replace(".", "_")[:40]
        label = f"{readable}-{blake2b(job.encode(), digest_size=8).hexdigest()}"
        self.root = f"{label}/{epoch}-{size}"
        self._key = auth.mac(key or b"", "fmi3 store", job.encode(), b"%d" % epoch, b"%d" % size)

    def ticket(self, folder: str, rank: int, nonce: str) -> str:
        """Return the name by which a rank says in `folder` that it is there."""
        code = auth.mac(self._key, "fmi3 ticket", f"{folder}/{rank}-{nonce}".encode())
        return f"{rank}-{nonce}-{code.hex()}"

    def tickets(self, folder: str, names: Sequence[str]) -> list[Ticket]:
        """Return who was in `folder`; what is no ticket of this job is ignored."""
        found = []
        for name in names:
            match = _TICKET.fullmatch(name)
            if match is not None:
                rank, nonce = int(match[1]), match[2]
                same = auth.same(name.encode(), self.ticket(folder, rank, nonce).encode())
                found.append(Ticket(rank, nonce, same))
        return found

    def seal(self, name: str, parts: Sequence[Buffer]) -> bytes:
        """Return the code that goes before `parts` in object `name`."""
        digest = sha256()
        for part in parts:
            digest.update(part)
        return auth.mac(self._key, "fmi3 object", name.encode(), digest.digest())

    def unseal(self, name: str, data: bytes) -> memoryview:
        """Return what object `name` holds.

        Raises:
            ProtocolError: it was damaged, or not written by a rank of this job.
        """
        body = memoryview(data)[SEAL_BYTES:]
        if not auth.same(data[:SEAL_BYTES], self.seal(name, (body,))):
            raise ProtocolError(f"object {name} is damaged, or not a rank's of this job")
        return body


def read_run(answer: memoryview) -> str:
    """Return the name of the run's folder from rank 0's answer."""
    if _RUN.fullmatch(answer) is None:
        raise ProtocolError("rank 0's answer is not the name of a run")
    return bytes(answer).decode()


def event_rank(name: str) -> int | None:
    """Return who wrote the event of this name; None if it is none."""
    match = _EVENT.fullmatch(name)
    return int(match[1]) if match else None
