"""Tokens and message authentication codes: who may join a job, and who is who.

Two secrets, neither of which crosses the wire:

* the *server secret* is known to the server and to whoever starts jobs. From it, a job,
  its size and an expiry follow the job's *admission key*; the token that ranks carry is
  that key with its expiry. The server stores nothing.
* the *job key*, 32 random bytes, is known to the job's ranks only. The server cannot
  speak for a rank.

HMAC-SHA-256 throughout (RFC 2104). Every input is length-prefixed, so that no two
different lists of inputs give the same bytes; every code covers a label that names its
purpose and role.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import math
import os
import struct
from dataclasses import dataclass, field
from hashlib import sha256

NONCE_BYTES = 16
MAC_BYTES = 32
KEY_BYTES = 32
COOKIE_BYTES = 16

MAX_EXPIRES = 2**63
"""What the wire has room for."""

ANONYMOUS = b""
"""The admission key where the server admits anybody: proves nothing, keeps one handshake."""


def nonce() -> bytes:
    """Return fresh randomness; made per handshake, as a restored snapshot must not reuse it."""
    return os.urandom(NONCE_BYTES)


def mac(key: bytes, label: str, *parts: bytes) -> bytes:
    """Return the 32-byte code of `parts` for the purpose `label`."""
    digest = hmac.new(key, digestmod=sha256)
    for part in (label.encode(), *parts):
        digest.update(struct.pack("!Q", len(part)))
        digest.update(part)
    return digest.digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(left, right)


def admission_key(server_secret: bytes, job: str, size: int, expires: int) -> bytes:
    """Return the key that admits ranks to `job` of `size` ranks until `expires` (Unix s)."""
    return mac(server_secret, "fmi3 admission", job.encode(), b"%d" % size, b"%d" % expires)


def carrier_key(server_secret: bytes) -> bytes:
    """Return the key by which servers of one secret know each other.

    Who has it may speak for ranks that it has let in itself.
    """
    return mac(server_secret, "fmi3 carrier")


@dataclass(frozen=True, slots=True)
class Token:
    """What a rank carries to be admitted: the admission key and its expiry (Unix seconds)."""

    expires: int
    key: bytes = field(repr=False)

    def encode(self) -> str:
        """Return the text form, ``fmi3.<expires>.<key in URL-safe base64>``."""
        return f"fmi3.{self.expires}.{base64.urlsafe_b64encode(self.key).decode().rstrip('=')}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read the text form.

        Raises:
            ValueError: it is not such a text (the text itself is not repeated: it is secret).
        """
        try:
            _, expires, key = text.strip().split(".")
            raw = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
            token = cls(int(expires), raw)
            # One text for each token: no junk that base64 skips, no underscores between digits.
            if len(raw) != MAC_BYTES or not 0 < token.expires < MAX_EXPIRES:
                raise ValueError("wrong length, or no time")
            if token.encode() != text.strip():
                raise ValueError("written in another way")
            return token
        except (ValueError, binascii.Error):
            raise ValueError(
                "the token is not of the form fmi3.<expires>.<key>; make it with make_token()"
            ) from None


def make_token(server_secret: bytes | str, *, job: str, size: int, expires: float) -> str:
    """Return the token that admits the `size` ranks of `job` to the server.

    Args:
        server_secret: the server's secret, as in its ``--secret-file``; white space at the
            end (the file's last line feed) does not count, there as here.
        job: the job's name, as given to ``connect``.
        size: the job's number of ranks.
        expires: Unix time in seconds from which the server refuses the token.

    Returns:
        ``fmi3.<expires>.<key in URL-safe base64>``: a secret, as it admits whoever has it.

    Raises:
        ValueError: the server's secret is empty.
    """
    secret = server_secret.encode() if isinstance(server_secret, str) else bytes(server_secret)
    secret = secret.rstrip()
    if not secret:
        raise ValueError("the server secret is empty")
    until = math.ceil(expires)
    return Token(until, admission_key(secret, job, size, until)).encode()


def parse_key(key: bytes | str | None) -> bytes | None:
    """Return a job key as 32 bytes, from 32 bytes or 64 hexadecimal digits.

    Raises:
        ValueError: it is neither.
    """
    if key is None:
        return None
    try:
        raw = bytes.fromhex(key) if isinstance(key, str) else bytes(key)
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ValueError("the job key must be 32 bytes, or 64 hexadecimal digits in FMI_KEY")
    return raw
