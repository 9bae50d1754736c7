"""The TCP side: bytes to the protocol, the registry's answers to the ranks. No decisions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterable
from typing import Any, cast

import structlog

from fmi_client.errors import FmiError, ProtocolError, RendezvousError
from fmi_client.protocol.addresses import format_address
from fmi_client.protocol.frames import PREFACE, Message, encode
from fmi_client.protocol.relay import RELAY_FULL
from fmi_client.protocol.rendezvous import (
    LEFT,
    Admission,
    Authenticated,
    RelayLeg,
    Request,
    ServerSide,
)
from fmi_client.protocol.tls import FIRST_BYTE, WANTS_TLS, TlsStream
from rendezvous_server.config import Config
from rendezvous_server.jobs import Counters, Job, Member
from rendezvous_server.legacy_connection import Legacy, LegacyConnection
from rendezvous_server.listen import listen, room_for_ranks
from rendezvous_server.proxy import split_header
from rendezvous_server.registry import Outbox, Registry, RelayFull
from rendezvous_server.relay import Leg, Traffic
from rendezvous_server.status import Refusals
from rendezvous_server.strangers import MAX_STRANGERS, MAX_TLS_STRANGERS, Lately, Strangers, source

log = structlog.get_logger()

DRAIN_SECONDS = 6.0
"""ECS kills 30 s after SIGTERM, Docker after 10. Jobs get this long to finish before their lines
are cut; their ranks then rejoin the next server, if there is one."""

EXPIRY_PERIOD = 1.0
"""How often jobs and waiters whose time is over are looked for."""

BACKLOG = 4096

WRITE_LIMIT = 1024 * 1024
"""Bytes that may wait for one rank to read them; one that does not is cut off."""

LAST_WORDS = 65536
"""Bytes that are read of a connection that has broken."""

MAX_SEALED = 32 * 1024
"""Bytes that a stranger may send inside TLS before its proof: many times what a rank's are."""

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}

USER_TIMEOUT_MS = 8000
"""Not for the legs of a relay: one whose rank computes may have its window closed for minutes."""


