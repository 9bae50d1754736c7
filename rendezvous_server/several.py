"""A server that shares its jobs with others: `Server`, and what it does where a job is not its own.

Each job is one server's, which holds it as a server that is alone would. A rank that reaches
another server proves itself there, and then that server carries its words to the job's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog

from fmi_client.errors import FmiError, ProtocolError
from fmi_client.protocol.frames import Message, encode, field
from fmi_client.protocol.rendezvous import (
    REJOIN_SECONDS,
    Authenticated,
    RelayLeg,
    Request,
)
from rendezvous_server.config import Config
from rendezvous_server.connection import Connection
from rendezvous_server.forward import Line, Pipe
from rendezvous_server.jobs import Member
from rendezvous_server.others import Others
from rendezvous_server.server import DRAIN_SECONDS, Server

log = structlog.get_logger()

CARRIERS_WORDS = ("lost", "moved")
"""What a server says of a rank that it carries, and no rank itself."""

CLOSED = "its connection to the server closed"


class SharingServer(Server):
    """One of several servers."""

    def __init__(self, config: Config) -> None:
        self.others = Others(config, self._names, self.hand_over)
        super().__init__(config, self.others.tag)

    def _names(self) -> set[str]:
        return {job.name for job in self.registry.jobs}

    async def start(self) -> int:
        """Begin to listen, and tell the others; see `Others.start`."""
        port = await super().start()
        await self.others.start(port)
        return port

    def make_connection(self) -> Connection:
        return SharingConnection(self)

    @property
    def away(self) -> str:
        return super().away or ("" if self.others.up else "the registry does not answer")

    def figures(self) -> Iterable[tuple[str, str, int]]:
        others = self.others
        return (
            ("carried_ranks", "Ranks carried to the servers of their jobs now", len(others.lines)),
            ("carried_legs", "Ends of relay legs passed on to other servers", len(others.pipes)),
            ("registry_up", "Whether the shared registry answers", others.up),
            ("servers", "Servers that share their jobs, this one among them", others.servers),
        )

    @property
    def held(self) -> int:
        return super().held + len(self.others.lines) + len(self.others.pipes)

    def hand_over(self, job: str) -> None:
        """Another server has the job: let its ranks come to that one."""
        for each in [each for each in self.registry.jobs if each.name == job]:
            self.relayed.cut(each)
        for connection in self.registry.hand_over(job, time.time()):
            assert isinstance(connection, Connection)
            connection.cut()

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Stop in order; where there are other servers, all ranks go to these at once."""
        await self.others.leave()
        await super().drain(seconds if self.others.servers <= 1 else 0.0)


class SharingConnection(Connection):
    """A rank's connection, or another server's that carries one."""

    __slots__ = ("_carried", "_line", "_placing", "_why")

    _server: SharingServer

    def __init__(self, server: SharingServer) -> None:
        super().__init__(server)
        self._placing: asyncio.Task[None] | None = None
        self._line: Line | None = None
        """Whereby the rank is carried to its job's server."""
        self._carried = False
        """Whether another server carries the rank to us."""
        self._why = ""
        """What that one says of the end of its connection with the rank."""

    def _handle(self, event: Authenticated | RelayLeg | Request) -> None:
        if isinstance(event, Authenticated):
            self._placing = asyncio.create_task(self._place(event))
        elif isinstance(event, RelayLeg) and not (
            event.on or self._server.others.issued(event.ticket)
        ):
            self._become_pipe(event.ticket)
        elif isinstance(event, Request) and self._line and event.message["t"] != "leave":
            if event.message["t"] in CARRIERS_WORDS:
                raise ProtocolError(f"unknown request {event.message['t']!r}")
            self._line.send(event.message)
        else:
            super()._handle(event)

    async def _place(self, event: Authenticated) -> None:
        """Take a rank in, here or at the server that has its job."""
        assert self._side is not None
        try:
            line = await self._server.others.place(event.hello, self._side.observed)
            if self._transport is None or self._transport.is_closing():
                if line is not None:
                    line.end({"t": "lost", "why": CLOSED})
            elif line is None:
                self._carried = event.hello.seen is not None
                self._join(event)
            else:
                self._line = line
                self._settle()
                self.write(encode(event.welcome | {"run": line.run.result()}))
                line.carry(self)
                log.info("carried", job=event.hello.job, rank=event.hello.rank, to=line.owner)
        except FmiError as error:
            self._refuse(error)

    def _become_pipe(self, ticket: bytes) -> None:
        """Pass the connection on to the server that knows the ticket."""
        transport, others = self._transport, self._server.others
        assert transport is not None
        self._settle(user_timeout_ms=0)
        leg = Pipe(others.pipes)
        self._become(leg)
        leg.connection_made(transport)
        others.pass_on(leg, ticket)

    def _request(self, member: Member, message: Message) -> None:
        if self._carried and message["t"] == "lost":
            self._why = field(message, "why", str)
            self.close_soon()
        elif self._carried and message["t"] == "moved":
            self._server.hand_over(member.job.name)
        else:
            super()._request(member, message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # which may hear the rank's goodbye only now
        if self._line is not None:
            why = str(exc or CLOSED)
            self._line.end({"t": "leave"} if self._clean else {"t": "lost", "why": why})

    def _gone(self, member: Member, why: str) -> None:
        if not self._carried or self._clean or self._why:
            super()._gone(member, self._why or why)
            return
        # The server has died that carried the rank, which lives, and comes again.
        asyncio.get_running_loop().call_later(REJOIN_SECONDS, self._not_back, member)

    def _not_back(self, member: Member) -> None:
        super()._gone(member, "it did not come back when the server died that it had reached")
