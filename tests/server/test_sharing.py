"""What servers share in Redis, and whom they believe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fmi_client.errors import AuthenticationFailed, ServerDraining
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol import auth
from fmi_client.protocol.frames import PREFACE, FrameReader, Message, encode
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import Admission, Authenticated, ClientSide, ServerSide
from rendezvous_server import others, shared
from rendezvous_server.config import Config, ConfigError, check_redis_url
from rendezvous_server.forward import LineSide
from rendezvous_server.several import SharingServer
from rendezvous_server.shared import Shared
from tests.reliability.cluster import SECRET, Redis
from tests.reliability.restarts import join
from tests.reliability.strangers import enter
from tests.support import closed_port, until

pytestmark = pytest.mark.alone

HELLO = Hello("job", 2, 1, 0, 2**40, (("10.0.0.1", 5),), auth.nonce())
SEEN = ("203.0.113.9", 4242)


@pytest.fixture
async def three(redis: Redis) -> AsyncIterator[list[Shared]]:
    """Three servers, as far as Redis knows."""
    servers = [Shared(redis.url, 60) for _ in range(3)]
    for port, each in enumerate(servers):
        each.name("127.0.0.1", port + 1)
        await each.beat()
    yield servers
    for each in servers:
        await each.close()


async def test_of_servers_that_want_a_job_at_once_one_has_it(three: list[Shared]) -> None:
    winners: Counter[str] = Counter()
    for number in range(1000):
        owners = await asyncio.gather(*(each.claim(f"job{number}") for each in three))
        assert len(set(owners)) == 1
        winners[owners[0]] += 1
    assert winners.keys() <= {each.me for each in three}


async def test_a_job_is_free_when_its_server_does_not_beat(
    three: list[Shared], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, _ = three
    assert await one.claim("job") == await other.claim("job") == one.me
    monkeypatch.setattr(shared, "LEASE_SECONDS", 0.05)
    await other.beat()
    await asyncio.sleep(0.1)  # longer than the lease
    await other.beat()
    assert await other.claim("job") == other.me
    # And the first one, which slept, gets nothing before it has noticed.
    with pytest.raises(ServerDraining, match="given up"):
        await one.claim("another")
    assert not await one.beat()
    assert await one.claim("job") == other.me
    assert await one.beat()


async def test_a_job_is_free_when_its_server_is_struck_off(three: list[Shared]) -> None:
    one, other, third = three
    assert await one.claim("job") == one.me
    await other.bury(one.me)
    assert await asyncio.gather(other.claim("job"), third.claim("job")) == [other.me] * 2
    assert not await one.beat()


async def test_a_job_that_is_released_is_free_unless_it_was_claimed_again(
    three: list[Shared],
) -> None:
    one, other, _ = three
    await one.claim("job")
    await one.release({"job"})
    assert await other.claim("job") == one.me
    await one.release(())
    assert await other.claim("job") == other.me

    await one.claim("again")
    held = dict(one._held)
    await one.claim("again")
    one._held = held  # the release was under way when the second claim was made
    await one.release(())
    assert await other.claim("again") == one.me


async def test_a_server_replaces_the_one_that_was_at_its_address(
    redis: Redis, two: list[tuple[SharingServer, str]]
) -> None:
    """It was killed, and is started again within its lease."""
    (_, address), _ = two
    before = Shared(redis.url, 60)
    port = closed_port()
    before.name("127.0.0.1", port)
    await before.beat()
    await before.claim("job")
    config = Config("127.0.0.1", port, -1, SECRET, True, 60.0, redis_url=redis.url)
    after = SharingServer(config)
    await after.start()
    await (await join(address, 0, 1)).close()  # at once: it is not told to come back
    await before.close()
    await after.drain(0.0)
    await after.stop()


async def test_tickets_name_their_server(three: list[Shared]) -> None:
    one, other, _ = three
    assert await one.find(other.tag) == other.me
    assert await one.find(b"none") is None


# ------------------------------------------------------------------- who may carry whom
def converse(client: ClientSide, server: ServerSide) -> list[object]:
    """Let both talk until neither has anything to say; returns what the server makes of it."""
    events: list[object] = []
    while client.outgoing:
        said = server.receive(bytes(client.outgoing), 0.0)
        client.outgoing.clear()
        events += said
        for each in said:
            if isinstance(each, Authenticated):
                client.receive(encode(each.welcome | {"run": auth.nonce()}))
        client.receive(bytes(server.outgoing))
        server.outgoing.clear()
    return events


def server_side(secret: bytes | None = SECRET) -> ServerSide:
    return ServerSide(Admission(secret, allow_anonymous=True), ("10.9.9.9", 99), 0.0)


def test_who_knows_the_secret_says_where_a_rank_comes_from() -> None:
    server = server_side()
    line = LineSide(replace(HELLO, seen=SEEN), auth.Token(2**40, auth.carrier_key(SECRET)))
    (event,) = converse(line, server)
    assert isinstance(event, Authenticated)
    assert server.observed == SEEN


@pytest.mark.parametrize(
    ("expires", "key"),
    [
        (2**40, auth.admission_key(SECRET, "job", 2, 2**40)),  # a rank's own token
        (0, auth.ANONYMOUS),
        (2**40, auth.carrier_key(b"of other servers")),
    ],
)
def test_nobody_else_does(expires: int, key: bytes) -> None:
    hello = replace(HELLO, seen=SEEN, expires=expires)
    with pytest.raises(AuthenticationFailed):
        converse(LineSide(hello, auth.Token(expires, key)), server_side())


def test_a_server_without_a_secret_believes_nobody() -> None:
    hello = replace(HELLO, seen=SEEN)
    with pytest.raises(AuthenticationFailed):
        converse(LineSide(hello, auth.Token(2**40, auth.ANONYMOUS)), server_side(None))


@pytest.mark.parametrize("kind", ["lost", "moved"])
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_cannot_speak_like_a_server(
    rank: int, kind: str, two: list[tuple[SharingServer, str]]
) -> None:
    """Whether it is at the server of its job, or is carried there by another one."""
    ranks = [asyncio.ensure_future(join(address, r, 2)) for r, (_, address) in enumerate(two)]
    comms = await asyncio.gather(*ranks)
    (job,) = [job for server, _ in two for job in server.registry.jobs]
    control = comms[rank]._endpoint._control  # type: ignore[attr-defined]
    control.side.outgoing += encode({"t": kind, "why": "so"})
    control.flush()
    await until(lambda: two[rank][0].counters.refusals == 1)
    await until(lambda: rank in job.lost)  # it was shown the door, and the job is where it was
    assert job.lost[rank][1] != "so"
    assert 1 - rank in job.members
    for comm in comms:
        await comm.close()


@pytest.mark.parametrize("way", ["direct", "carried"])
async def test_a_goodbye_counts_though_a_write_fails_before_it_is_read(
    way: str, two: list[tuple[SharingServer, str]]
) -> None:
    at = two[0 if way == "direct" else 1]
    first, _ = await asyncio.to_thread(enter, parse_endpoint(two[0][1])[1], "bye", 0, 2)
    sock, _ = await asyncio.to_thread(enter, parse_endpoint(at[1])[1], "bye", 1, 2)
    (job,) = [job for server, _ in two for job in server.registry.jobs]
    connection = next(
        each
        for each in at[0].open
        if each._transport is not None
        and each._transport.get_extra_info("peername") == sock.getsockname()
    )
    sock.sendall(encode({"t": "leave"}))
    sock.close()
    for _ in range(2):  # the first is answered with a reset
        connection.write(encode({"t": "want", "peer": 0}))
    await until(lambda: 1 in job.gone)
    assert job.gone[1]["clean"] is True
    first.close()


async def test_where_a_rank_comes_from_is_known_to_its_jobs_server(
    two: list[tuple[SharingServer, str]],
) -> None:
    comms = await asyncio.gather(*(join(address, r, 2) for r, (_, address) in enumerate(two)))
    (job,) = [job for server, _ in two for job in server.registry.jobs]
    for rank, member in job.members.items():
        assert member.address == comms[rank]._endpoint.local  # type: ignore[attr-defined]
    for comm in comms:
        await comm.close()


async def test_jobs_are_counted_where_they_are_and_ranks_that_are_carried_too(
    two: list[tuple[SharingServer, str]],
) -> None:
    comms = await asyncio.gather(*(join(address, r, 2) for r, (_, address) in enumerate(two)))
    figures = [{name: value for name, _, value in server.figures()} for server, _ in two]
    jobs = [len(server.registry.jobs) for server, _ in two]
    assert sorted(jobs) == [0, 1]
    assert [each["carried_ranks"] for each in figures] == jobs[::-1]
    for comm in comms:
        await comm.close()


async def test_a_false_server_in_redis_gets_no_rank(
    two: list[tuple[SharingServer, str]], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to Redis can stop jobs, but cannot be their server."""
    _, address = two[0]
    monkeypatch.setattr("fmi_client.transport.control.DRAIN_SECONDS", 0.1)
    heard: list[Message] = []

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        assert await reader.readexactly(1) == PREFACE
        while data := await reader.read(4096):
            for message, _ in frames.feed(data):
                heard.append(message)
                answer = {"t": "challenge", "nonce": auth.nonce()}
                if message["t"] == "proof":
                    answer = {"t": "welcome", "mac": bytes(32), "seen": list(SEEN)}
                    answer |= {"run": auth.nonce()}
                writer.write(encode(answer))
        writer.close()

    false = Shared(redis.url, 60)
    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    false.name("127.0.0.1", server.sockets[0].getsockname()[1])
    await false.beat()
    await false.claim("job")
    with pytest.raises(ServerDraining, match="does not answer"):
        await join(address, 0, 1)
    assert [each["t"] for each in heard[:2]] == ["hello", "proof"]
    await false.close()
    server.close()


