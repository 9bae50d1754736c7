"""What opens a relay leg: a rank's second connection to the server, which ends at its peer."""

from __future__ import annotations

from fmi_client.protocol import frames


def relay_request(ticket: bytes) -> bytes:
    """Return what a rank sends first on a leg; the ticket came with "punch"."""
    return frames.PREFACE + frames.encode({"t": "relay", "ticket": ticket})


RELAY_GO = b"\x01"
"""The server's only byte on a leg: the peer's is there, all that follows is the peer's."""

RELAY_FULL = b"\x02"
"""In its place, before the end: this job has as many relayed pairs as it may."""
