"""One connection to the server: its bytes to the protocol, and what the protocol says to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import structlog

from fmi_client.errors import FmiError, ProtocolError, RendezvousError
from fmi_client.protocol.addresses import format_address
from fmi_client.protocol.frames import PREFACE, Message, encode
from fmi_client.protocol.relay import RELAY_FULL
from fmi_client.protocol.rendezvous import (
    KEEPALIVE,
    LEFT,
    USER_TIMEOUT_MS,
    Authenticated,
    RelayLeg,
    Request,
    ServerSide,
)
from fmi_client.protocol.tls import FIRST_BYTE, WANTS_TLS, TlsStream
from rendezvous_server.jobs import Member
from rendezvous_server.legacy_connection import LegacyConnection
from rendezvous_server.proxy import split_header
from rendezvous_server.relay import Leg
from rendezvous_server.tickets import RelayFull

if TYPE_CHECKING:
    from rendezvous_server.server import Server

log = structlog.get_logger()

WRITE_LIMIT = 1024 * 1024
"""Bytes that may wait for one rank to read them; one that does not is cut off."""

LAST_WORDS = 65536
"""Bytes that are read of a connection that has broken."""

MAX_SEALED = 32 * 1024
"""Bytes that a stranger may send inside TLS before its proof: many times what a rank's are."""


def keep_alive(transport: asyncio.Transport, user_timeout_ms: int = USER_TIMEOUT_MS) -> None:
    """Notice that the other side is gone, even if it cannot say so.

    Args:
        user_timeout_ms: 0, which is none, for legs of a relay: one whose rank computes may have its
            window closed for minutes.
    """
    sock: Any = transport.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
    for name, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _copy(sock: Any) -> socket.socket:
    return socket.socket(fileno=os.dup(sock.fileno()))


