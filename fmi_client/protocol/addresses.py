"""IP addresses as text, of both versions: each has one form, under which it is compared."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Literal

Address = tuple[str, int]
"""An IP address as text, and a port."""

Version = Literal[4, 6]

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def plain(host: str) -> str:
    """Return the one form of an IP address: no scope, and IPv4 as such where IPv6 wraps it.

    Raises:
        ValueError: it is no IP address.
    """
    with contextlib.suppress(OSError):
        # Of IPv4 there is no other form, and this takes a tenth of the time.
        return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, host))
    ip = ipaddress.ip_address(host.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def version(address: Address) -> Version:
    return 6 if ":" in address[0] else 4


def is_global(address: Address) -> bool:
    """Whether an address is the same everywhere: of IPv6, where no NAT is expected."""
    return version(address) == 6 and ipaddress.ip_address(address[0]) in _GLOBAL_UNICAST


def format_address(address: Address) -> str:
    """Return "host:port" or "[v6]:port"."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
