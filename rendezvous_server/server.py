"""The TCP side: who is let in, and the registry's answers to the ranks. No decisions."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable

import structlog

from fmi_client.protocol.addresses import Address
from fmi_client.protocol.frames import encode
from fmi_client.protocol.rendezvous import Admission
from rendezvous_server.config import Config
from rendezvous_server.connection import Connection, connection_of
from rendezvous_server.jobs import Job
from rendezvous_server.legacy_connection import Legacy
from rendezvous_server.listen import listen, room_for_ranks
from rendezvous_server.registry import Outbox, Registry
from rendezvous_server.relay import Traffic
from rendezvous_server.status import Counters, Refusals
from rendezvous_server.strangers import MAX_STRANGERS, MAX_TLS_STRANGERS, Lately, Strangers, source

log = structlog.get_logger()

DRAIN_SECONDS = 6.0
"""ECS kills 30 s after SIGTERM, Docker after 10. Jobs get this long to finish before their lines
are cut; their ranks then rejoin the next server, if there is one."""

EXPIRY_PERIOD = 1.0
"""How often jobs and waiters whose time is over are looked for."""

BACKLOG = 4096


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
        self.relayed = Traffic(self._may_relay)
        self.refusals = Refusals()
        self.legacy = Legacy(config.legacy, config.job_ttl, self.refused)
        # Where only this machine can reach the port, no secret means no need for one.
        anonymous = config.allow_anonymous or config.secret is None
        self.admission = Admission(config.secret, anonymous)
        self.counters = Counters()
        self.started = time.time()
        self.open: set[Connection] = set()
        room = MAX_STRANGERS if config.tls is None else MAX_TLS_STRANGERS
        self.strangers: Strangers[Connection] = Strangers(room)
        self.room = room_for_ranks()
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
        if self.strangers.crowded or self.held > self.room:
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
            self.counters.handshake_timeouts += 1
            stranger.cut()
        self._await_next()

    def refused(self, address: Address, kind: str, why: str) -> None:
        """Somebody was turned away."""
        self.counters.refusals += 1
        self.refusals.add(time.time(), address, kind, why)

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
            self.deliver(self.registry.expire(time.time()))
            self.legacy.expire(asyncio.get_running_loop().time())

    def _may_relay(self, job: Job, size: int) -> bool:
        if self.registry.may_relay(job, size):
            return True
        self.counters.relay_limits += 1
        log.warning("relay limit", job=job.name, bytes=self.config.relay_bytes)
        self.deliver(self.registry.end_relayed(job, time.time()))
        self.relayed.cut(job)
        return False

    def deliver(self, outbox: Outbox) -> None:
        """Write each message to its member; to who is not in its job any more, as the last."""
        frames: dict[int, bytes] = {}  # a broadcast is one dict object: encode it once
        for member, message in outbox:
            frame = frames.get(id(message))
            if frame is None:
                frame = frames[id(message)] = encode(message)
            connection_of(member).write(frame)
            if not member.present:
                connection_of(member).close_soon()
        for job in {member.job for member, _ in outbox if not member.job.members}:
            self.ended(job)

    def ended(self, job: Job) -> None:
        """Nobody is in the job any more."""
        self.relayed.forget(job)
        log.info(
            "ended",
            job=job.name,
            epoch=job.epoch,
            well=job.well,
            seconds=round(job.ended - job.began, 3),
            **({"why": job.aborted.reason} if job.aborted is not None else {}),
        )
        if not self.registry.ranks:
            self.emptied.set()

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Stop in order: nobody new, waiters sent away, running jobs given time to end."""
        for listener in self._listeners:
            listener.close()
        ranks = self.registry.ranks
        self.deliver(self.registry.drain(time.time()))
        self.legacy.expire(math.inf)
        running = self.registry.ranks
        log.info("draining", waiting=ranks - running, running=running)
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
