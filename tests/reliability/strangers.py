"""Raw connections to a server, as strangers make them, and what they need."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from fmi_client.protocol import auth
from fmi_client.protocol.rendezvous import ClientSide, Event, Hello, Welcome
from tests.support import close_by_reset, wait_for

HELLO = Hello("job", 1, 0, 0, 0, (("::", 1),), b"")


def need_descriptors(count: int) -> str | None:
    """Allow this process so many; returns why it cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        return f"this test opens {count} sockets; the hard limit is {hard} files"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    return None


def knock(port: int, data: bytes = b"") -> socket.socket:
    """Connect and say something."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    if data:
        sock.sendall(data)
    return sock


def enter(port: int, job: str, rank: int = 0, size: int = 1) -> tuple[socket.socket, list[Event]]:
    """Join as a rank, by hand; returns the connection and what came with the welcome.

    Raises:
        ConnectionError: the server did not let it finish.
    """
    sock = knock(port)
    own = (sock.getsockname(), ("10.0.0.1", sock.getsockname()[1]))
    hello = replace(
        HELLO, job=job, rank=rank, size=size, candidates=own, nonce=os.urandom(auth.NONCE_BYTES)
    )
    try:
        return sock, _converse(sock, ClientSide(hello, None))
    except Exception:
        sock.close()
        raise


def _converse(sock: socket.socket, side: ClientSide) -> list[Event]:
    while True:
        sock.sendall(side.outgoing)
        side.outgoing.clear()
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("closed before the welcome")
        events = side.receive(data)
        if any(isinstance(event, Welcome) for event in events):
            return events


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    close_by_reset(sock)
    sock.close()


def ended(sock: socket.socket) -> bytes:
    """Return what comes before the end; a reset is one, too."""
    said = b""
    with suppress(ConnectionResetError, BrokenPipeError):
        while data := sock.recv(65536):
            said += data
    return said


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait for it; returns the seconds that it took."""
    start = time.monotonic()
    wait_for(condition, "the server", seconds)
    return time.monotonic() - start
