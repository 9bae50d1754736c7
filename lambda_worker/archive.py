"""The parts of a `torch.save` file, found from its two ends, so that it may be in S3.

Such a file, as PyTorch writes it since 1.6, is a zip archive (APPNOTE.TXT 4.3, PKWARE) of
uncompressed parts: a pickle that describes what was saved (`inert`), and one part of raw numbers
for each storage of a tensor. Nothing in it is believed: every number is checked against the file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

EDGE = 4096  # bytes at either end that are read at once; a dataset's directory takes some 700
LIMIT = 1 << 20  # bytes of the directory; the published model's takes 50,000
ZIP = b"PK\x03\x04"
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: until 1.5
AGAIN = "save it again with torch.save"

Read = Callable[[int, int], bytes]
"""Exactly so many bytes of the file from an offset, both within it."""


class FormatError(ValueError):
    """The file cannot be used; the text says why, but not which file."""


class Damaged(FormatError):
    """The file is truncated or damaged, or was forged."""

    def __init__(self, what: str) -> None:
        super().__init__(f"truncated or damaged: {what}; copy it or save it again")


class Refused(FormatError):
    """The file holds something that is not obeyed; `kind` is what it was expected to hold."""

    def __init__(self, what: str, kind: str) -> None:
        super().__init__(f"refused, it holds something else than {kind}: {what}")


class Unusual(ValueError):
    """The file may be good, but is not laid out as `torch.save` does it now.

    The text says why, and what would mend it.
    """


class Entry(NamedTuple):
    """A part of the archive: offset of its header, and of what follows the part."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int
    end: int


class Archive:
    """A file's directory.

    Args:
        size: of the file, bytes.
        read: gives bytes of the file; called for its two edges, and seldom more.

    Raises:
        FormatError, Unusual.
    """

    def __init__(self, size: int, read: Read) -> None:
        if not size:
            raise Damaged("it is empty")
        self._size, self._read = size, read
        self._head = read(0, min(size, EDGE))
        if self._head.startswith(OLD):
            raise Unusual(f"it has PyTorch's old format: {AGAIN}")
        if not self._head.startswith(ZIP):
            raise FormatError(
                f"not a .pt file as PyTorch writes it since 1.6 (a zip archive): {AGAIN}"
            )
        self._tail = read(max(size - EDGE, 0), min(size, EDGE)) if size > EDGE else self._head
        self._entries = self._directory()
        names = [name for name in self._entries if re.fullmatch("[^/]+/data.pkl", name)]
        if len(names) != 1:
            raise FormatError("not a .pt file: a zip archive without a single data.pkl")
        self._folder = names[0].removesuffix("data.pkl")
        self._check_byte_order()

    def entry(self, name: str) -> Entry:
        """A part, by its name below the archive's folder: "data.pkl", "data/0".

        Raises:
            Damaged: it is missing.
        """
        try:
            return self._entries[self._folder + name]
        except KeyError:
            raise Damaged(f"its part {printable(name)} is missing") from None

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A part's bytes, checked against its checksum.

        Raises:
            FormatError: missing, damaged, or longer than `limit` bytes. Unusual: see `start`.
        """
        entry = self.entry(name)
        if limit is not None and entry.size > limit:
            raise FormatError(f"its part {printable(name)} has more than {limit:,} bytes")
        data = self._get(self.start(entry), entry.size)
        if zlib.crc32(data) != entry.crc:
            raise Damaged(f"wrong checksum of {printable(name)}")
        return data

    def start(self, entry: Entry) -> int:
        """Offset of a part's data in the file; its header says how long it is itself.

        Raises:
            Damaged. Unusual: it is compressed, or laid out in another way.
        """
        if entry.method or entry.packed != entry.size or entry.flags & 1:
            raise Unusual(f"its parts are compressed: {AGAIN}")
        name = entry.name.encode("latin-1")
        header = self._get(entry.header, 30 + len(name))
        kind, length, extra = struct.unpack("<4s22x2H", header[:30])
        if kind != ZIP or header[30 : 30 + length] != name:
            raise Damaged(f"no header of {printable(entry.name)} where it should be")
        start: int = entry.header + 30 + length + extra
        # What follows the data: nothing, or checksum and sizes once more. This is checked because
        # a wrong length in the header would shift all numbers, and a part of them has no checksum.
        large = max(entry.size, entry.header) >= 0xFFFFFFFF
        after = (24 if large else 16) if entry.flags & 8 else 0
        if start + entry.size + after != entry.end:
            raise Unusual(f"it is not laid out as torch.save does it: {AGAIN}")
        return start

    def _check_byte_order(self) -> None:
        # There since torch 2.1; before, all were little.
        known = f"{self._folder}byteorder" in self._entries
        order = self.read("byteorder", 100) if known else b"little"
        if order == b"big":
            raise Unusual("its numbers are big-endian: save it again on this machine")
        if order != b"little":
            raise Damaged(f"byte order {order[:20]!r}")

    def _get(self, offset: int, length: int) -> bytes:
        """Bytes of the file, out of an edge if possible."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise Damaged("it points to a place outside of it")
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        at = offset - (self._size - len(self._tail))
        return self._tail[at : at + length] if at >= 0 else self._read(offset, length)

    def _directory(self) -> dict[str, Entry]:
        count, length, start = _end(self._tail, self._size, self._get)
        if length > LIMIT or count * 46 > length:
            raise Damaged(f"a zip directory of {count} parts in {length} bytes")
        entries = _entries(self._get(start, length), count, start)
        if len({entry.name for entry in entries}) != count:
            raise Damaged("two parts have one name")
        if sum(entry.packed for entry in entries) > self._size:
            raise Damaged("its parts claim more bytes than the file has")
        return {entry.name: entry for entry in entries}


