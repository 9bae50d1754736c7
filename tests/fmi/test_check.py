"""What a check makes of servers that work, that do not, and of what is none."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

import fmi_client
from fmi_client import check, errors, findings, linktest
from fmi_client.check import Plan, run
from fmi_client.findings import ADVICE, LinkFound, Nat, Report, Step, classify, outlook
from fmi_client.joining import JoinRequest
from fmi_client.protocol import frames
from fmi_client.protocol.addresses import Address
from fmi_client.transport.sockets import parse_endpoint
from rendezvous_server import admin
from tests.support import serving

SECRET = b"0123456789abcdef"
LOCAL = ("10.0.0.2", 40000)


# ------------------------------------------------------------------------ judgement
@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ([], None),
        ([LOCAL], "none"),
        ([LOCAL, ("10.0.0.2", 1)], "none"),  # the admin port is behind something, ours is not
        ([("198.51.100.2", 40000)], "preserving"),
        ([("198.51.100.2", 40000), ("198.51.100.2", 40000)], "preserving"),
        ([("198.51.100.2", 1)], "changed"),
        ([("198.51.100.2", 1), ("198.51.100.2", 1)], "endpoint_independent"),
        ([("198.51.100.2", 1), ("198.51.100.2", 2)], "symmetric"),
        ([("198.51.100.2", 40000), ("198.51.100.2", 2)], "symmetric"),
        ([("198.51.100.2", 1), ("198.51.100.3", 1)], "symmetric"),
    ],
)
def test_which_nat(seen: list[Address], kind: Nat | None) -> None:
    assert classify(LOCAL, seen) == kind


@pytest.mark.parametrize(
    ("first", "cause"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "http"),
        (b"<html>", "http"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "ssh"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "tls"),
        (b"220 mail.example.org ESMTP", "stranger"),
        (b"\x15", "stranger"),
    ],
)
def test_who_answers(first: bytes, cause: str) -> None:
    assert findings.who_answers(first) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TimeoutError(), "black_hole"),
        (OSError(errno.ETIMEDOUT, ""), "black_hole"),
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), "refused"),
        (ConnectionResetError(errno.ECONNRESET, ""), "closed"),
        (OSError(errno.ENETUNREACH, ""), "unreachable"),
        (OSError(errno.EHOSTUNREACH, ""), "unreachable"),
    ],
)
def test_why_no_connection(error: OSError, cause: str) -> None:
    assert findings.connect_cause(error) == cause


@pytest.mark.parametrize(
    ("error", "credentials", "cause"),
    [
        (errors.AuthenticationFailed(), "none", "token_missing"),
        (errors.AuthenticationFailed(), "unused", "token_unused"),
        (errors.AuthenticationFailed(), "token", "token_wrong"),
        (errors.AuthenticationFailed(), "expired", "token_expired"),
        (errors.AuthenticationFailed(), "secret", "secret_wrong"),
        (errors.ServerDraining(), "none", "draining"),
        (errors.JobFull(), "token", "job_full"),
        (errors.RankTaken(), "token", "rank_taken"),
        (errors.JoinTimeout(missing=[1]), "none", "missing"),
        (errors.RendezvousError(), "none", "turned_away"),
        (errors.ProtocolError(), "none", "lost"),
    ],
)
def test_why_not_admitted(
    error: errors.FmiError, credentials: findings.Credentials, cause: str
) -> None:
    assert findings.join_cause(error, credentials) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.AuthenticationFailed(), "key"),
        (errors.PunchFailed(), "no_link"),
        (errors.CollectiveTimeout(missing=[1]), "stalled"),
        (errors.RankFailed(rank=1), "peer_lost"),
        (errors.Aborted(by=1), "peer_lost"),
        (errors.CollectiveMismatch(), "mismatch"),
        (errors.RendezvousError(), "lost"),
    ],
)
def test_why_no_link(error: errors.FmiError, cause: str) -> None:
    assert findings.link_cause(error) == cause


FACTS: dict[str, object] = {
    "host": "fmi.example.org",
    "ip": "192.0.2.1",
    "port": 10000,
    "job": "try",
    "rank": 0,
    "size": 2,
    "wait": "60",
    "missing": "1",
    "peer": 1,
}


@pytest.mark.parametrize("cause", ADVICE)
def test_an_advice_is_one_sentence_without_gaps(cause: str) -> None:
    text = Report("", dict(FACTS), [Step("", "failed", "", cause=cause)]).advice
    assert text[0].isupper()
    assert text.endswith(".")
    assert ". " not in text
    assert "?" not in text
    assert "{" not in text


def test_the_first_thing_wrong_gets_the_advice() -> None:
    steps = [
        Step("NAT", "warning", ""),
        Step("authenticate", "failed", "", cause="token_expired"),
        Step("peers", "failed", "", cause="missing"),
    ]
    assert Report("", {}, steps).advice == ADVICE["token_expired"]


def test_every_cause_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    assert not [cause for cause in ADVICE if f"`{cause}`" not in text]


def link(kind: str) -> LinkFound:
    return LinkFound(1, kind, 0.001, 1e6, 1e6)


@pytest.mark.parametrize(
    ("nat", "local", "links", "says"),
    [
        ("none", LOCAL, [], "expect direct links, as no NAT"),
        ("none", ("127.0.0.1", 1), [], "on this machine"),
        ("none", ("::1", 1), [], "on this machine"),
        ("preserving", LOCAL, [], "expect direct links, except"),
        ("changed", LOCAL, [], "expect relayed links"),
        ("endpoint_independent", LOCAL, [], "expect relayed links"),
        ("symmetric", LOCAL, [], "expect relayed links"),
        ("symmetric", LOCAL, [link("direct")], "every link of this rank is direct"),
        ("symmetric", LOCAL, [link("direct"), link("relay")], "rank 1 go through the server"),
        ("preserving", LOCAL, [link("relay")], "the NAT of the other end"),
    ],
)
def test_what_to_expect(nat: Nat, local: Address, links: list[LinkFound], says: str) -> None:
    text = outlook(nat, local, links)
    assert says in text
    assert text.endswith(".")
    assert ". " not in text


def test_numbers_and_strangers_words_for_people() -> None:
    assert [findings.time_text(s) for s in (0.00031, 0.0124, 1.25)] == ["0.31 ms", "12 ms", "1.2 s"]
    rates = [findings.rate_text(r) for r in (34_000, 812e6, 1.25e9)]
    assert rates == ["34 kB/s", "812 MB/s", "1.25 GB/s"]
    assert findings.plain("\x1b[31mred\r\n") == "·[31mred··"
    assert len(findings.plain("x" * 1000)) == 200


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"server": "host:port"}, "host:port"),
        ({"job": "j"}, "job, rank and size go together"),
        ({"job": "j", "rank": 0}, "job, rank and size go together"),
        ({"job": "j", "rank": 2, "size": 2}, "rank=2"),
        ({"job": "", "rank": 0, "size": 2}, "job must be"),
        ({"job": "j", "rank": 0, "size": 9}, "at most 8 ranks"),
        ({"job": "j", "rank": 0, "size": 0}, "size=0"),
        ({"token": "fmi3.1.x"}, "token: it admits one job only"),
        ({"job": "j", "rank": 0, "size": 2, "token": "fmi3.1.x"}, "not of the form"),
        ({"job": "j", "rank": 0, "size": 2, "token": "t", "secret": SECRET}, "token and secret"),
        ({"secret": b" "}, "secret is empty"),
        ({"admin_port": 65536}, "admin_port=65536"),
        ({"timeout": 0}, "timeout=0"),
        ({"wait": float("nan")}, "wait=nan"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Plan.make(**({"server": "127.0.0.1"} | arguments))


def test_for_ever_is_a_time_that_clocks_can_add_to() -> None:
    plan = Plan.make("h", timeout=float("inf"), wait=float("inf"))
    assert plan.request.timeout == plan.timeout < float("inf")


def test_a_plan_shows_no_secret() -> None:
    token = fmi_client.make_token(SECRET, job="j", size=2, expires=time.time() + 60)
    for given in ({"token": token}, {"secret": SECRET}):
        text = repr(Plan.make("h", job="j", rank=0, size=2, **given))
        assert token.split(".")[2] not in text
        assert SECRET.decode() not in text


# --------------------------------------------------------------------- real servers
async def checked(server: str, **arguments: Any) -> Report:
    arguments = {"admin_port": 0, "timeout": 5.0} | arguments
    return await asyncio.to_thread(run, Plan.make(server, **arguments))


def step(report: Report, name: str) -> Step:
    return next(step for step in report.steps if step.name == name)


def statuses(report: Report) -> dict[str, str]:
    return {step.name: step.status for step in report.steps}


def causes(report: Report) -> list[str | None]:
    return [step.cause for step in report.steps if step.status == "failed"]


ALONE = {
    **dict.fromkeys(
        ("resolve", "connect", "server", "authenticate", "round trip", "address", "NAT"), "ok"
    ),
    "links": "skipped",
}


async def test_all_is_well_and_running_jobs_notice_nothing() -> None:
    async with serving() as (server, address):
        waiting = asyncio.ensure_future(
            fmi_client.connect(address, job="check", rank=0, size=2, timeout=10)
        )
        report = await checked(address.replace("127.0.0.1", "localhost"))
        other = await fmi_client.connect(address, job="check", rank=1, size=2, timeout=10)
        comms = [await waiting, other]
        assert await asyncio.gather(*(comm.allreduce(1) for comm in comms)) == [2, 2]
        for comm in comms:
            await comm.close()
        assert server.counters.joined == 3
        assert not server.counters.refused
    assert statuses(report) == ALONE
    assert report.ok
    assert report.nat == "none"
    assert report.local == report.observed
    assert report.round_trip_seconds is not None
    assert "on this machine" in report.advice


async def test_the_report_is_json_with_stable_keys() -> None:
    async with serving() as (_, address):
        report = json.loads(json.dumps((await checked(address)).as_dict()))
    assert list(report) == [
        *("server", "ok", "advice", "round_trip_seconds", "local", "observed", "nat"),
        *("links", "steps"),
    ]
    assert report["server"] == address
    assert list(report["steps"][0]) == ["name", "status", "text", "seconds", "cause"]


async def test_a_slow_server_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (_, address):
        assert "median of 20" in step(await checked(address), "round trip").text
        monkeypatch.setattr(check, "ROUND_TRIP_SECONDS", 0)
        assert step(await checked(address), "round trip").text.endswith("median of 1")


async def test_steps_are_told_when_they_begin_and_end() -> None:
    told: list[tuple[str, str]] = []
    async with serving() as (_, address):
        await asyncio.to_thread(
            run,
            Plan.make(address, admin_port=0),
            lambda name, doing: told.append(("begin", name)),
            lambda step: told.append(("end", step.name)),
        )
    assert told == [(word, name) for name in ALONE for word in ("begin", "end")]


def token(expires: float = 60, job: str = "job", size: int = 1, secret: bytes = SECRET) -> str:
    return fmi_client.make_token(secret, job=job, size=size, expires=time.time() + expires)


JOB = {"job": "job", "rank": 0, "size": 1}


@pytest.mark.parametrize(
    ("arguments", "environment", "cause"),
    [
        ({}, None, "token_missing"),
        (JOB, None, "token_missing"),
        ({}, token(), "token_unused"),
        (JOB | {"token": token(-60)}, None, "token_expired"),
        (JOB | {"token": token(job="other")}, None, "token_wrong"),
        (JOB, token(size=2), "token_wrong"),
        ({"secret": SECRET + b"0"}, None, "secret_wrong"),
        ({"secret": SECRET + b"\n"}, token(), None),
        (JOB | {"secret": SECRET}, None, None),
        (JOB | {"token": token()}, token(-60), None),
        (JOB, token(), None),
    ],
    ids=[
        *("nothing", "nothing-for-a-job", "unused", "expired", "other-job", "other-size"),
        *("other-secret", "secret", "secret-for-a-job", "token", "environment"),
    ],
)
async def test_a_server_with_a_secret(
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    environment: str | None,
    cause: str | None,
) -> None:
    if environment:
        monkeypatch.setenv("FMI_TOKEN", environment)
    async with serving(SECRET) as (_, address):
        report = await checked(address, **arguments)
    assert causes(report) == ([cause] if cause else [])
    assert report.ok is (cause is None)
    # Without admission, there is still something to tell.
    assert step(report, "round trip").status == "ok"
    assert report.round_trip_seconds is not None
    assert report.nat == (None if cause else "none")


async def test_a_server_that_ends() -> None:
    async with serving() as (server, address):
        server.registry.draining = True
        report = await checked(address)
    assert causes(report) == ["draining"]


async def test_a_port_that_closed_while_the_admin_port_says_why() -> None:
    async def ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"GET /readyz ")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\ndraining\n")

    async with listening(ready) as port:
        report = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
        assert causes(report) == ["draining"]
    report = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
    assert causes(report) == ["refused"]


# ----------------------------------------------------------------- hostile listeners
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[int]:
    talks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with suppress(OSError), closing(writer):
            await talk(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    for task in talks:
        task.cancel()
    await asyncio.gather(*talks, return_exceptions=True)
    await asyncio.sleep(0)  # a transport closes in the next turn of the loop


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def says(data: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()

    return talk


def after_hello(*answers: frames.Message) -> Talk:
    """Say a message to each that comes, then read on."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        for answer in answers:
            await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
            writer.write(frames.encode(answer))
        await reader.read()

    return talk


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    await reader.read(4096)


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A frame of 256 bytes, a byte at a time: each read is fast, the whole never ends."""
    writer.write(b"\x00\x00\x01\x00")
    while True:
        writer.write(b"\x80")
        await writer.drain()
        await asyncio.sleep(0.02)


CHALLENGE = {"t": "challenge", "nonce": bytes(16)}


@pytest.mark.parametrize(
    ("talk", "where", "cause"),
    [
        (says(b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"), "server", "http"),
        (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "server", "ssh"),
        (says(b"\x15\x03\x03\x00\x02\x02\x46"), "server", "tls"),
        (says(b"\x1b[2J220 mail"), "server", "stranger"),
        (says(b"\x00\x00\x00\x01\x80"), "server", "stranger"),
        (says(b"\x00\x00"), "server", "stranger"),
        (says(b""), "server", "silent"),
        (hangs_up, "server", "closed"),
        (resets, "server", "closed"),
        (drips, "server", "stranger"),
        (after_hello({"t": "error", "code": "refused", "why": "\x1b[2J"}), "server", "stranger"),
        (after_hello(CHALLENGE), "authenticate", "lost"),
        (after_hello(CHALLENGE, {"t": "error", "code": "refused"}), "authenticate", "lost"),
        (
            after_hello(CHALLENGE, {"t": "error", "why": "\x1b[2Jfull"}),
            "authenticate",
            "turned_away",
        ),
    ],
)
async def test_what_is_no_server(talk: Talk, where: str, cause: str) -> None:
    start = time.monotonic()
    async with listening(talk) as port:
        report = await checked(f"127.0.0.1:{port}", timeout=0.6)
    assert time.monotonic() - start < 3
    failed = next(step for step in report.steps if step.status == "failed")
    assert (failed.name, failed.cause) == (where, cause)
    assert failed.text.isprintable()


async def test_nothing_listens() -> None:
    report = await checked(f"127.0.0.1:{closed_port()}")
    assert causes(report) == ["refused"]
    assert statuses(report) == {"resolve": "ok", "connect": "failed"}
    assert step(report, "connect").text.endswith("connection refused")


async def test_the_addresses_of_a_server_are_tried_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as (_, address):
        port = parse_endpoint(address)[1]
        found = (("127.0.0.9", port), ("127.0.0.1", port))
        monkeypatch.setattr(check, "resolve", lambda *_: found)
        report = await checked(f"fmi.example.org:{port}")
        assert report.ok
        assert step(report, "resolve").text == "fmi.example.org is 127.0.0.9, 127.0.0.1"
        assert step(report, "connect").text == f"127.0.0.1:{port} accepts connections"
    report = await checked(f"fmi.example.org:{port}")
    assert causes(report) == ["refused"]
    assert step(report, "connect").text == "; ".join(
        f"{ip}:{port}: connection refused" for ip, _ in found
    )


async def test_packets_vanish() -> None:
    """As behind a security group: a queue that is full drops what knocks."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        report = await checked(f"127.0.0.1:{full.getsockname()[1]}", timeout=0.5)
        for sock in waiting:
            sock.close()
    assert causes(report) == ["black_hole"]


