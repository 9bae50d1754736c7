"""Servers as users write them, and where they are."""

from __future__ import annotations

import contextlib
import socket

from fmi_client.errors import RendezvousError
from fmi_client.protocol.addresses import Address, plain, version
from fmi_client.protocol.tls import SCHEME

MAX_SERVERS = 8
"""Addresses of the server that are tried: each may cost a moment."""


def parse_endpoint(text: str, default_port: int = 10000) -> Address:
    """Split "host:port", "host" or "[v6]:port", with or without "tls://" before it.

    Raises:
        ValueError: the port is not a number from 1 to 65535, or the host cannot be one.
    """
    place = text.removeprefix(SCHEME)
    host, port = place, str(default_port)
    if place.startswith("["):
        host, _, given = place[1:].partition("]")
        host, port = (host, given[1:] or port) if given[:1] in ("", ":") else ("", port)
    elif place.count(":") == 1:
        host, port = place.split(":")
    if not _is_name(host) or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not an address of the form host:port")
    return host, int(port)


def _is_name(host: str) -> bool:
    """Whether a host can be looked up at all."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


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
        raise RendezvousError(
            f"cannot resolve {host!r}, the rendezvous server: {error.strerror}", op="connect"
        ) from None
    addresses = dict.fromkeys((str(name[0]), int(name[1])) for *_, name in found)
    return tuple(sorted(addresses, key=version))[:MAX_SERVERS]