class Server:
    """Listens, and holds what all connections share.

    Args:
        tag: what its tickets begin with; see `Registry`.
    """

    def __init__(self, config: Config, tag: bytes = b"") -> None:
        self.config = config
        self.registry = Registry(
            config.job_ttl,
            relay=config.relay,
            relay_bytes=config.relay_bytes,
            relay_pairs=config.relay_pairs,
            tag=tag,
        )
        self.relayed = Traffic(self._may_relay, self.registry.met, self.registry.release)
        self.refusals = Refusals()
        self.legacy = Legacy(
            config.legacy,
            config.job_ttl,
            lambda address, why: self.refusals.add(time.time(), address, "Legacy", why),
        )
        # Where only this machine can reach the port, no secret means no need for one.
        anonymous = config.allow_anonymous or config.secret is None
        self.admission = Admission(config.secret, anonymous)
        self.counters = Counters()
        self.started = time.time()
        self.open: set[Connection] = set()
        room = MAX_STRANGERS if config.tls is None else MAX_TLS_STRANGERS
        self.strangers: Strangers[Connection] = Strangers(room)
        self._room = room_for_ranks()
        self.lately = Lately()
        self._patience: asyncio.TimerHandle | None = None
        self.emptied = asyncio.Event()
        """Set whenever the last rank has gone; for draining."""
        self._listeners: list[asyncio.Server] = []
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Begin to listen; returns the port."""
        loop = asyncio.get_running_loop()
        sockets = listen(self.config.host, self.config.port, BACKLOG)
        port: int = sockets[0].getsockname()[1]
        for sock in sockets:
            self._listeners.append(
                await loop.create_server(self.make_connection, sock=sock, backlog=BACKLOG)
            )
        self._ticker = asyncio.create_task(self._tick())
        return port

    def make_connection(self) -> Connection:
        """Return what speaks with whoever has connected."""
        return Connection(self)

    @property
    def away(self) -> str:
        """Why it takes nobody new; empty: it does."""
        return "draining" if self.registry.draining else ""

    def figures(self) -> Iterable[tuple[str, str, int]]:
        """Return more metrics: name, description, value now."""
        return ()

    @property
    def held(self) -> int:
        """Connections that are open now, whatever became of them."""
        return len(self.open) + len(self.relayed.legs) + len(self.legacy.open)

    def expect(self, stranger: Connection, host: str, deadline: float) -> bool:
        """Give a connection until `deadline`, by the loop's clock, to prove itself.

        Returns:
            Whether there is room for it.
        """
        whence = source(host)
        if self.strangers.crowded or self.held > self._room:
            self.counters.crowded_out += 1
            oldest = self.strangers.next_to_go(whence)
            if oldest is None:
                return False  # all places are ranks', or by half TCPunch clients'
            oldest.cut()
        self.strangers.add(stranger, whence, deadline)
        if self._patience is None:
            self._await_next()
        return True

    def _await_next(self) -> None:
        """Have one timer for all strangers: the first to come is the first to be late."""
        first = self.strangers.next_deadline
        loop = asyncio.get_running_loop()
        self._patience = None if first is None else loop.call_at(first, self._cut_late)

    def _cut_late(self) -> None:
        for stranger in self.strangers.late(asyncio.get_running_loop().time()):
            self.counters.late += 1
            stranger.cut()
        self._await_next()

    async def _tick(self) -> None:
        crowded_out = 0
        while True:
            await asyncio.sleep(EXPIRY_PERIOD)
            if self.counters.crowded_out > crowded_out:
                now = self.counters.crowded_out
                log.warning("no room", cut=now - crowded_out, ranks=self.registry.ranks)
                crowded_out = now
            if more := self.lately.others():
                log.info("refused strangers", more=more)
            self.deliver(self.registry.overdue(time.time()))
            self._end(self.registry.expire(time.time()))
            self.legacy.expire(asyncio.get_running_loop().time())

    def _end(self, outbox: Outbox) -> None:
        """Tell ranks that their job is over, and let go of them."""
        self.deliver(outbox)
        for member, _ in outbox:
            _connection(member).close_soon()

    def _may_relay(self, job: Job, size: int) -> bool:
        if self.registry.may_relay(job, size):
            return True
        self.counters.relay_limits += 1
        log.warning("relay limit", job=job.name, bytes=self.config.relay_bytes)
        self._end(self.registry.end_relayed(job, time.time()))
        self.relayed.cut(job)
        return False

    def deliver(self, outbox: Outbox) -> None:
        """Write each message to its member."""
        frames: dict[int, bytes] = {}  # a broadcast is one dict object: encode it once
        for member, message in outbox:
            frame = frames.get(id(message))
            if frame is None:
                frame = frames[id(message)] = encode(message)
            _connection(member).write(frame)

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Stop in order: nobody new, waiters sent away, running jobs given time to end."""
        for listener in self._listeners:
            listener.close()
        waiting = {m for job in self.registry.jobs if not job.running for m in job.members.values()}
        self.deliver(self.registry.drain())
        self.legacy.expire(math.inf)
        for member in waiting:
            _connection(member).close_soon()
        log.info("draining", waiting=len(waiting), running=self.registry.ranks - len(waiting))
        if self.registry.ranks:
            self.emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.emptied.wait(), seconds)

    async def stop(self) -> None:
        """Cut what is still open."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._patience is not None:
            self._patience.cancel()
        for connection in list(self.open):
            connection.close_soon()
        for leg in list(self.relayed.legs):
            leg.abort()
        self.legacy.close()
        for listener in self._listeners:
            listener.close()
        await asyncio.sleep(0)


def _connection(member: Member) -> Connection:
    assert isinstance(member.connection, Connection)
    return member.connection


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
        """Bytes of it that came."""
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
            if self._header is not None:
                data = self._take_header(side, data)
            if data:
                self._take(side, self._decrypted(side, data))
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
            if 2 * len(self._server.legacy.open) >= self._server._room:
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
        """Refuse ranks in plain where there is a certificate. Ranks that another server carries
        have proven themselves inside TLS there; what a leg carries the ranks encrypt."""
        match event:
            case RelayLeg() if self._tls is not None:
                raise ProtocolError("a relay leg inside TLS")
            case Authenticated(hello=hello) if self._server.config.tls and not self._tls:
                if hello.seen is None:
                    raise RendezvousError(WANTS_TLS)

    def _take_header(self, side: ServerSide, data: bytes) -> bytes:
        """Learn whom the balancer connects to us; returns the rank's own bytes."""
        assert self._header is not None
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
        elif self._member is not None:
            self._request(self._member, event.message)

    def _request(self, member: Member, message: Message) -> None:
        self._server.deliver(self._server.registry.request(member, message, time.time()))

    def _become_leg(self, ticket: bytes) -> None:
        """Hand the connection over to the relay."""
        server, transport = self._server, self._transport
        assert transport is not None
        try:
            pair = server.registry.claim(ticket, time.time())
        except RelayFull:
            server.counters.relay_limits += 1
            self.write(RELAY_FULL)
            raise
        server.strangers.discard(self)
        self._keep_alive(user_timeout_ms=0)
        server.open.discard(self)
        leg = Leg(transport, pair, server.relayed)
        transport.set_protocol(leg)
        self._transport = self._side = None
        if isinstance(pair.first, Leg) and pair.first.waiting:
            leg.meet(pair.first)
        else:
            pair.first = leg

    def _become_legacy(self, data: bytes) -> None:
        """Hand the connection over to TCPunch's protocol; its deadline stays."""
        server, transport = self._server, self._transport
        assert transport is not None
        assert self._side is not None
        deadline = server.strangers.discard(self)
        assert deadline is not None
        self._keep_alive()
        server.open.discard(self)
        client = LegacyConnection(transport, server.legacy, self._side.observed, deadline)
        transport.set_protocol(client)
        self._transport = self._side = None
        client.data_received(data)

    def _join(self, event: Authenticated) -> None:
        assert self._side is not None
        hello, server = event.hello, self._server
        now = time.time()
        member, outbox = server.registry.join(hello, self._side.observed, self, now)
        job = member.job
        self._member = member
        server.strangers.discard(self)
        self._keep_alive()
        server.counters.joined += 1
        self.write(encode(event.welcome | {"run": job.run}))
        server.deliver(outbox)
        for other, message in outbox:
            # An older epoch's rank, or this one's dead connection: it goes on in ours, unharmed.
            if message["t"] == "error":
                _connection(other)._member = None
            if other.job is not job or message["t"] == "error":
                _connection(other).close_soon()
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
        self._server.counters.refused += 1
        self._server.refusals.add(
            time.time(), self._side.observed, type(error).__name__, error.message
        )
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

    def _keep_alive(self, user_timeout_ms: int = USER_TIMEOUT_MS) -> None:
        sock: Any = self._transport.get_extra_info("socket") if self._transport else None
        if sock is None:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
        for name, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

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
        job, now = member.job, time.time()
        here = job.members.get(member.rank) is member  # or its job has been ended
        outbox = self._server.registry.leave(member, clean=self._clean, why=why, now=now)
        self._server.deliver(outbox)
        if not self._clean:
            self._server.counters.lost += 1
            log.info("lost", job=job.name, rank=member.rank, why=why)
        if not job.members:
            self._server.relayed.forget(job)
            if here:
                seconds = round(now - job.began, 3)
                log.info("ended", job=job.name, epoch=job.epoch, well=job.well, seconds=seconds)
        if not self._server.registry.ranks:
            self._server.emptied.set()
