"""Tickets, by which ranks that cannot reach each other may meet on the server. No I/O."""

from __future__ import annotations

import os

from fmi_client.errors import AuthenticationFailed, RendezvousError
from fmi_client.protocol import auth
from rendezvous_server.jobs import Member, RelayPair

RELAY_PAIRS = 1024
"""Relayed pairs of one job at once: each costs two descriptors, and up to 256 KiB of memory."""

TICKET_SECONDS = 120.0
"""A rank may compute for a while between the server's word and its next call."""

SPARE_LINKS = 16
"""A rank may ask twice for a link with each of the others, and so many times more."""


class RelayFull(RendezvousError):
    """A job has as many pairs on the server as it may."""


class Tickets:
    """All that are good: each for one leg of a pair, once.

    Args:
        relay_pairs: how many pairs of one job may be here at once.
        tag: what tickets begin with, by which other servers know them for ours.
    """

    def __init__(self, relay_pairs: int = RELAY_PAIRS, tag: bytes = b"") -> None:
        self._relay_pairs = relay_pairs
        self._tag = tag
        self._pairs: dict[bytes, RelayPair] = {}

    def issue(self, member: Member, pair: RelayPair) -> bytes:
        """Make a ticket for a rank; it is good for as long as the rank is here."""
        ticket = self._tag + os.urandom(auth.COOKIE_BYTES - len(self._tag))
        self._pairs[ticket] = pair
        member.tickets.append(ticket)
        return ticket

    def claim(self, ticket: bytes, now: float) -> RelayPair:
        """Use up a ticket: one leg of its pair is here. `RelayPair.release` must follow.

        Raises:
            AuthenticationFailed: there is no such ticket.
            RelayFull: the job has as many pairs here as it may.
        """
        pair = self._pairs.pop(ticket, None)
        if pair is None or pair.expires <= now:
            raise AuthenticationFailed("authentication failed")
        if pair.legs == 0:
            pair.refused |= pair.job.relay_pairs >= self._relay_pairs
            if pair.refused:
                raise RelayFull(
                    f"job {pair.job.name!r} relays {self._relay_pairs} pairs already "
                    "(--relay-pairs)"
                )
            pair.job.relay_pairs += 1
        pair.legs += 1
        return pair

    def void(self, member: Member) -> None:
        """Forget those of a rank that is not here any more."""
        for ticket in member.tickets:
            self._pairs.pop(ticket, None)
        member.tickets.clear()

    def expire(self, now: float) -> None:
        """Forget those whose time is over."""
        for ticket in [each for each, pair in self._pairs.items() if pair.expires <= now]:
            del self._pairs[ticket]
