"""The other servers behind the same load balancer: whose a job is, and ranks of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import structlog

from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError, ServerDraining
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address, format_address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.relay import relay_request
from rendezvous_server.config import Config, ConfigError
from rendezvous_server.forward import LOCAL_HEADER, Line, LineSide, Pipe
from rendezvous_server.listen import EVERYWHERE
from rendezvous_server.shared import LEASE_SECONDS, TAG_BYTES, Shared, address_of, come_back

log = structlog.get_logger()

BEAT_SECONDS = 1.0

LINE_SECONDS = 2.0
"""Another server may take so long to answer; a rank's own patience for us is five."""

ATTEMPTS = 4
"""Servers that may turn out to be dead before a rank is told to come back."""


class Others:
    """What a server has to do with the others.

    Args:
        jobs: gives the names of the jobs that are here.
        hand_over: given the name of one that is another server's by now.
    """

    def __init__(
        self,
        config: Config,
        jobs: Callable[[], Iterable[str]],
        hand_over: Callable[[str], None],
    ) -> None:
        assert config.redis_url is not None
        assert config.secret is not None
        self._config = config
        self._key = auth.carrier_key(config.secret)
        self._header = LOCAL_HEADER if config.proxy_protocol else b""
        self._jobs = jobs
        self._hand_over = hand_over
        self._shared = Shared(config.redis_url, config.job_ttl)
        self.tag = self._shared.tag
        self.lines: set[Line] = set()
        self.pipes: set[Pipe] = set()
        self._trust_from = 0.0
        """When a server that is not in Redis has had the time to say that it is there."""
        self._doubtful = False
        """Whether jobs that are here may be another server's by now."""
        self._beaten = True
        """Whether our last beat did what it should, but for Redis's silence."""
        self._beating: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[Any]] = set()

    async def start(self, port: int) -> None:
        """Tell the others where we are.

        Raises:
            ConfigError: Redis does not answer.
        """
        try:
            self._shared.name(await _own_host(self._config), port)
            await self._shared.beat()
            await self._shared.bury(*self._shared.earlier())
        except (OSError, ServerDraining) as error:
            why = error.__cause__ or error
            at = format_address(_redis_address(self._config))
            raise ConfigError(f"--registry: cannot use the Redis at {at}: {why}") from None
        self._beating = asyncio.create_task(self._beat())

    @property
    def up(self) -> bool:
        """Whether Redis answers, and we make sense of it."""
        return self._shared.up and self._beaten

    @property
    def servers(self) -> int:
        """How many servers there are, by the last beat."""
        return len(self._shared.servers)

    # ------------------------------------------------------------------- ownership
    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self._beat_once()
                self._beaten = True
            except ServerDraining:
                pass  # what runs goes on
            except Exception:  # who does not beat is given up: try again
                self._beaten = False
                log.exception("beat failed")

    async def _beat_once(self) -> None:
        now = time.monotonic()
        if not await self._shared.beat():
            # If Redis has forgotten us, it may have forgotten the others, too.
            self._trust_from = now + LEASE_SECONDS
            self._doubtful = True
        if self._doubtful:
            await self._claim_again()
            self._doubtful = False  # not before all have been asked for
        await self._shared.release(set(self._jobs()))
        if now >= self._trust_from:
            for line in [each for each in self.lines if each.owner not in self._shared.servers]:
                line.moved()

    async def _claim_again(self) -> None:
        """The others have given us up, or Redis forgot us: find out which jobs are ours still."""
        for job in list(self._jobs()):
            if await self._shared.claim(job) != self._shared.me:
                log.warning("handed over", job=job)
                self._hand_over(job)

    # ----------------------------------------------------------------------- ranks
    async def place(self, hello: Hello, observed: Address) -> Line | None:
        """Find the server of a rank's job, and a line to it; None: it is this one.

        Raises:
            RendezvousError: that server refuses the rank, or there is none just now.
        """
        for _ in range(ATTEMPTS):
            owner = await self._shared.claim(hello.job)
            if owner == self._shared.me:
                return None
            if hello.seen is not None:
                break  # it was ours when it was sent here
            try:
                return await self._carry(owner, hello, observed)
            except ConnectionRefusedError:
                log.warning("server gone", server=owner)
                await self._shared.bury(owner)
            except (AuthenticationFailed, ProtocolError, OSError, TimeoutError) as error:
                log.warning("no answer", server=owner, why=str(error) or "in time")
                break
        raise come_back("the job's server does not answer")

    async def _carry(self, owner: str, hello: Hello, observed: Address) -> Line:
        hello = replace(hello, nonce=auth.nonce(), seen=observed)
        side = LineSide(hello, auth.Token(hello.expires, self._key))
        line = Line(owner, side, self._header, self.lines)
        try:
            async with asyncio.timeout(LINE_SECONDS):
                await self._connect(owner, lambda: line)
                await line.run
        except (FmiError, OSError, TimeoutError):
            line.cut()
            raise
        return line

    async def _connect(self, server: str, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Connect to another server.

        Raises:
            OSError: it cannot be reached, or its name in Redis is nonsense.
        """
        address = address_of(server)
        if address == address_of(self._shared.me):
            raise ConnectionRefusedError("it was at our own address before us")
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(protocol, host.strip("[]"), int(port))
        except (ValueError, OverflowError) as error:
            raise OSError(f"no address: {error}") from None

    # ------------------------------------------------------------------------ legs
    def issued(self, ticket: bytes) -> bool:
        """Whether a relay's ticket is one of ours."""
        return ticket[:TAG_BYTES] == self.tag

    def pass_on(self, leg: Pipe, ticket: bytes) -> None:
        """Connect a leg with the server that its ticket is from."""
        task = asyncio.create_task(self._pass_on(leg, ticket))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _pass_on(self, leg: Pipe, ticket: bytes) -> None:
        first = self._header + relay_request(ticket, on=True)
        connected = False
        try:
            async with asyncio.timeout(LINE_SECONDS):  # with the wait for Redis: it is a stranger's
                server = await self._shared.find(ticket[:TAG_BYTES])
                if server is not None:
                    await self._connect(server, lambda: Pipe(self.pipes, leg, first))
                    connected = True
        except (ServerDraining, OSError, TimeoutError) as error:
            log.warning("leg not passed on", why=str(error) or "no answer in time")
        finally:
            if not connected:
                leg.cut()

    # --------------------------------------------------------------------- leaving
    async def leave(self) -> None:
        """Strike ourselves off, and let the ranks that we carry come to another server."""
        if self._beating is not None:
            self._beating.cancel()
        with contextlib.suppress(ServerDraining):  # or it will be noticed
            await self._shared.bury(self._shared.me)
        for line in list(self.lines):
            line.cut()
        for pipe in list(self.pipes):
            pipe.cut()
        await self._shared.close()


async def _own_host(config: Config) -> str:
    """Return the address by which other servers reach us: that by which we reach Redis."""
    if config.host not in (EVERYWHERE, "0.0.0.0"):
        return config.host
    host, port = _redis_address(config)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)  # which sends nothing
        return str(sock.getsockname()[0])


def _redis_address(config: Config) -> Address:
    url = urlsplit(config.redis_url or "")
    return url.hostname or "localhost", url.port or 6379
