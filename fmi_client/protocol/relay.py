"""What opens a relay leg: a rank's second connection to the server, which ends at its peer."""

from __future__ import annotations

from fmi_client.protocol import frames


def relay_request(ticket: bytes, on: bool = False) -> bytes:
    """Return what comes first on a leg; the ticket came with "punch".

    Args:
        on: a server says it, which passes a rank's leg on. Nobody passes it on again.
    """
    more = {"on": True} if on else {}
    return frames.PREFACE + frames.encode({"t": "relay", "ticket": ticket} | more)


RELAY_GO = b"\x01"
"""The server's only byte on a leg: the peer's is there, all that follows is the peer's."""

RELAY_FULL = b"\x02"
"""In its place, before the end: this job has as many relayed pairs as it may."""
