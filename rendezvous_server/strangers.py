"""Connections that have proved nothing yet: how long and how many of them. No I/O.

There is no rate limit: the ranks of a job often share one address, a NAT's, and come all at once.
What is bounded is what strangers hold. Where there is room, nobody notices. Where there is none,
the one who has been silent for longest makes room for the one who comes, so that a rank, whose
handshake takes two round trips, gets through among any number of those who only hold on. One
source that fills more than half of the room makes room itself.
"""

from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Hashable
from itertools import takewhile
from typing import Generic, TypeVar

Stranger = TypeVar("Stranger", bound=Hashable)

MAX_STRANGERS = 20_000
"""Twice as many as a large job has ranks behind one NAT; in memory some 60 MiB."""

MAX_TLS_STRANGERS = 4_000
"""Where they may begin TLS, each can take some 50 KiB: in all 200 MiB. Ranks that come all at once
and are too many for that find room when they come again."""


def source(host: str) -> bytes:
    """Return whom an IP address stands for: of IPv6 whoever has one has its /64."""
    if ":" not in host:
        return host.encode()
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8]


class Strangers(Generic[Stranger]):
    """All of them, the oldest first, each with its deadline by any one clock.

    Args:
        room: how many there may be.
    """

    def __init__(self, room: int = MAX_STRANGERS) -> None:
        self._room = room
        # No plain dicts: these find their oldest at once, however many were taken out before.
        self._all: OrderedDict[Stranger, tuple[float, bytes]] = OrderedDict()
        self._of: dict[bytes, OrderedDict[Stranger, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def crowded(self) -> bool:
        """Whether who comes now needs somebody's place."""
        return len(self._all) >= self._room

    def add(self, stranger: Stranger, source: bytes, deadline: float) -> None:
        """Take in one who comes; its deadline is not before that of the last."""
        self._all[stranger] = deadline, source
        self._of.setdefault(source, OrderedDict())[stranger] = None

    def discard(self, stranger: Stranger) -> float | None:
        """Forget one who has gone, or is no stranger any longer.

        Returns:
            Its deadline; None if it was forgotten before.
        """
        deadline, source = self._all.pop(stranger, (None, b""))
        if deadline is not None:
            same = self._of[source]
            del same[stranger]
            if not same:
                del self._of[source]
        return deadline

    def next_to_go(self, source: bytes) -> Stranger | None:
        """Return who makes room for one who comes from `source`; None: nobody is here."""
        same = self._of.get(source)
        if same is not None and 2 * len(same) > len(self._all):
            return next(iter(same))
        return next(iter(self._all), None)

    def late(self, now: float) -> list[Stranger]:
        """Return those whose deadline is over."""
        return [each for each, _ in takewhile(lambda one: one[1][0] <= now, self._all.items())]

    @property
    def next_deadline(self) -> float | None:
        """The first that comes; None: nobody is here."""
        return next((deadline for deadline, _ in self._all.values()), None)


class Lately:
    """How loudly to say that strangers were refused.

    Of one between two ticks, or each byte to the port would cost a line of log.
    """

    def __init__(self) -> None:
        self._count = 0

    def level(self) -> int:
        """Return the level for one more."""
        self._count += 1
        return logging.INFO if self._count == 1 else logging.DEBUG

    def others(self) -> int:
        """Return how many were not named since the last tick, which this is."""
        count, self._count = self._count, 0
        return max(0, count - 1)
