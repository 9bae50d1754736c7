"""What the machine itself can do, for comparison: memory, and one TCP connection on loopback."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np

STREAM_BYTES = 256 << 20
COPY_BYTES = 64 << 20
ROUND_TRIPS = 2000


def measure() -> dict[str, float]:
    """Return bytes/s of a copy in memory and of a stream, and seconds of half a round trip."""
    return {
        "memcpy bytes/s": _memcpy(),
        "stream bytes/s": STREAM_BYTES / _with_child(_swallow, _pour),
        "hop s": _with_child(_echo, _ping) / ROUND_TRIPS / 2,
    }


def _memcpy() -> float:
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return COPY_BYTES / statistics.median(times)


def _with_child(
    theirs: Callable[[socket.socket], None], ours: Callable[[socket.socket], None]
) -> float:
    """Return the seconds of `ours`, with another process at the connection's other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            with socket.create_connection(listener.getsockname()) as sock:
                theirs(sock)
            os._exit(0)
        sock, _ = listener.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.perf_counter()
        ours(sock)
        seconds = time.perf_counter() - start
    os.waitpid(child, 0)
    return seconds


def _pour(sock: socket.socket) -> None:
    piece = bytes(1 << 20)
    for _ in range(STREAM_BYTES // len(piece)):
        sock.sendall(piece)
    sock.recv(1)


def _swallow(sock: socket.socket) -> None:
    room, left = memoryview(bytearray(1 << 20)), STREAM_BYTES
    while left > 0:
        left -= sock.recv_into(room)
    sock.send(b"!")


def _ping(sock: socket.socket) -> None:
    for _ in range(ROUND_TRIPS):
        sock.send(bytes(8))
        sock.recv(8)


def _echo(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := sock.recv(8):
        sock.send(data)
