"""What a TCP load balancer says before all else: whom the connection is from. No I/O.

PROXY protocol, version 2 (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt)::

    12 bytes   signature
     1 byte    version 2 and command: 0x21 PROXY (for somebody), 0x20 LOCAL (health check)
     1 byte    family and transport: 0x11 TCP over IPv4, 0x21 TCP over IPv6
     2 bytes   length of what follows, big-endian
               source and destination addresses, source and destination ports, extensions
"""

from __future__ import annotations

import ipaddress
import struct

from fmi_client.errors import ProtocolError
from fmi_client.protocol.addresses import Address, plain

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
TEXT_SIGNATURE = b"PROXY"
"""How version 1 begins, a line of text."""

MAX_BODY = 2048
"""Bytes of addresses and extensions; the addresses are 12 or 36, balancers add some dozens."""

LOCAL, PROXY = 0x20, 0x21

_FIXED = struct.Struct("!BBH")
_ADDRESSES = {0x11: struct.Struct("!4s4sHH"), 0x21: struct.Struct("!16s16sHH")}


def split_header(data: bytes) -> tuple[Address | None, bytes] | None:
    """Split the header from what the client itself sent.

    Returns:
        The client's address (None: the connection is the balancer's own) and the bytes behind
        the header; or None while the header is not complete.

    Raises:
        ProtocolError: this is no such header, or not of TCP.
    """
    start = data[: len(SIGNATURE)]
    if start.startswith(TEXT_SIGNATURE):
        raise ProtocolError("a PROXY header of version 1: the balancer must send version 2")
    if not SIGNATURE.startswith(start) and not TEXT_SIGNATURE.startswith(start):
        raise ProtocolError("no PROXY header, which --proxy-protocol asks of every connection")
    begin = len(SIGNATURE) + _FIXED.size
    if len(data) < begin:
        return None
    command, family, length = _FIXED.unpack_from(data, len(SIGNATURE))
    addresses = _ADDRESSES.get(family)
    if command not in (LOCAL, PROXY):
        raise ProtocolError(f"a PROXY header with unknown version and command {command:#04x}")
    if command == PROXY and (addresses is None or length < addresses.size):
        raise ProtocolError(f"a PROXY header of {length} bytes for family {family:#04x}, not TCP")
    if length > MAX_BODY:
        raise ProtocolError(f"a PROXY header of {length} bytes is over the limit of {MAX_BODY}")
    if len(data) < begin + length:
        return None
    rest = data[begin + length :]
    if command == LOCAL or addresses is None:
        return None, rest
    host, _, port, _ = addresses.unpack_from(data, begin)
    return (plain(str(ipaddress.ip_address(host))), port), rest
