"""TCPunch's own clients: what they send, what they are told, and who meets whom. No I/O.

Version 1 (OpenCoreCH/TCPunch and spcl/TCPunch, hence the C++ FMI library)::

    client                        server
    name                    ──►                        1 to 100 bytes, no terminator
                            ◄──   address              the client's own
                            ◄──   address              its peer's, once there is one; the end

Version 2 (mstaylor/TCPunch)::

    name, token, flags      ──►                        141 bytes
                            ◄──   WAITING or ERROR
                            ◄──   PAIRED or TIMEOUT    the end

where the second of a pair gets PAIRED at once. The token of WAITING lets a client that lost
its connection take back its place. Nobody proves anything: who knows a name is its owner.

Times are seconds of any one clock, given by the caller.
"""

from __future__ import annotations

import ipaddress
import struct
import uuid
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from fmi_client.errors import ProtocolError, RendezvousError
from fmi_client.protocol.addresses import Address

MAX_NAME = 100

QUIET_SECONDS = 0.05
"""A name of version 1 has no end: it is complete when nothing has followed for this long."""

MAX_WAITING = 50_000

PATIENCE = 300.0
"""Seconds after which version 2 is told TIMEOUT and may come back, as in the fork's image."""

_ADDRESS = struct.Struct("!4sH2x")
_REQUEST = struct.Struct(f"!{MAX_NAME}s37s4x")
_RESPONSE = struct.Struct("!B4sH4sH37s")
# 50 bytes. The fork's document says 51; its structs, its server and its later clients say 50.

_NOWHERE = ("0.0.0.0", 0)
_NO_TOKEN = uuid.UUID(int=0)


class Status(IntEnum):
    """The first byte of a version 2 response."""

    WAITING = 0
    PAIRED = 1
    TIMEOUT = 2
    ERROR = 3


class Request(NamedTuple):
    """What a client of TCPunch sends first: which name it wants to meet its peer under."""

    version: int
    name: bytes
    token: uuid.UUID | None = None
    """The place to take back (version 2)."""


class NameReader:
    """Collects the bytes in which a client says whom it wants to meet."""

    def __init__(self) -> None:
        self._data = b""

    @property
    def version(self) -> int:
        """A zero byte where a name must have ended makes it 2: version 1 sends none."""
        return 2 if 0 in self._data[: MAX_NAME + 1] else 1

    def receive(self, data: bytes) -> Request | None:
        """Take bytes; returns the request when it is complete without doubt.

        Raises:
            ProtocolError: these bytes are no request: send `refusal(version)`, and close.
        """
        self._data += data
        if self.version == 1 and len(self._data) > MAX_NAME:
            raise ProtocolError(f"a name of more than {MAX_NAME} bytes")
        if self.version == 1 or len(self._data) < _REQUEST.size:
            return None
        request = _decode(self._data[: _REQUEST.size])
        if len(self._data) > _REQUEST.size:
            raise ProtocolError("bytes after the request")
        return request

    def quiet(self) -> Request | None:
        """Nothing has come for QUIET_SECONDS: returns the request if that completes it."""
        return Request(1, self._data) if self.version == 1 else None


def _decode(data: bytes) -> Request:
    name, token = (field.split(b"\0", 1)[0] for field in _REQUEST.unpack(data))
    try:
        name.decode()
        return Request(2, name, uuid.UUID(token.decode()) if token else None)
    except ValueError:
        raise ProtocolError("a name or token that is none") from None


def ipv4(host: str) -> ipaddress.IPv4Address | None:
    """Return an address as these clients can be told of it, or None.

    Args:
        host: as a socket reports it, which may be IPv6 that holds IPv4 ("::ffff:192.0.2.1").
    """
    address = ipaddress.ip_address(host)
    return address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else address


def encode_address(address: Address) -> bytes:
    """Return the 8 bytes by which version 1 tells an address."""
    return _ADDRESS.pack(ipaddress.IPv4Address(address[0]).packed, address[1])


def encode_response(
    status: Status, own: Address, peer: Address = _NOWHERE, token: uuid.UUID = _NO_TOKEN
) -> bytes:
    """Return the 50 bytes of a version 2 response."""
    hosts = [ipaddress.IPv4Address(address[0]).packed for address in (own, peer)]
    return _RESPONSE.pack(status, hosts[0], own[1], hosts[1], peer[1], str(token).encode())


def refusal(version: int) -> bytes:
    """Return what a client is told before it is cut off: version 1 has no words for it."""
    return encode_response(Status.ERROR, _NOWHERE) if version == 2 else b""


@dataclass(slots=True, eq=False)
class Client:
    """Somebody who wants to meet. `connection` is the caller's own handle to it."""

    request: Request
    address: Address
    connection: Hashable
    token: uuid.UUID = _NO_TOKEN
    until: float = 0.0

    @property
    def key(self) -> tuple[int, bytes]:
        """Who has the same is the peer."""
        return self.request.version, self.request.name

    def told(self, status: Status, peer: Address = _NOWHERE) -> bytes:
        return encode_response(status, self.address, peer, self.token)


class Reply(NamedTuple):
    """What to write to a client, and whether to close then."""

    client: Client
    data: bytes
    last: bool = False


class Pool:
    """Who waits for whom: at most one client under each name.

    Args:
        ttl: seconds that a client may wait; version 2 no longer than PATIENCE.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._waiting: dict[tuple[int, bytes], Client] = {}
        self.pairs = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, client: Client, now: float) -> tuple[Client | None, list[Reply]]:
        """Take in a client; returns its peer, if it was there, and what both are told.

        Raises:
            RendezvousError: too many wait already.
        """
        wait = self._ttl if client.request.version == 1 else min(self._ttl, PATIENCE)
        client.until, client.token = now + wait, uuid.uuid4()
        other = self._waiting.pop(client.key, None)
        if other is not None and other.token != client.request.token:
            self.pairs += 1
            return other, _introduce(client, other)
        replies = []
        if other is not None:  # the same client again: its old connection is of no use
            client.token = other.token
            replies += _dismiss([other])
        if len(self._waiting) >= MAX_WAITING:
            raise RendezvousError(f"{MAX_WAITING} clients wait already")
        self._waiting[client.key] = client
        return None, [*replies, _greet(client)]

    def leave(self, client: Client) -> bool:
        """Forget a client whose connection ended; returns whether it was waiting."""
        if self._waiting.get(client.key) is not client:
            return False
        del self._waiting[client.key]
        return True

    def expire(self, now: float) -> list[Reply]:
        """Send away who has waited too long."""
        over = [client for client in self._waiting.values() if client.until <= now]
        for client in over:
            del self._waiting[client.key]
        return _dismiss(over)


def _greet(client: Client) -> Reply:
    if client.request.version == 1:
        return Reply(client, encode_address(client.address))
    return Reply(client, client.told(Status.WAITING))


def _introduce(client: Client, other: Client) -> list[Reply]:
    """Tell both: the one who comes, and the one who waited."""
    if client.request.version == 1:
        own, peer = encode_address(client.address), encode_address(other.address)
        return [Reply(other, own, last=True), Reply(client, own + peer, last=True)]
    return [
        Reply(other, other.told(Status.PAIRED, client.address), last=True),
        Reply(client, client.told(Status.PAIRED, other.address), last=True),
    ]


def _dismiss(clients: Iterable[Client]) -> list[Reply]:
    """Version 2 comes back when told so; version 1 only sees the end."""
    return [
        Reply(each, each.told(Status.TIMEOUT) if each.request.version == 2 else b"", last=True)
        for each in clients
    ]