class Connection(asyncio.Protocol):
    """One TCP connection; before authentication it has until a fixed moment to prove itself."""

    __slots__ = (
        *("_clean", "_credit", "_header", "_heard", "_member"),
        *("_sealed", "_server", "_side", "_tls", "_transport"),
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._side: ServerSide | None = None
        self._member: Member | None = None
        self._clean = False
        self._heard = False
        self._credit = 0
        """Bytes that it sent, less those that it was told while a stranger."""
        self._tls: TlsStream | None = None
        self._sealed = 0
        """Encrypted bytes that came."""
        self._header: bytes | None = b"" if server.config.proxy_protocol else None
        """What has come of the balancer's header; None when there is none to come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's by behaviour, not by class.
        self._transport = transport = cast(asyncio.Transport, transport)
        server = self._server
        server.counters.connections += 1
        server.open.add(self)
        peer = transport.get_extra_info("peername")
        if peer is None:  # it has gone between accept and here
            transport.abort()
            return
        now = time.time()
        self._side = ServerSide(server.admission, (peer[0], peer[1]), now)
        deadline = asyncio.get_running_loop().time() + (self._side.deadline - now)
        if not server.expect(self, peer[0], deadline):
            transport.abort()
        transport.set_write_buffer_limits(high=WRITE_LIMIT)

    def data_received(self, data: bytes) -> None:
        side = self._side
        if side is None or self._transport is None or self._transport.is_closing():
            return
        try:
            self._take(side, self._decrypted(side, self._without_header(side, data)))
        except FmiError as error:
            self._refuse(error)
        self._flush()

    def _decrypted(self, side: ServerSide, data: bytes) -> bytes:
        """The first byte says whether a connection is encrypted."""
        context = self._server.config.tls
        if context is not None and not self._heard and data[:1] == FIRST_BYTE:
            self._tls, self._heard = TlsStream(context, server_side=True), True
        if self._tls is None:
            return data
        self._sealed += len(data)
        if self._sealed > MAX_SEALED and not side.proven:
            raise ProtocolError("too much inside TLS before the proof")
        return self._tls.receive(data)

    def _take(self, side: ServerSide, data: bytes) -> None:
        self._credit += len(data)
        if not data:
            return
        first, self._heard = not self._heard, True
        if first and data[:1] != PREFACE and self._server.legacy.serves(side.observed[0]):
            if 2 * len(self._server.legacy.open) >= self._server.room:
                raise RendezvousError("TCPunch clients have half of all places")
            self._become_legacy(data)
            return
        for event in side.receive(data, time.time()):
            self._flush()  # the challenge, before what follows from its answer
            self._check_tls(event)
            self._handle(event)
            if self._transport is None or self._transport.is_closing():
                return  # what follows is for a leg, or came after the end
        if side.failure is not None:
            raise side.failure

    def _check_tls(self, event: Authenticated | RelayLeg | Request) -> None:
        """Refuse ranks in plain where there is a certificate.

        Ranks that another server carries have proven themselves inside TLS there; what a leg
        carries the ranks encrypt.
        """
        match event:
            case RelayLeg() if self._tls is not None:
                raise ProtocolError("a relay leg inside TLS")
            case Authenticated(hello=hello) if self._server.config.tls and not self._tls:
                if hello.seen is None:
                    raise RendezvousError(WANTS_TLS)

    def _without_header(self, side: ServerSide, data: bytes) -> bytes:
        """Learn whom the balancer connects to us; returns the rank's own bytes."""
        if self._header is None:
            return data
        self._header += data
        header = split_header(self._header)
        if header is None:
            return b""
        self._header = None
        client, rest = header
        side.observed = client or side.observed
        return rest

    def _handle(self, event: Authenticated | RelayLeg | Request) -> None:
        if isinstance(event, Authenticated):
            self._join(event)
        elif isinstance(event, RelayLeg):
            self._become_leg(event.ticket)
        elif event.message["t"] == "leave":
            self._clean = True
            self.close_soon()
        elif self._member is not None and self._member.present:
            self._request(self._member, event.message)

    def _request(self, member: Member, message: Message) -> None:
        self._server.deliver(self._server.registry.request(member, message, time.time()))

    def _become_leg(self, ticket: bytes) -> None:
        """Hand the connection over to the relay."""
        server, transport = self._server, self._transport
        assert transport is not None
        try:
            pair = server.registry.tickets.claim(ticket, time.time())
        except RelayFull:
            server.counters.relay_limits += 1
            self.write(RELAY_FULL)
            raise
        self._settle(user_timeout_ms=0)
        leg = Leg(transport, pair, server.relayed)
        self._become(leg)
        leg.begin()

    def _become_legacy(self, data: bytes) -> None:
        """Hand the connection over to TCPunch's protocol; its deadline stays."""
        assert self._transport is not None
        assert self._side is not None
        address, deadline = self._side.observed, self._settle()
        assert deadline is not None
        client = LegacyConnection(self._transport, self._server.legacy, address, deadline)
        self._become(client)
        client.data_received(data)

    def _become(self, protocol: asyncio.BaseProtocol) -> None:
        """Let another protocol have the transport."""
        assert self._transport is not None
        self._transport.set_protocol(protocol)
        self._transport = self._side = None
        self._server.open.discard(self)

    def _settle(self, user_timeout_ms: int = USER_TIMEOUT_MS) -> float | None:
        """It is no stranger any more; returns the deadline that it had as one."""
        assert self._transport is not None
        keep_alive(self._transport, user_timeout_ms)
        return self._server.strangers.discard(self)

    def _join(self, event: Authenticated) -> None:
        assert self._side is not None
        hello, server = event.hello, self._server
        now = time.time()
        member, outbox = server.registry.join(hello, self._side.observed, self, now)
        job = member.job
        self._member = member
        self._settle()
        server.counters.joins += 1
        self.write(encode(event.welcome | {"run": job.run}))
        server.deliver(outbox)
        log.info(
            "rejoined" if hello.began else "joined",
            job=hello.job,
            rank=hello.rank,
            size=hello.size,
            epoch=hello.epoch,
            address=format_address(self._side.observed),
        )
        if job.running and job.ready == now and job.back_until is None:
            server.counters.jobs_started += 1
            log.info("ready", job=hello.job, size=hello.size, epoch=hello.epoch)

    def _refuse(self, error: FmiError) -> None:
        """Answer once, and close. A stranger who speaks no version 3 gets no answer."""
        assert self._side is not None
        self._server.refused(self._side.observed, type(error).__name__, error.message)
        level = logging.INFO if self._side.proven else self._server.lately.level()
        log.log(level, "refused", address=format_address(self._side.observed), why=error.message)
        self._flush()
        answer = self._side.refusal(error)
        if answer is not None:
            self.write(encode(answer))
        self.close_soon()

    def _flush(self) -> None:
        if self._side is not None and (self._side.outgoing or self._tls is not None):
            self.write(bytes(self._side.outgoing))  # and what TLS has to say by itself
            self._side.outgoing.clear()

    def write(self, frame: bytes) -> None:
        """Queue a frame; to a stranger no more bytes than it sent, or nothing.

        Inside TLS that is counted before encryption: what TLS itself has to say to a stranger,
        the server's certificate first of all, is longer than any question.
        """
        if self._transport is None or self._transport.is_closing():
            return
        if self._side is not None and not self._side.proven:
            if len(frame) > self._credit:
                return
            self._credit -= len(frame)
        if self._tls is not None:
            self._tls.send(frame)
            frame = self._tls.take()
        if frame:
            self._transport.write(frame)

    def pause_writing(self) -> None:
        """It does not read what it is told: it is dead, or means harm."""
        if self._transport is not None:
            self._transport.abort()

    def close_soon(self) -> None:
        """Close after what is queued is written."""
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close at once, without a word."""
        self._server.strangers.discard(self)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._hear_out()
        self._server.strangers.discard(self)
        self._server.open.discard(self)
        member, self._member = self._member, None
        if member is not None:
            why = LEFT if self._clean else str(exc or "its connection to the server closed")
            self._gone(member, why)

    def _hear_out(self) -> None:
        """Read what came before the connection broke.

        Who says goodbye closes at once. If it is told something just then, the write fails before
        the goodbye has been read, and a rank that left in order would be announced as lost.
        """
        sock: Any = self._transport.get_extra_info("socket") if self._transport else None
        if sock is None or self._side is None or not self._side.proven:
            return
        with contextlib.suppress(OSError, FmiError), _copy(sock) as broken:
            words = self._decrypted(self._side, broken.recv(LAST_WORDS))
            for event in self._side.receive(words, time.time()):
                self._handle(event)

    def _gone(self, member: Member, why: str) -> None:
        """A rank is gone. Of each a line is logged only if it was lost: that of its job will do."""
        if not member.present:
            return  # we sent it away
        server, clean = self._server, self._clean
        server.deliver(server.registry.leave(member, clean=clean, why=why, now=time.time()))
        if not clean:
            server.counters.lost_ranks += 1
            log.info("lost", job=member.job.name, rank=member.rank, why=why)
        if not member.job.members:
            server.ended(member.job)


def connection_of(member: Member) -> Connection:
    """Return the connection on which a rank joined."""
    assert isinstance(member.connection, Connection)
    return member.connection
