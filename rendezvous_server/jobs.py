"""What the server keeps of a job, of its ranks, and of the pairs that it relays. No I/O."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from fmi_client.protocol.addresses import Address, Version
from fmi_client.protocol.frames import Message
from fmi_client.protocol.notice import Notice
from rendezvous_server.reach import Reach

LOST_KEPT = 16
"""Lost ranks of a job of which is kept when and why: the first is the cause of the others."""


@dataclass(slots=True, eq=False)
class Member:
    """One rank of a job. `connection` is the caller's own handle to it."""

    job: Job
    rank: int
    connection: Hashable
    reach: dict[Version, Reach]
    """By version of IP; where it has both, the one that it came by is first."""
    address: Address
    """Where it came from, as we see it."""
    joined: float
    identity: bytes = b""
    """What only the same rank can come again with; empty: it cannot."""
    certificate: bytes = b""
    """What its peers are told to trust; empty: it encrypts nothing."""
    tickets: list[bytes] = field(default_factory=list)
    """For its legs on the server: what it has not used goes with it."""

    @property
    def present(self) -> bool:
        """Whether it is in its job, which may be over, or have it back on another connection."""
        return self.job.members.get(self.rank) is self


@dataclass(slots=True, eq=False)
class RelayPair:
    """Two ranks that may meet on the server; `first` is the handle of the leg that waits."""

    job: Job
    ranks: tuple[int, int]
    expires: float
    first: Hashable | None = None
    legs: int = 0
    refused: bool = False
    """One leg came when there was no room: the other must not wait for it in vain."""

    def release(self) -> None:
        """A leg ended."""
        self.legs -= 1
        if self.legs == 0:
            self.job.relay_pairs -= 1


@dataclass(slots=True, eq=False)
class Job:
    """A job whose ranks are here or awaited: who they are, and who was told what."""

    name: str
    size: int
    epoch: int
    began: float
    """When its first rank came."""
    expires: float
    run: bytes
    """Its name beside `name`, which other runs had before and will have."""
    tls: bool = False
    """Whether its ranks encrypt their links."""
    members: dict[int, Member] = field(default_factory=dict)
    running: bool = False
    gone: dict[int, Message] = field(default_factory=dict)
    """Ranks that left or were lost while the job ran, with what was said of them."""
    back_until: float | None = None
    """If it ran on another server before: until when its ranks are awaited here."""
    wanted: dict[int, dict[int, int]] = field(default_factory=dict)
    """Links asked for by one side: with whom, by whom, who has got so many bytes of it before."""
    relay_bytes: int = 0
    relay_pairs: int = 0
    """Pairs with a leg on the server now."""
    ready: float = 0.0
    """When its last rank came, if it is running."""
    links: int = 0
    """Pairs told to punch."""
    relayed: int = 0
    """Of these, pairs that met on the server."""
    came: bytearray = field(default_factory=bytearray)
    """Ranks that went away again before all were there, as a bitmap."""
    left: int = 0
    lost_count: int = 0
    """Ranks that left, and that were lost, while the job ran."""
    lost: dict[int, tuple[float, str]] = field(default_factory=dict)
    """When and why ranks were lost that did not come back; `LOST_KEPT` of them."""
    aborted: Notice | None = None
    """What a rank or the server said when it ended the job for everybody."""
    ended: float = 0.0
    absent: Message | None = None
    """The answer to "who", until somebody comes or goes: at a deadline all ranks ask at once."""

    @property
    def well(self) -> bool:
        """Whether nothing went wrong (so far)."""
        return self.running and not self.lost_count and self.aborted is None

    def lose(self, rank: int, now: float, why: str) -> None:
        self.lost_count += self.running
        if len(self.lost) < LOST_KEPT:
            self.lost[rank] = now, why

    def note(self, rank: int) -> None:
        """Remember that a rank was here before the job was complete."""
        if not self.came:
            self.came = bytearray((self.size + 7) // 8)
        self.came[rank // 8] |= 1 << rank % 8