# ------------------------------------------------------------------- what strangers do
async def leg(address: str, ticket: bytes, on: bool = False) -> bytes:
    """Open a relay's leg; returns what is said until it is closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(relay_request(ticket, on))
    try:
        async with asyncio.timeout(1):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_leg_is_passed_on_once(two: list[tuple[SharingServer, str]]) -> None:
    (server, address), (other, _) = two
    await server.others._shared.beat()
    assert await leg(address, other.others.tag + bytes(12)) == b""
    assert other.counters.connections == 1
    assert await leg(address, other.others.tag + bytes(12), on=True) == b""
    assert other.counters.connections == 1


@pytest.mark.parametrize("where", ["own", "127.0.0.1:99999", "127.0.0.1:port", "", "[:1"])
async def test_a_leg_to_nowhere_is_cut(where: str, two: list[tuple[SharingServer, str]]) -> None:
    """Such as to who was at our address before us."""
    server, address = two[0]
    name = f"0badbeef@{address if where == 'own' else where}"
    server.others._shared.servers |= {name}
    assert await leg(address, bytes.fromhex("0badbeef") + bytes(12)) == b""
    assert server.counters.connections == 1
    assert not server.others.pipes


async def test_a_leg_waits_no_longer_for_redis(
    two: list[tuple[SharingServer, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = two[0]
    monkeypatch.setattr(others, "LINE_SECONDS", 0.05)
    async with server.others._shared._looking:
        assert await leg(address, bytes(16)) == b""


async def test_who_is_struck_off_is_forgotten_at_once(three: list[Shared]) -> None:
    one, other, third = three
    await third.bury(one.me, third.me)
    assert third.servers == {other.me, third.me}


async def test_a_senseless_entry_in_redis_stops_no_beat(three: list[Shared]) -> None:
    one = three[0]
    await one._redis.zadd(shared.SERVERS, {b"\xff\xfe": 9e12})
    assert await one.beat()
    assert one.me in one.servers


async def test_a_beat_that_fails_is_made_again(
    two: list[tuple[SharingServer, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = two[0]
    monkeypatch.setattr(others, "BEAT_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(server.others, "_beat_once", lambda: {}["no such thing"])
        await until(lambda: server.away != "")
    await until(lambda: server.away == "")


async def test_claims_that_redis_did_not_hear_are_made_again(
    two: list[tuple[SharingServer, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beat that finds us struck off is the only one that says so."""
    server = two[0][0]
    asked: list[str] = []

    async def claim(job: str) -> str:
        asked.append(job)
        if len(asked) == 1:
            raise ServerDraining("no answer")
        return server.others._shared.me

    monkeypatch.setattr(server.others, "_jobs", lambda: ["job"])
    monkeypatch.setattr(server.others._shared, "claim", claim)
    await server.others._shared.bury(server.others._shared.me)
    with pytest.raises(ServerDraining):
        await server.others._beat_once()
    for _ in range(2):
        await server.others._beat_once()
    assert asked == ["job"] * 2


# ------------------------------------------------------------------------- the command
def test_a_registry_that_does_not_answer_is_said_at_once() -> None:
    url = f"redis://user:word@127.0.0.1:{closed_port()}/0"
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--registry", url]
    env = os.environ | {"RENDEZVOUS_SECRET": SECRET.decode()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "cannot use the Redis at 127.0.0.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "word" not in done.stderr


@pytest.mark.parametrize("wrong", ["max_connections=many", "no_such_argument=1"])
def test_a_url_that_redis_cannot_take_is_an_error_of_the_setting(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"--registry: .*{wrong.partition('=')[0]}"):
        Shared(f"redis://127.0.0.1/0?{wrong}", 60)


def test_servers_need_a_secret_and_a_url_of_redis() -> None:
    with pytest.raises(ConfigError, match="--secret-file"):
        check_redis_url("redis://127.0.0.1/0", None)
    with pytest.raises(ConfigError, match="redis://"):
        check_redis_url("127.0.0.1:6379", SECRET)
    with pytest.raises(ConfigError, match="redis://"):
        check_redis_url("redis://127.0.0.1:port/0", SECRET)
    assert check_redis_url(None, None) is None
