"""What servers share in Redis: which of them are there, and which job is whose.

``rendezvous:servers`` is a sorted set of the servers, each with the time of its last beat by
Redis's clock, in milliseconds. ``rendezvous:job:NAME`` names the server that holds the job, and
counts that server's claims. It holds as long as the server beats. There is nothing else: no
secrets, no ranks, no data.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection
from typing import Any

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fmi_client.errors import ServerDraining
from fmi_client.protocol.addresses import format_address
from rendezvous_server.config import ConfigError

log = structlog.get_logger()

LEASE_SECONDS = 5.0
"""Who has not beaten for so long is not there any more, and its jobs are free."""

ANSWER_SECONDS = 1.0
"""Redis takes a fraction of a millisecond."""

LOOK_SECONDS = 0.1
"""Between two looks for a server that we do not know."""

TAG_BYTES = 4
"""Of 16 in a ticket: 12 random ones are left."""

SERVERS = "rendezvous:servers"
JOB = "rendezvous:job:"

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_BEAT = f"""{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
local there = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
return {{there and 1 or 0, redis.call('ZRANGE', KEYS[1], 0, -1)}}
"""

_CLAIM = f"""{_NOW}
local function there(server)
    local beat = redis.call('ZSCORE', KEYS[1], server)
    return beat and tonumber(beat) > now - ARGV[2]
end
local held = redis.call('GET', KEYS[2])
local owner = held and string.match(held, '^%S+')
if owner and owner ~= ARGV[1] and there(owner) then return owner end
if not there(ARGV[1]) then return '' end
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. ARGV[3], 'EX', ARGV[4])
return ARGV[1]
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


def come_back(why: str) -> ServerDraining:
    """Return what is said to a rank that no server can take just now."""
    return ServerDraining(f"{why}; try again in a few seconds")


def address_of(server: str) -> str:
    """Return where a server is, from its name."""
    return server.partition("@")[2]


class Shared:
    """This server's view of what is shared.

    Args:
        url: of Redis.
        job_ttl: seconds for which no job lives longer.

    Raises:
        ConfigError: the URL asks for what Redis's client does not know.
    """

    def __init__(self, url: str, job_ttl: float) -> None:
        self._redis = _client(url)
        self._beat = self._redis.register_script(_BEAT)
        self._claim = self._redis.register_script(_CLAIM)
        self._release = self._redis.register_script(_RELEASE)
        self._ttl = math.ceil(job_ttl) + 60
        self._claims = 0
        self._held: dict[str, int] = {}
        """Jobs that are ours by Redis's word, each with the number of our last claim."""
        self.tag = os.urandom(TAG_BYTES)
        self.me = ""
        self.servers: frozenset[str] = frozenset()
        """All that are there, by the last beat; this one is among them."""
        self._looked = 0.0
        self._looking = asyncio.Lock()
        self.up = False
        """Whether Redis answered when it was last asked."""

    def name(self, host: str, port: int) -> None:
        """Take a name that says where the others reach us."""
        self.me = f"{self.tag.hex()}@{format_address((host, port))}"

    async def beat(self) -> bool:
        """Say that we are there; returns whether the others have known that until now."""
        there, servers = await self._ask(self._beat, [SERVERS], [self.me, _ms(LEASE_SECONDS)])
        self.servers = frozenset(servers)
        return bool(there)

    async def find(self, tag: bytes) -> str | None:
        """Return the server whose tickets begin with `tag`; None: there is none."""
        found = self._known(tag)
        if found is None:  # it may be new, or what a stranger made up
            async with self._looking:
                if time.monotonic() - self._looked >= LOOK_SECONDS:
                    self._looked = time.monotonic()
                    self.servers = frozenset(await self._ask(self._redis.zrange, SERVERS, 0, -1))
            found = self._known(tag)
        return found

    def _known(self, tag: bytes) -> str | None:
        return next((each for each in self.servers if each.startswith(tag.hex())), None)

    async def claim(self, job: str) -> str:
        """Take a job, unless another server that is there has it; returns who has it.

        Raises:
            ServerDraining: Redis does not answer, or the others have given us up.
        """
        self._claims += 1
        number = self._claims
        owner = await self._ask(
            self._claim,
            [SERVERS, JOB + job],
            [self.me, _ms(LEASE_SECONDS), number, self._ttl],
        )
        if not owner:
            raise come_back("the server was given up by the others")
        if owner == self.me:
            self._held[job] = max(number, self._held.get(job, 0))
        return str(owner)

    async def release(self, kept: Collection[str]) -> None:
        """Give up all jobs but those."""
        for job in self._held.keys() - kept:
            # A claim that comes after this one counts, whichever of the two Redis hears first.
            mine = f"{self.me} {self._held.pop(job)}"
            await self._ask(self._release, [JOB + job], [mine])

    def earlier(self) -> list[str]:
        """Return those that were at our address before us, and cannot be there any more."""
        address = address_of(self.me)
        return [each for each in self.servers - {self.me} if address_of(each) == address]

    async def bury(self, *servers: str) -> None:
        """Strike off servers; one that lives notices with its next beat."""
        if servers:
            await self._ask(self._redis.zrem, SERVERS, *servers)
            self.servers -= frozenset(servers) - {self.me}

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, command: Any, *arguments: Any) -> Any:
        try:
            answer = await command(*arguments)
        except (RedisError, OSError, ValueError) as error:
            if self.up:
                log.error("registry lost", why=str(error))
            self.up = False
            raise come_back("the servers' registry does not answer") from error
        if not self.up:
            log.info("registry answers")
        self.up = True
        return answer


def _client(url: str) -> redis.asyncio.Redis:
    try:
        client = redis.asyncio.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",  # somebody else's entry must not stop us
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection may be from before its restart
        )
        pool: Any = client.connection_pool
        pool.make_connection()  # only now are the URL's arguments looked at
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--registry: correct the URL: {error}") from None
    return client


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