def _end(tail: bytes, size: int, get: Read) -> tuple[int, int, int]:
    """Number of parts, and length and offset of the directory, from the end of the file."""
    at = tail.rfind(b"PK\x05\x06", 0, max(len(tail) - 18, 0))
    if at < 0:
        raise Damaged("no zip directory at its end")
    count, length, start = struct.unpack("<10xH2L2x", tail[at : at + 22])
    end = size - len(tail) + at
    locator = get(end - 20, 20) if end >= 20 else b""
    if locator.startswith(b"PK\x06\x07"):
        end = struct.unpack("<8xQ4x", locator)[0]
        large = get(end, 56)
        if not large.startswith(b"PK\x06\x06"):
            raise Damaged("no large zip directory where it should be")
        count, length, start = struct.unpack("<32x3Q", large)
    if start + length != end:
        raise Damaged("its zip directory is not where it should be")
    return count, length, start


def _entries(data: bytes, count: int, start: int) -> list[Entry]:
    """The directory's entries, in the order in which the parts stand in the file."""
    found, at = [], 0
    for _ in range(count):
        entry, at = _entry(data, at)
        found.append(entry)
    found.sort(key=lambda entry: entry.header)
    ends = [*(entry.header for entry in found), start][1:]
    return [entry._replace(end=end) for entry, end in zip(found, ends, strict=True)]


def _entry(data: bytes, at: int) -> tuple[Entry, int]:
    fixed = data[at : at + 46]
    if len(fixed) < 46 or not fixed.startswith(b"PK\x01\x02"):
        raise Damaged("its zip directory is damaged")
    fields = struct.unpack("<8x2H4x3L3H8xL", fixed)
    flags, method, crc, packed, size, name_length, extra_length, comment, header = fields
    place = at + 46 + name_length
    name = data[at + 46 : place].decode("latin-1")  # whatever its encoding
    extra = data[place : place + extra_length]
    size, packed, header = _large(extra, [size, packed, header])
    end = place + extra_length + comment
    if end > len(data):
        raise Damaged("its zip directory is damaged")
    return Entry(name, flags, method, crc, packed, size, header, 0), end


def _large(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that do not fit into 32 bits from the extra field (kind 1)."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [
                number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])
            ]
            return [wide.pop(0) if v == 0xFFFFFFFF and wide else v for v in values]
        extra = extra[4 + length :]
    return values


def printable(text: str, limit: int = 100) -> str:
    """Text of a stranger's for a message: short, on one line, without control characters."""
    kept = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in kept)