@pytest.mark.parametrize(
    ("code", "cause"), [(socket.EAI_NONAME, "no_such_name"), (socket.EAI_AGAIN, "name_server")]
)
async def test_a_name_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    report = await checked("nowhere.invalid")
    assert causes(report) == [cause]
    assert statuses(report) == {"resolve": "failed"}


async def test_a_name_that_is_none() -> None:
    assert causes(await checked(f"{'x' * 64}.example.org")) == ["no_such_name"]


async def test_a_name_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10))
    assert causes(await checked("nowhere.invalid", timeout=0.05)) == ["name_server"]
    # The process can end all the same.
    assert [each.daemon for each in threading.enumerate() if each.name == "in time"] == [True]
    over.set()


# ---------------------------------------------------------------------------- NATs
@asynccontextmanager
async def translated(
    server: str, ip: str, keeps_port: bool, mapped: list[Address] | None = None
) -> AsyncIterator[str]:
    """Stand between a rank and the server as a NAT does: connect from `ip`; say so in `mapped`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((ip, writer.get_extra_info("peername")[1] if keeps_port else 0))
        await asyncio.get_running_loop().sock_connect(sock, parse_endpoint(server))
        if mapped is not None:
            mapped.append(sock.getsockname())
        inside, outside = await asyncio.open_connection(sock=sock)
        with closing(outside):
            await asyncio.gather(_copy(reader, outside), _copy(inside, writer))

    async with listening(talk) as entrance:
        yield f"127.0.0.1:{entrance}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.write_eof()


@pytest.mark.parametrize(
    ("keeps_port", "second", "kind"),
    [
        (True, None, "preserving"),
        (True, 0, "preserving"),
        (True, 1, "symmetric"),
        (False, None, "changed"),
        (False, 0, "endpoint_independent"),
        (False, 1, "symmetric"),
    ],
)
async def test_nats(keeps_port: bool, second: int | None, kind: Nat) -> None:
    """The admin port sees the port that the server sees, plus `second`; None: it is closed."""
    callers: list[int] = []
    mapped: list[Address] = []

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"GET /address ")
        callers.append(writer.get_extra_info("peername")[1])
        ip, port = mapped[-1]
        body = json.dumps({"address": ip, "port": port + (second or 0)})
        writer.write(f"HTTP/1.1 200 OK\r\n\r\n{body}".encode())

    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", keeps_port, mapped) as entrance,
        listening(tell) as second_port,
    ):
        admin_port = closed_port() if second is None else second_port
        report = await checked(entrance, admin_port=admin_port)
    assert report.ok
    assert report.nat == kind
    assert report.observed is not None
    assert report.observed[0] == "127.0.0.2"
    assert report.local is not None
    # The same socket address asked both ports, or nothing would follow from the answers.
    assert callers == ([] if second is None else [report.local[1]])
    found = step(report, "NAT")
    assert found.status == ("ok" if kind == "preserving" else "warning")
    assert ("only one server port" in found.text) is (second is None)


async def test_without_a_nat_one_port_is_enough() -> None:
    asked = []

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())

    async with serving() as (_, address), listening(tell) as second_port:
        assert (await checked(address, admin_port=second_port)).nat == "none"
    assert not asked


TOLD = b'{"address": "192.0.2.7", "port": 1}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (TOLD, True),
        (b"", False),
        (b"404: Not Found", False),
        (b"[]", False),
        (b'{"address": "name", "port": 1}', False),
        (b'{"address": "192.0.2.7", "port": 1e999}', False),
        (b'{"address": "192.0.2.7", "port": null}', False),
        (TOLD + b" " * 10_000, False),
    ],
)
async def test_what_the_admin_port_says(body: bytes, told: bool) -> None:
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        await writer.drain()

    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", True) as entrance,
        listening(tell) as second_port,
    ):
        report = await checked(entrance, admin_port=second_port)
    assert report.ok
    assert report.nat == ("symmetric" if told else "preserving")


async def test_the_servers_own_admin_port() -> None:
    async with (
        serving() as (server, address),
        translated(address, "127.0.0.2", True) as entrance,
    ):
        runner, port = await admin.start(server, "127.0.0.1", 0)
        report = await checked(entrance, admin_port=port)
        server.registry.draining = True
        ending = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
        await runner.cleanup()
    assert report.nat == "symmetric"  # it is not behind what stands before the other port
    assert causes(ending) == ["draining"]


async def test_peers_do_not_wait_for_an_admin_port_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "ADMIN_SECONDS", 0.05)
    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", True) as entrance,
        listening(drips) as second_port,
    ):
        report = await checked(entrance, admin_port=second_port, timeout=5)
    assert step(report, "NAT").seconds < 2
    assert "only one server port" in step(report, "NAT").text


async def test_the_admin_port_tells_whom_the_server_does_not_admit() -> None:
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"address": "192.0.2.7", "port": 1}')

    async with serving(SECRET) as (_, address), listening(tell) as second_port:
        report = await checked(address, admin_port=second_port)
    assert causes(report) == ["token_missing"]
    assert report.nat == "changed"


# --------------------------------------------------------------------------- links
async def check_ranks(*servers: str, **arguments: Any) -> list[Report]:
    """Run a check as each rank of a job, each at its own entrance to the server."""
    size = len(servers)
    common = {"job": "links", "size": size, "wait": 10.0} | arguments
    return await asyncio.gather(
        *(checked(server, rank=rank, **common) for rank, server in enumerate(servers))
    )


async def test_links_are_measured() -> None:
    async with serving() as (_, address):
        reports = await check_ranks(address, address, address)
    for rank, report in enumerate(reports):
        assert report.ok
        assert report.advice == "All is well: every link of this rank is direct."
        assert [link.peer for link in report.links] == [r for r in range(3) if r != rank]
        for link in report.links:
            assert link.kind == "direct"
            assert 0 < link.round_trip_seconds < 1
            other = next(each for each in reports[link.peer].links if each.peer == rank)
            assert link.send_bytes_per_second == other.receive_bytes_per_second > 1e5
            assert link.round_trip_seconds == other.round_trip_seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_tells_its_own_sending_from_receiving(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    class Comm:
        def stats(self) -> Any:
            return {"links": {1 - rank: {"kind": "direct"}}}

    comm: Any = Comm()
    comm.rank = rank
    monkeypatch.setattr(linktest, "_round_trip", lambda *_: 0.5)
    monkeypatch.setattr(linktest, "_rate", lambda comm, peer, lead, _: 1.0 if lead else 2.0)
    assert linktest.measure(comm, 1 - rank) == LinkFound(1 - rank, "direct", 0.5, 1.0, 2.0)


class SlowLink:
    """A peer that answers over a link of known quality, in time that does not pass."""

    def __init__(self, rate: float, round_trip: float) -> None:
        self.rate, self.round_trip = rate, round_trip
        self.now = 0.0
        self.sent: list[int] = []
        self.told = 0.0

    def perf_counter(self) -> float:
        return self.now

    def send(self, data: bytes | float, peer: int) -> None:
        if isinstance(data, float):
            self.told = data
        elif data:
            self.now += len(data) / self.rate + self.round_trip / 2
            self.sent.append(len(data))

    def recv(self, peer: int) -> bytes:
        self.now += self.round_trip / 2
        return bytes(8)


@pytest.mark.parametrize(
    ("rate", "round_trip", "pings", "largest"),
    [
        (10e9, 0.0001, 50, 16 << 20),
        (10e6, 0.05, 20, 1 << 20),
        (10e3, 0.3, 4, 64 << 10),
    ],
)
def test_a_slow_link_is_asked_for_less(
    monkeypatch: pytest.MonkeyPatch, rate: float, round_trip: float, pings: int, largest: int
) -> None:
    link: Any = SlowLink(rate, round_trip)
    monkeypatch.setattr(linktest, "time", link)
    found = linktest._round_trip(link, 1, lead=True)
    assert found == link.told == pytest.approx(round_trip, rel=0.1)
    assert len(link.sent) == pings
    link.sent.clear()
    found = linktest._rate(link, 1, True, found)
    assert found == link.told == pytest.approx(rate, rel=0.2)
    assert link.sent[-1] == largest


async def test_a_relayed_link_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = JoinRequest.hello
    nowhere = ("127.0.0.9", 9)  # instead of our own addresses, which nothing keeps a peer from
    monkeypatch.setattr(JoinRequest, "hello", lambda self, own: hello(self, (nowhere,)))
    async with (
        serving() as (server, address),
        translated(address, "127.0.0.2", False) as one,
        translated(address, "127.0.0.3", False) as other,
    ):
        reports = await check_ranks(one, other)
        assert server.relayed.pairs == 1
    for report in reports:
        assert report.ok
        assert [link.kind for link in report.links] == ["relay"]
        assert step(report, f"link {report.links[0].peer}").status == "warning"
        assert "go through the server" in report.advice


async def test_who_does_not_come_is_named() -> None:
    async with serving() as (_, address):
        report = await checked(address, job="j", rank=1, size=3, wait=0.2)
    assert causes(report) == ["missing"]
    assert report.advice.startswith("Start rank 0, 2 of 3 too")


async def test_a_rank_that_is_there_already() -> None:
    async with serving() as (server, address):
        other = asyncio.ensure_future(
            fmi_client.connect(address, job="j", rank=0, size=2, timeout=10)
        )
        while not server.registry.jobs:  # noqa: ASYNC110
            await asyncio.sleep(0)
        report = await checked(address, job="j", rank=0, size=2)
        assert causes(report) == ["rank_taken"]
        assert causes(await checked(address, job="j", rank=1, size=3)) == ["job_full"]
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


async def test_a_peer_that_leaves() -> None:
    async def leave(address: str) -> None:
        async with fmi_client.connect(address, job="j", rank=1, size=2, timeout=10):
            pass

    async with serving() as (_, address):
        report, _ = await asyncio.gather(checked(address, job="j", rank=0, size=2), leave(address))
    assert causes(report) == ["peer_lost"]
    assert "rank 1" in report.advice


async def other_work(comm: fmi_client.Communicator) -> None:
    await comm.allreduce(1)


async def other_messages(comm: fmi_client.Communicator) -> None:
    await comm.barrier()
    await comm.send(b"", 1)
    await comm.send({"not": "a number"}, 1)


@pytest.mark.parametrize("work", [other_work, other_messages])
async def test_a_peer_that_does_something_else(
    work: Callable[[fmi_client.Communicator], Awaitable[None]],
) -> None:
    async def join(address: str) -> None:
        with suppress(errors.FmiError):
            async with fmi_client.connect(address, job="j", rank=0, size=2, timeout=5) as comm:
                await work(comm)

    async with serving() as (_, address):
        report, _ = await asyncio.gather(checked(address, job="j", rank=1, size=2), join(address))
    assert causes(report) == ["mismatch"]
    assert "rank 0 does something else" in report.advice


async def test_a_peer_that_stops_answering() -> None:
    async with serving() as (_, address):
        joining = asyncio.ensure_future(
            fmi_client.connect(address, job="j", rank=1, size=2, timeout=10)
        )
        report = await checked(address, job="j", rank=0, size=2, timeout=1.0)
        await (await joining).close()
    assert causes(report) == ["stalled"]
    assert "rank 1" in report.advice


async def test_ranks_with_different_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (_, address):
        plans = []
        for rank in (0, 1):
            monkeypatch.setenv("FMI_KEY", f"{rank + 1:064x}")
            plans.append(
                Plan.make(address, job="j", rank=rank, size=2, admin_port=0, timeout=1.0, wait=10)
            )
        reports = await asyncio.gather(*(asyncio.to_thread(run, plan) for plan in plans))
    assert "key" in {cause for report in reports for cause in causes(report)}
    assert not any(report.ok for report in reports)
