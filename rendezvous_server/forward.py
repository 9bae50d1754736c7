"""Ranks that reached another server than their job's: what they say is passed on to that one."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

from fmi_client.errors import FmiError
from fmi_client.protocol.frames import Message, encode
from fmi_client.protocol.rendezvous import ClientSide, Welcome
from rendezvous_server.connection import Connection, keep_alive
from rendezvous_server.proxy import LOCAL, SIGNATURE

LOCAL_HEADER = SIGNATURE + struct.pack("!BBH", LOCAL, 0, 0)
"""What a server with --proxy-protocol expects first, of a connection that is not a client's."""

LINE_LIMIT = 1024 * 1024
"""Bytes that may wait for the other server to read them."""

PIPE_LIMIT = 128 * 1024


class LineSide(ClientSide):
    """The conversation with a job's server: a rank's until the welcome, then only passed on."""

    def _handle(self, message: Message) -> Any:
        return message if self._welcome else super()._handle(message)


class Line(asyncio.Protocol):
    """A connection to the server `owner` that carries one rank's control connection.

    An end of it that does not come after the rank's "leave", or our "lost" or "moved", means to
    the other server that this one has died: the rank, which lives, comes again.
    """

    def __init__(self, owner: str, side: LineSide, first: bytes, lines: set[Line]) -> None:
        self.owner = owner
        self._side = side
        self._first = first
        self._lines = lines
        self._rank: Connection | None = None
        self._early = bytearray()
        self._transport: asyncio.Transport | None = None
        self.run: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """The name of the job's run, once the rank is in it, or why it is not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=LINE_LIMIT)
        keep_alive(self._transport)
        self._lines.add(self)
        self._transport.write(self._first)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._side.receive(data):
                if isinstance(event, Welcome):
                    self._settle(event.run)
                else:
                    self._pass_back(encode(cast(Message, event)))
            if self._side.failure is not None:
                raise self._side.failure
        except FmiError as error:
            self._settle(error)
            self.cut()
        self._flush()

    def _settle(self, outcome: bytes | Exception) -> None:
        if self.run.done():
            return
        if isinstance(outcome, bytes):
            self.run.set_result(outcome)
        else:
            self.run.set_exception(outcome)

    def _flush(self) -> None:
        if self._transport is not None and self._side.outgoing:
            self._transport.write(bytes(self._side.outgoing))
            self._side.outgoing.clear()

    def _pass_back(self, frame: bytes) -> None:
        if self._rank is None:
            self._early += frame
        else:
            self._rank.write(frame)

    def carry(self, rank: Connection) -> None:
        """The rank has had its welcome: the rest is for it."""
        self._rank = rank
        rank.write(bytes(self._early))
        self._early.clear()
        if self._transport is None:
            rank.close_soon()

    def send(self, message: Message) -> None:
        """Pass on a message of the rank's."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def end(self, message: Message) -> None:
        """Say why the line ends, and end it."""
        self.send(message)
        if self._transport is not None:
            self._transport.close()

    def moved(self) -> None:
        """The other server was given up: tell it, should it live, and let the rank come again."""
        self.end({"t": "moved"})
        if self._rank is not None:
            self._rank.close_soon()

    def cut(self) -> None:
        """End without a word: the rank comes again."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lines.discard(self)
        self._settle(exc or ConnectionResetError("closed by the other server"))
        if self._rank is not None:
            self._rank.close_soon()


class Pipe(asyncio.Protocol):
    """One of two connections between which bytes are passed on.

    They are a relay's leg, and our own to the server that it is for.
    """

    def __init__(self, pipes: set[Pipe], peer: Pipe | None = None, first: bytes = b"") -> None:
        self._pipes = pipes
        self._peer = peer
        self._first = first
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=PIPE_LIMIT)
        self._pipes.add(self)
        self.transport.write(self._first)
        if self._peer is None:
            self.transport.pause_reading()
            return
        keep_alive(self.transport, user_timeout_ms=0)
        self._peer._peer = self
        if self._peer.transport is None:
            self.transport.abort()
        else:
            self._peer.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._peer is not None and self._peer.transport is not None:
            self._peer.transport.write(data)

    def pause_writing(self) -> None:
        if self._peer is not None and self._peer.transport is not None:
            self._peer.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self._peer.transport if self._peer is not None else None
        if other is not None and not other.is_closing():
            other.resume_reading()

    def cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._pipes.discard(self)
        if self._peer is not None and self._peer.transport is not None:
            self._peer.transport.close()  # after what is still to be written
