"""Sockets to listen on, of both IP versions at one port, and how many there may be."""

from __future__ import annotations

import errno
import math
import os
import resource
import socket
from contextlib import ExitStack, suppress

from fmi_client.protocol.addresses import format_address

EVERYWHERE = "::"
"""The host that stands for all interfaces and both versions of IP, or the one there is."""

NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

MAX_HTTP = 64
"""Connections of operators at once: twice the viewers that the live page has."""

RESERVED = MAX_HTTP + 32
"""Descriptors that are none of ranks': also listeners, the loop's own, and those of a burst, which
the loop accepts before we can close any."""


class CannotListen(OSError):
    """The text says where, why, and what to do."""

    def __init__(self, where: str, why: str) -> None:
        advice = "choose another --host, --port or --admin-port"
        super().__init__(f"cannot listen at {where}: {why}; {advice}")


def raise_limit() -> None:
    """Use all descriptors that this process may have: the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some kernels allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def room_for_ranks() -> float:
    """Return how many connections of ranks and strangers there are descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else max(soft - RESERVED, soft // 2)


def room_for_http() -> int:
    """Return how many connections of operators there may be: where the limit is low, few."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_HTTP if soft == resource.RLIM_INFINITY else min(MAX_HTTP, max(4, soft // 8))


def listen(host: str, port: int, backlog: int = 128) -> list[socket.socket]:
    """Listen at every address of `host` and at the same port; 0 takes a free one.

    Raises:
        CannotListen: at one of them, or there is no such host.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for address in _addresses(host):
            at = sockets[0].getsockname()[1] if sockets else port
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                sock = socket.create_server((address, at), family=family, backlog=backlog)
            except OSError as error:
                if sockets and family == socket.AF_INET6 and error.errno in NO_IPV6:
                    continue
                if sockets and error.errno == errno.EADDRINUSE and port == 0:
                    return listen(host, port, backlog)  # we hold this port: another is drawn
                why = os.strerror(error.errno or 0)
                raise CannotListen(format_address((address, at)), why) from None
            # Made anew, it knows that it speaks TCP: asyncio switches Nagle off only then.
            sockets.append(stack.enter_context(socket.socket(fileno=sock.detach())))
        stack.pop_all()
        return sockets


def _addresses(host: str) -> list[str]:
    """Return those of IPv4 first, without which no machine is."""
    if host == EVERYWHERE:
        return ["0.0.0.0", "::"]
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise CannotListen(host, error.strerror or str(error)) from None
    return sorted({str(name[0]) for *_, name in found}, key=lambda text: (":" in text, text))
