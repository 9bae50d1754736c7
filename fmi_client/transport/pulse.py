"""Whether the other end of a connection still answers, where TCP's keepalive does not look.

The kernel probes a connection on which nothing is under way. Where data is, it repeats that for
a quarter of an hour. TCP_USER_TIMEOUT would end this, but also a connection whose peer computes
for so long that its window stays closed, which is no fault. So we ask the kernel what it knows;
it has kept account also while this process computed.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
from typing import NamedTuple

CHECK_SECONDS = 1.0
"""How often a rank that waits looks at the links that it waits for."""

SILENT_SECONDS = 8.0
"""Data that was repeated for so long without an answer was sent into a hole."""

ANSWER_SECONDS = 2.0
"""An answer takes no longer than this."""

CLOSED_SECONDS = 11.0
"""A peer with a closed window sends keepalives, every five seconds; its kernel does, whatever
its process is at. So long without any, and it is gone."""

_INFO = struct.Struct("=2xBxB3xI12xI16xI8xI")  # to tcpi_last_ack_recv; see linux/tcp.h
_SEGMENTS_IN = 140  # and tcpi_notsent_bytes behind it
_BYTES = 148


class Info(NamedTuple):
    """What the kernel knows of a connection; times in seconds."""

    repeats: int
    """Times that the oldest data was sent again, since anything was acknowledged."""
    backoff: int
    wait: float
    """From the last repeat to the next; doubled each time."""
    unanswered: int
    """Segments on their way."""
    sent_ago: float
    heard_ago: float
    segments_in: int
    not_sent: int
    """Bytes for which the peer's window had no room."""

    @classmethod
    def of(cls, sock: socket.socket) -> Info | None:
        """Ask the kernel; None if it is too old to know (before Linux 4.6)."""
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
        if len(data) < _BYTES:
            return None
        repeats, backoff, wait, unanswered, sent, heard = _INFO.unpack_from(data)
        segments, not_sent = struct.unpack_from("=II", data, _SEGMENTS_IN)
        return cls(
            repeats, backoff, wait / 1e6, unanswered, sent / 1e3, heard / 1e3, segments, not_sent
        )

    @property
    def lost(self) -> bool:
        """Whether what is on its way was repeated for long, and not even refused."""
        since = self.wait - self.wait / 2**self.backoff + self.sent_ago
        unheard = ANSWER_SECONDS <= self.sent_ago < self.heard_ago
        return self.repeats > 0 and unheard and since >= SILENT_SECONDS


class Pulse:
    """Watches one connection; `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._segments = -1
        self._since = 0.0

    def lost(self, sock: socket.socket, now: float) -> bool:
        """Whether the peer, or the way to it, is gone."""
        info = Info.of(sock)
        if info is None:
            return False
        return info.lost or self._silent(info, now, sock)

    def _silent(self, info: Info, now: float, sock: socket.socket) -> bool:
        """The peer's window is closed: does it still send keepalives?

        Not if it has data for us that we do not take: then it waits, as we do.
        """
        closed = info.not_sent > 0 and info.unanswered == 0 and not _unread(sock)
        if not closed or info.segments_in != self._segments:
            self._segments = info.segments_in if closed else -1
            self._since = now
        return now - self._since >= CLOSED_SECONDS


def _unread(sock: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]
