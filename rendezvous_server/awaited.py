"""Links asked for with ranks that have not come back from another server. No I/O.

Who speaks of a run that began elsewhere is believed, and any rank of it may still come: so one
connection can ask for as many links as its job has ranks. What all of them may ask for is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

from fmi_client.errors import ProtocolError
from rendezvous_server.jobs import Job

MAX_AWAITED = 200_000
"""In all jobs together: as many as 600 ranks have among them, or 10,000 that want 20 each. In
memory at most some 60 MiB."""

Askers = dict[int, int]
"""Who wants a link, and how many bytes of it they have got before."""


class Awaited:
    """All of them.

    Args:
        room: how many there may be.
    """

    def __init__(self, room: int = MAX_AWAITED) -> None:
        self._room = room
        self._of: dict[Job, dict[int, Askers]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job, peer: int, asker: int, got: int) -> None:
        """`asker` wants a link with `peer`.

        Raises:
            ProtocolError: there is no room.
        """
        if self._count >= self._room:
            raise ProtocolError("link: too many wait for ranks that are not back")
        askers = self._of.setdefault(job, {}).setdefault(peer, {})
        self._count += asker not in askers
        askers[asker] = got

    def pop(self, job: Job, peer: int) -> Askers:
        """Return who wants a link with `peer`, and forget them."""
        askers = self._of.get(job, {}).pop(peer, {})
        self._count -= len(askers)
        return askers

    def drain(self, job: Job) -> Iterator[tuple[int, Askers]]:
        """Yield every peer and who wants a link with it; what was yielded is forgotten."""
        peers = self._of.get(job, {})
        while peers:
            peer = next(reversed(peers))
            yield peer, self.pop(job, peer)

    def forget_asker(self, job: Job, asker: int) -> None:
        """What it wants does not count any longer."""
        peers = self._of.get(job, {})
        for peer in [peer for peer, askers in peers.items() if asker in askers]:
            self._count -= 1
            del peers[peer][asker]
            if not peers[peer]:
                del peers[peer]

    def forget(self, job: Job) -> None:
        """The job is over."""
        self._count -= sum(map(len, self._of.pop(job, {}).values()))
