"""What a rank says of itself when it joins, and the fields that other messages share with it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from fmi_client.errors import ProtocolError
from fmi_client.protocol import auth, frames
from fmi_client.protocol.addresses import Address, plain
from fmi_client.protocol.frames import Message

MAX_JOB_NAME = 256
MAX_SIZE = 100_000
MAX_CANDIDATES = 8

MAX_CERTIFICATE = 1024
"""Bytes of a rank's certificate; ours have less than 400."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a rank says of itself when it joins."""

    job: str
    size: int
    rank: int
    epoch: int
    expires: int
    """Expiry of its token in Unix seconds, or 0 where it has none."""
    candidates: tuple[Address, ...]
    """The rank's own addresses; the first is the local end of this connection."""
    nonce: bytes
    identity: bytes = b""
    """Random bytes that stay the same while the rank lives, known to it and the server: who comes
    with them again is the same rank. Empty from older clients."""
    run: bytes = b""
    """Where it was in a job before and lost its server: the name of that run, from "welcome"."""
    began: bool = False
    """Whether it heard "ready" then: it may have links already."""
    seen: Address | None = None
    """Where it comes from, if another server carries its words to us."""
    certificate: bytes = b""
    """What it encrypts its links with, as DER; empty: nothing is encrypted."""

    def encode(self) -> Message:
        again = {"run": self.run, "began": self.began} if self.run else {}
        more = {"self": self.identity, "seen": list(self.seen or ()), "cert": self.certificate}
        return self._first() | again | {name: value for name, value in more.items() if value}

    def _first(self) -> Message:
        return {
            "t": "hello",
            "v": frames.VERSION,
            "job": self.job,
            "size": self.size,
            "rank": self.rank,
            "epoch": self.epoch,
            "exp": self.expires,
            "at": [list(address) for address in self.candidates],
            "nonce": self.nonce,
        }

    @classmethod
    def decode(cls, message: Message) -> Hello:
        if message["t"] != "hello" or message.get("v") != frames.VERSION:
            raise ProtocolError(f"expected hello of version {frames.VERSION}")
        size = frames.field(message, "size", int, low=1, high=MAX_SIZE)
        return cls(
            job=frames.field(message, "job", str, low=1, high=MAX_JOB_NAME),
            size=size,
            rank=frames.field(message, "rank", int, high=size - 1),
            epoch=frames.field(message, "epoch", int, high=2**31),
            expires=frames.field(message, "exp", int),
            candidates=read_addresses(message, "at"),
            nonce=sixteen(message, "nonce"),
            identity=sixteen(message, "self") if "self" in message else b"",
            run=sixteen(message, "run") if "run" in message else b"",
            began=frames.field(message, "began", bool) if "run" in message else False,
            seen=read_address(message["seen"]) if "seen" in message else None,
            certificate=cert(message),
        )


def read_addresses(message: Message, name: str, low: int = 1) -> tuple[Address, ...]:
    """Read a list of at least `low` addresses."""
    pairs = frames.field(message, name, list, low=low, high=MAX_CANDIDATES + 1)
    return tuple(read_address(pair) for pair in pairs)


def read_address(pair: object) -> Address:
    """Read one address.

    Raises:
        ProtocolError: it is not a pair of IP address and port.
    """
    match pair:
        case [str(host), int(port)] if port is not True and 0 < port < 65536:
            # A name would be looked up by whoever connects there, at our command.
            with contextlib.suppress(ValueError):
                return plain(host), port
    raise ProtocolError("an address must be a pair of IP address and port")


def cert(message: Message) -> bytes:
    """Read a rank's certificate, as a hello and "punch" carry it; empty where it has none."""
    if "cert" not in message:
        return b""
    certificate: bytes = frames.field(message, "cert", bytes, low=1, high=MAX_CERTIFICATE)
    return certificate


def sixteen(message: Message, name: str) -> bytes:
    """Return a field of 16 random bytes: a nonce, cookie, ticket or name of a run."""
    value: bytes = frames.field(message, name, bytes, low=auth.NONCE_BYTES, high=auth.NONCE_BYTES)
    return value
