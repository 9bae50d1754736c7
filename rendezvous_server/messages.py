"""What ranks are told that needs no more than a line to make."""

from __future__ import annotations

from fmi_client.errors import ServerDraining
from fmi_client.protocol.frames import Message

READY: Message = {"t": "ready"}
DRAINING: Message = {"t": "draining"}


def want(asker: int) -> Message:
    """That rank wants a link with you."""
    return {"t": "want", "peer": asker}


def not_back(rank: int) -> Message:
    """That rank of a job from another server is not here.

    Said as of one that left: it may have finished, and links with it that exist need not end.
    """
    why = "did not come back after the server's restart"
    return {"t": "gone", "rank": rank, "clean": True, "why": why}


def draining() -> ServerDraining:
    """Return what is said to ranks that have to go elsewhere."""
    return ServerDraining("the server is shutting down; try again in a few seconds")
