"""TLS without any I/O: encrypted bytes in and out, plain ones at the other side.

All cryptography is that of the standard library's `ssl`. A `TlsStream` is one connection, to the
server or between two ranks; who may be at its other end is a matter of its context.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

from fmi_client.errors import AuthenticationFailed, ProtocolError

FIRST_BYTE = b"\x16"
"""How every TLS connection begins (RFC 8446, 5.1: a handshake record); no other protocol of the
server's port begins so."""

SCHEME = "tls://"
"""What stands before a server's address where everything shall be encrypted."""

WANTS_TLS = "this server wants TLS: give its address as tls://HOST:PORT"
"""What it says to a rank that comes in plain."""

_READ = 16 * 1024  # of a record, TLS's own bound


class Pinned(NamedTuple):
    """What a link is encrypted with: each rank trusts exactly the other's certificate."""

    context: ssl.SSLContext
    """It trusts `theirs` and nothing else, and shows `mine`."""
    mine: bytes
    theirs: bytes


class TlsStream:
    """One connection, from the first byte of its TLS handshake.

    Args:
        context: whom to trust, and what to show.
        host: the name that the server's certificate must have; None: we are the server, or the
            context trusts one certificate only.
    """

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool = False, host: str | None = None
    ) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side, host)
        self._early = bytearray()
        self._failed = self._over = False
        self.established = False
        """Whether the handshake is over, as far as we are concerned."""
        self._shake_hands()

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the other side; returns what they say.

        Raises:
            AuthenticationFailed: it is not whom the context trusts.
            ProtocolError: it speaks no TLS, or somebody has changed its bytes.
        """
        if self._over:
            raise ProtocolError("TLS: there is more after its end")
        with self._errors():
            self.feed(data)
            self._shake_hands()
            parts = []
            while self.established and (part := self._read()):
                parts.append(part)
            return b"".join(parts)

    def send(self, data: bytes | bytearray) -> None:
        """Encrypt, now or when the handshake is over; `take` returns what to write."""
        if self._failed:
            return
        if not self.established:
            self._early += data
            return
        view = memoryview(data)
        while view:
            view = view[self.write(view) :]

    def take(self) -> bytes:
        """Return the bytes to write that have come together."""
        return self._out.read()

    @property
    def certificate(self) -> bytes:
        """The other side's, as DER; empty where it has shown none."""
        return self._tls.getpeercert(binary_form=True) or b""

    # ------------------------------------------------- for large data, after the handshake
    def feed(self, data: bytes) -> None:
        """Take bytes of the other side; `read_into` decrypts them."""
        self._in.write(data)

    def read_into(self, room: memoryview) -> int:
        """Decrypt what is there, as far as there is room; returns how many bytes that are.

        Raises:
            ssl.SSLError: the other side has ended the connection, or somebody changed its bytes.
        """
        filled = 0
        try:
            while filled < len(room):
                # Into a buffer, it returns how much it has read.
                got = cast(int, self._tls.read(len(room) - filled, room[filled:]))
                if got == 0:
                    raise ssl.SSLZeroReturnError("the other side has ended TLS")
                filled += got
        except ssl.SSLWantReadError:
            pass
        return filled

    @property
    def buffered(self) -> bool:
        """Whether there is more of what was fed, perhaps not a whole record."""
        return self._tls.pending() > 0 or self._in.pending > 0

    def write(self, data: memoryview) -> int:
        """Encrypt one record; returns how many bytes of `data` are in it."""
        return self._tls.write(data)

    # --------------------------------------------------------------------------- inside
    def _shake_hands(self) -> None:
        if self.established:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        self.established = True
        early, self._early = self._early, bytearray()
        self.send(early)

    def _read(self) -> bytes:
        try:
            data = self._tls.read(_READ)
        except ssl.SSLWantReadError:
            return b""
        self._over = not data  # nothing is read any more: what came would only be kept
        return data

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            self._failed = True
            raise AuthenticationFailed(f"TLS: {error.verify_message}") from None
        except ssl.SSLError as error:
            self._failed = True
            why = (error.reason or "malformed").lower().replace("_", " ")
            raise ProtocolError(f"TLS: {why}") from None
