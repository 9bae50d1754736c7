"""Frames between a rank and the rendezvous server: a length, then one msgpack map.

Protocol version 3 opens with one zero byte, which no client of the older protocols can
send first. After it, both sides send frames::

    length   uint32, big-endian, of what follows
    body     msgpack map with string keys; key "t" names the message

A frame longer than the limit is refused from its length alone, before it is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack

from fmi_client.errors import ProtocolError

PREFACE = b"\x00"
"""First byte of a version 3 connection."""

VERSION = 3

MAX_FRAME_BEFORE_AUTH = 4096
"""Bytes of one frame that a stranger may make us hold."""

MAX_FRAME = 64 * 1024
"""Bytes of one frame after authentication: a bitmap of 100,000 ranks, a long abort reason."""

BYTES_PER_ITEM = 64
"""A list may have as many items as its frame may have times so many bytes. msgpack makes a list
before it reads the items, and 1,024 of them in each other: 4 KiB of a stranger cost 33 MB."""

_LENGTH = struct.Struct("!I")

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """Return `message` as one frame."""
    body = msgpack.packb(message, use_bin_type=True)
    return _LENGTH.pack(len(body)) + bytes(body)


class FrameReader:
    """Splits a byte stream into messages; never holds more than one frame beyond its input."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._buffer = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes that have come of frames that are not complete, or not asked for."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[Message, bytes]]:
        """Yield each complete message with its raw body, which MACs are computed over.

        Raises:
            ProtocolError: a frame is over the limit or is not a msgpack map with a type.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self.limit:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {self.limit}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _decode(body, self.limit // BYTES_PER_ITEM), body


def _decode(body: bytes, most: int) -> Message:
    try:
        message = msgpack.unpackb(
            body, raw=False, strict_map_key=True, max_ext_len=0, max_array_len=most
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a frame is not valid msgpack: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise ProtocolError("a frame is not a map with a message type")
    return message


def field(message: Message, name: str, kind: type, *, low: int = 0, high: int = 2**63) -> Any:
    """Return ``message[name]`` if it is of type `kind` (and within bounds, for integers).

    For text and bytes, `high` bounds the length.

    Raises:
        ProtocolError: it is missing, of another type, or out of bounds.
    """
    value = message.get(name)
    # bool is an int in Python, but not on the wire.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(f"{message['t']}: field {name!r} must be of type {kind.__name__}")
    measure = value if isinstance(value, int) else len(value)  # type: ignore[arg-type]
    if not low <= measure <= high:
        raise ProtocolError(f"{message['t']}: field {name!r} is out of bounds")
    return value


def pack_ranks(ranks: Iterable[int], size: int) -> bytes:
    """Return a set of ranks as a bitmap: 10,000 ranks are 1,250 bytes."""
    bitmap = bytearray((size + 7) // 8)
    for rank in ranks:
        bitmap[rank // 8] |= 1 << rank % 8
    return bytes(bitmap)


def unpack_ranks(bitmap: bytes) -> list[int]:
    """Return the ranks of a bitmap in order."""
    return [8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1]
