"""Where a host is."""

from __future__ import annotations

import contextlib
import socket

from fmi_client.errors import RendezvousError
from fmi_client.protocol.addresses import Address, plain, version

MAX_SERVERS = 8
"""Addresses of the server that are tried: each may cost a moment."""


def resolve(host: str, port: int) -> tuple[Address, ...]:
    """Look up the addresses of a host, those of IPv4 first; blocking.

    Only IPv4 has NATs, and only the server can tell us what they make of our address.

    Raises:
        RendezvousError: there is no such host.
    """
    with contextlib.suppress(ValueError):
        return ((plain(host), port),)
    flags = socket.AI_ADDRCONFIG  # what we have no addresses for is not looked up
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise RendezvousError(f"cannot resolve {host!r}: {error.strerror}", op="connect") from None
    addresses = dict.fromkeys((str(name[0]), int(name[1])) for *_, name in found)
    return tuple(sorted(addresses, key=version))[:MAX_SERVERS]
