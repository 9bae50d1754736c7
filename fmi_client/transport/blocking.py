"""What blocks, with deadlines, for checks that talk to whatever listens somewhere."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from fmi_client.protocol.addresses import Address
from fmi_client.transport.sockets import bound_socket

READ_BYTES = 4096
HTTP_BYTES = 8192

Result = TypeVar("Result")


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """Return what `work` returns, or raise what it raises.

    Raises:
        TimeoutError: it takes longer. It cannot be stopped: its thread dies with the process.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, name="in time", daemon=True).start()
    return future.result(seconds)


def connected(address: Address, port: int, deadline: float) -> socket.socket:
    """Connect to `address` from local `port` (0: a free one) until `deadline`, monotonic time.

    Raises:
        OSError: it cannot be reached; TimeoutError if it does not answer.
    """
    sock = bound_socket(port, socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        set_timeout(sock, deadline)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def give(sock: socket.socket, data: bytes, deadline: float) -> None:
    """Send all of `data`."""
    set_timeout(sock, deadline)
    sock.sendall(data)


def take(sock: socket.socket, deadline: float) -> bytes:
    """Read once, at most 4 KiB; nothing is the end."""
    set_timeout(sock, deadline)
    return sock.recv(READ_BYTES)


def set_timeout(sock: socket.socket, deadline: float) -> None:
    """Let what is done next end at `deadline`, monotonic time.

    Raises:
        TimeoutError: that has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def http_get(address: Address, path: str, port: int, deadline: float) -> tuple[bytes, Address]:
    """Ask an HTTP server for `path` from local `port`.

    Returns:
        The answer's body, whatever its status, and our end of the connection.

    Raises:
        OSError: no answer until `deadline`, or one of more than 8 KiB.
    """
    with connected(address, port, deadline) as sock:
        # In HTTP/1.0 the end of the connection is the end of the answer.
        give(sock, f"GET {path} HTTP/1.0\r\nHost: {address[0]}\r\n\r\n".encode(), deadline)
        answer = b""
        while data := take(sock, deadline):
            answer += data
            if len(answer) > HTTP_BYTES:
                raise OSError("the answer is too long")
        return answer.partition(b"\r\n\r\n")[2], sock.getsockname()[:2]
