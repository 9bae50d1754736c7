"""The server's connections without sockets, clocks and chance: the same input, the same bytes."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import structlog

from fmi_client.protocol import frames
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import ClientSide
from rendezvous_server.config import Config, read_networks
from rendezvous_server.connection import Connection
from rendezvous_server.legacy_connection import LegacyConnection
from rendezvous_server.server import Server

SECRET = b"a secret of the server"
NONCE = b"n" * 16
PEER = ("203.0.113.9", 4242)


@contextmanager
def steady() -> Iterator[None]:
    """Randomness that is counted: keys, tickets and challenges are the same in each run."""
    numbers = itertools.count(1)
    made = patch.object(os, "urandom", lambda size: next(numbers).to_bytes(size, "big"))
    with made, structlog.testing.capture_logs():
        yield


class NoSocket:
    """What a server asks of the socket below a transport."""

    def fileno(self) -> int:
        return -1

    def setsockopt(self, *option: object) -> None:
        pass


class Wire(asyncio.Transport):
    """The other end of a connection: gives bytes to its protocol, and keeps what it writes."""

    def __init__(self, address: Address = PEER) -> None:
        super().__init__()
        self.address = address
        self.protocol: Any = None
        self.written = b""
        self.ended = False
        self.paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.address, "socket": NoSocket()}.get(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self.ended

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.ended = True

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def feed(self, data: bytes, step: int) -> None:
        """Deliver bytes as a loop would: none once the connection is closed, or not read from."""
        for start in range(0, len(data), step):
            if not self.ended and not self.paused:
                self.protocol.data_received(data[start : start + step])

    def fall_quiet(self) -> None:
        """Nothing comes for so long that a name of TCPunch's version 1 is complete."""
        if isinstance(self.protocol, LegacyConnection) and not self.ended:
            self.protocol._on_quiet()


class Scene:
    """A server, and a job of two of which rank 1 is there."""

    def __init__(self, *, proxy: bool = False, legacy: bool = False) -> None:
        networks = read_networks(["0.0.0.0/0"] if legacy else [])
        self.server = Server(
            Config(
                *("127.0.0.1", 0, -1, SECRET, True, 600.0),
                proxy_protocol=proxy,
                legacy=networks,
            )
        )
        self.wires: list[Wire] = []
        self.proxy = proxy

    def connect(self) -> Wire:
        wire = Wire((PEER[0], PEER[1] + len(self.wires)))
        self.wires.append(wire)
        wire.protocol = Connection(self.server)
        wire.protocol.connection_made(wire)
        return wire

    def join(self, rank: int) -> Wire:
        """Let a rank in, and forget what was written to it."""
        wire = self.connect()
        side = ClientSide(hello(rank), None)
        for _ in range(2):
            wire.protocol.data_received(bytes(side.outgoing))
            side.outgoing.clear()
            side.receive(wire.written)
            wire.written = b""
        return wire

    def say(self, wire: Wire, message: frames.Message) -> None:
        wire.protocol.data_received(frames.encode(message))

    def outcome(self, wire: Wire) -> object:
        """All that anybody can observe."""
        registry = self.server.registry
        jobs = [(job.name, job.size, job.running, sorted(job.members)) for job in registry.jobs]
        told = [(each.written, each.ended) for each in self.wires]
        # The words are for the log; a relay's are of whichever fault is seen first.
        refused = [each.why for each in self.server.refusals._kept if each.kind == "Legacy"]
        refused.append(str(self.server.counters.refusals))
        return type(wire.protocol).__name__, told, jobs, registry.ranks, refused

    def end(self) -> None:
        for wire in self.wires:
            wire.ended = True
            wire.protocol.connection_lost(None)


def hello(rank: int, job: str = "run", size: int = 2, expires: int = 0) -> Hello:
    return Hello(job, size, rank, 0, expires, (("10.0.0.7", 4242),), NONCE)


_LOOP = asyncio.new_event_loop()
atexit.register(_LOOP.close)


def staged(play: Callable[[], object]) -> object:
    """Run something in a loop, which timers of connections need, and with counted randomness."""

    async def run() -> object:
        with steady():
            return play()

    return cast(object, _LOOP.run_until_complete(run()))
