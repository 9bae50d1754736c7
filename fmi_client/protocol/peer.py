"""Between two ranks: the handshake on a fresh connection, then messages.

Handshake, the same whoever connected (both may have: TCP's simultaneous open)::

    hello    "FMI3", from, to, epoch: uint32, keyed: uint8, nonce: 16 bytes
    proof    32 bytes: HMAC over the role (low or high rank) and both hellos
    pick     the lower rank, on the one connection that it keeps
    picked   the higher rank's answer; only now may data flow

The proof's key mixes the job key (if there is one) with the job's name and the cookie that the
server gave to this pair: a rank recognises its peer by proof, never by address, and a stranger,
another job's rank or the rank itself fails it. Everything is of fixed size: no parser of a
peer's data runs before the proof.

A message is a 32-byte header, then signature, meta and payload::

    kind uint8 · flags uint8 · signature length uint16 · meta length uint32
    context uint64 · sequence or tag uint64 · payload length uint64

`signature` says what the sender is doing ("allreduce sum <f4 (10,)"); the receiver
compares it with its own, so that ranks which call different things find out. Where each
waits for the other, no message would tell: who has waited for a while says in what (`WAITING`).

Where ranks have certificates (`tls`), all that follows the hellos is inside TLS 1.3, whose
client is the lower rank. The proof's key then mixes in both certificates: whoever swaps them,
the server included, is found out unless it has the job key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from fmi_client.errors import AuthenticationFailed, ProtocolError
from fmi_client.protocol import auth
from fmi_client.protocol.tls import Pinned, TlsStream

_HELLO = struct.Struct("!4sIIIB16s")
_MAGIC = b"FMI3"
HELLO_BYTES = _HELLO.size
_PICK = b"P"
_PICKED = b"K"


class PeerHello(NamedTuple):
    """Who is calling: read before anything is proven, so good for look-up only."""

    sender: int
    receiver: int
    epoch: int
    keyed: bool


def read_hello(data: bytes) -> PeerHello:
    """Read a hello.

    Raises:
        ProtocolError: the caller speaks something else.
    """
    magic, sender, receiver, epoch, keyed, _ = _HELLO.unpack(data)
    if magic != _MAGIC or keyed > 1:
        raise ProtocolError("not a rank")
    return PeerHello(sender, receiver, epoch, bool(keyed))


class Handshake:
    """Proof and choice on one connection between ranks `me` and `peer`.

    The name is in the proof for those who use one key for several jobs: a hostile server could
    give their ranks one cookie.

    Args:
        tls: what to encrypt with all but the hellos; None: nothing is encrypted.
    """

    def __init__(
        self,
        me: int,
        peer: int,
        epoch: int,
        key: bytes | None,
        cookie: bytes,
        job: str = "",
        tls: Pinned | None = None,
    ) -> None:
        self.low = me < peer
        self._pinned = tls
        self.stream: TlsStream | None = None
        """TLS, once the peer's hello was read; it goes on after the handshake."""
        self._expect = PeerHello(peer, me, epoch, key is not None)
        parts = (job.encode(), cookie, *self._certificates())
        self._key = auth.mac(key or b"", "fmi3 pair", *parts)
        self.hello = _HELLO.pack(_MAGIC, me, peer, epoch, key is not None, auth.nonce())
        self._theirs = b""
        self._buffer = bytearray()
        self.outgoing = bytearray(self.hello)
        self.proven = False
        self.complete = False
        """Both sides chose this connection; `rest()` holds what came after."""

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer; watch `outgoing`, `proven` and `complete`.

        Raises:
            AuthenticationFailed: this is not the peer we expect.
            ProtocolError: it is, but does not keep to the protocol.
        """
        self._buffer += self.stream.receive(data) if self.stream else data
        if not self._theirs and len(self._buffer) >= HELLO_BYTES:
            self._check_hello(self._take(HELLO_BYTES))
        if self._theirs and not self.proven and len(self._buffer) >= auth.MAC_BYTES:
            self._check_proof(self._take(auth.MAC_BYTES))
        if self.proven and not self.complete and self._buffer:
            self._check_choice(self._take(1))
        self._say(b"")  # what TLS has to say by itself

    def pick(self) -> None:
        """Choose this connection (the lower rank does)."""
        self._say(_PICK)

    def rest(self) -> bytes:
        """Return bytes that followed the handshake: the first messages."""
        return self._take(len(self._buffer))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _check_hello(self, data: bytes) -> None:
        if read_hello(data) != self._expect:
            raise AuthenticationFailed("a stranger, or a rank of another job, epoch or key")
        self._theirs = data
        if self._pinned is not None:
            self.stream = TlsStream(self._pinned.context, server_side=not self.low)
            self._buffer = bytearray(self.stream.receive(self.rest()))
        self._say(self._proof(self.low))

    def _certificates(self) -> tuple[bytes, ...]:
        """Both, the lower rank's first; none where nothing is encrypted."""
        if self._pinned is None:
            return ()
        mine, theirs = self._pinned.mine, self._pinned.theirs
        return (mine, theirs) if self.low else (theirs, mine)

    def _say(self, data: bytes) -> None:
        if self.stream is not None:
            self.stream.send(data)
            data = self.stream.take()
        self.outgoing += data

    def _proof(self, of_low: bool) -> bytes:
        low, high = (self.hello, self._theirs) if self.low else (self._theirs, self.hello)
        return auth.mac(self._key, "fmi3 low" if of_low else "fmi3 high", low, high)

    def _check_proof(self, data: bytes) -> None:
        if self.stream and self._pinned and self.stream.certificate != self._pinned.theirs:
            raise AuthenticationFailed("the peer shows another certificate than the server told")
        if not auth.same(data, self._proof(not self.low)):
            raise AuthenticationFailed("the peer does not have this job's key")
        self.proven = True

    def _check_choice(self, data: bytes) -> None:
        if data != (_PICKED if self.low else _PICK):
            raise ProtocolError("unexpected byte in place of the choice of connection")
        if not self.low:
            self._say(_PICKED)
        self.complete = True


# -------------------------------------------------------------------------- messages

HEADER = struct.Struct("!BBHIQQQ")
HEADER_BYTES = HEADER.size

COLLECTIVE = 1
POINT_TO_POINT = 2
WAITING = 3
"""No message of an operation: its sender has waited for a while for ours of this collective."""

KINDS = (COLLECTIVE, POINT_TO_POINT, WAITING)

MAX_HEAD = 16 * 1024 * 1024
"""Signature and meta: a bundle of 100,000 small items describes itself in less."""

MAX_PAYLOAD = 1 << 40
"""Sanity bound; memory is taken as the bytes come, not when they are announced."""

Key = tuple[int, int, int]
"""What a receive matches: kind, context, and sequence number or tag."""

Buffer = bytes | bytearray | memoryview


class Payload(NamedTuple):
    """What travels: a description for the receiver, and the bytes in any number of pieces."""

    meta: bytes
    parts: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


def head(key: Key, signature: bytes, payload: Payload, nbytes: int) -> bytes:
    """Return all of a message that precedes its payload."""
    kind, context, number = key
    fixed = HEADER.pack(kind, 0, len(signature), len(payload.meta), context, number, nbytes)
    return fixed + signature + payload.meta
