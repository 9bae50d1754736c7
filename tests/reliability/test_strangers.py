"""Who has proved nothing gets nothing: no time, no memory, no answer, no rank's place."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from statistics import median

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fmi_client.protocol.frames import encode
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import AUTH_SECONDS, Ready
from rendezvous_server.listen import MAX_HTTP
from rendezvous_server.strangers import Strangers, source
from tests.processes import ServerProcess, memory, server_process
from tests.reliability.conftest import Measured
from tests.reliability.strangers import (
    HELLO,
    ended,
    enter,
    knock,
    need_descriptors,
    reset,
    until,
)
from tests.support import serving

pytestmark = pytest.mark.alone

TINY = b"\0" + encode(HELLO.encode() | {"job": "a", "nonce": bytes(16)})


def ask(server: ServerProcess, path: str) -> tuple[float, str]:
    start = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.admin_port}{path}", timeout=5) as answer:
        text = answer.read().decode()
    return time.perf_counter() - start, text


def gauge(server: ServerProcess, name: str) -> float:
    found = re.search(rf"^rendezvous_{name} (\S+)$", ask(server, "/metrics")[1], re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def pair_joins(port: int, name: str) -> float:
    """Two ranks join; returns the seconds until both are told that all are there."""
    start = time.perf_counter()
    first, _ = enter(port, name, 0, 2)
    second, events = enter(port, name, 1, 2)
    if not any(isinstance(event, Ready) for event in events):
        assert second.recv(65536), "cut off before ready"
    seconds = time.perf_counter() - start
    reset(first)
    reset(second)
    return seconds


# ---------------------------------------------------------------------------- silence
@pytest.mark.row(2)
@pytest.mark.row(1)
def test_silent_and_slow_strangers_are_cut_and_disturb_nobody(measured: Measured) -> None:
    if why := need_descriptors(3000):
        pytest.skip(why)
    with server_process() as server, DefaultSelector() as selector:
        came: dict[socket.socket, float] = {}
        for n in range(2000):
            sock = knock(server.port)
            came[sock] = time.monotonic()
            selector.register(sock, EVENT_READ, n)
        slow = list(came)[:20]
        waits = sorted(pair_joins(server.port, f"pair {n}") for n in range(200))
        measured("p99 of a pair's join among 2,000 silent", waits[197] * 1e3, "ms", "< 50")
        lives = []
        drip, dripped = iter(range(10)), time.monotonic()
        while len(lives) < 2000:
            for key, _ in selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                selector.unregister(key.fileobj)
                assert ended(key.fileobj) == b""
                lives.append(time.monotonic() - came[key.fileobj])
            if time.monotonic() - dripped >= 1 and next(drip, None) is not None:
                dripped += 1
                for each in slow:  # a byte a second: a hello that never ends
                    with suppress(OSError):
                        each.sendall(b"\0")
        for each in came:
            each.close()
        measured("a silent stranger's life, shortest", min(lives), "s", "5 ± 0.5")
        measured("a silent or slow stranger's life, longest", max(lives), "s", "5 ± 0.5")
        assert waits[197] < 0.05
        assert min(lives) > AUTH_SECONDS - 0.5
        assert max(lives) < AUTH_SECONDS + 0.5
        assert gauge(server, "handshake_timeouts_total") == 2000


# ----------------------------------------------------------------------------- resets
@pytest.mark.row(3)
def test_resets_leave_nothing_behind(measured: Measured) -> None:
    with server_process() as server:
        pair_joins(server.port, "first")
        until(lambda: gauge(server, "open_connections") == 0)
        before = server.descriptors()
        for n in range(5000):
            reset(knock(server.port, (b"", TINY, b"GET /")[n % 3]))
        until(lambda: gauge(server, "open_connections") == 0)
        until(lambda: abs(server.descriptors() - before) <= 2)
        more = server.descriptors() - before
        measured("descriptors more after 5,000 resets", more, "", "± 2")
        assert abs(more) <= 2
        pair_joins(server.port, "last")


# ------------------------------------------------------------------------ descriptors
def until_pair_joins(port: int) -> float:
    """Let a pair try until it is let in; returns the seconds that it took."""
    start = time.monotonic()
    while True:
        with suppress(ConnectionError):
            pair_joins(port, "pair")
            return time.monotonic() - start
        assert time.monotonic() - start < 5


@pytest.mark.row(4)
def test_a_pair_joins_though_strangers_want_all_descriptors(measured: Measured) -> None:
    with server_process(descriptors=256) as server:
        silent = [knock(server.port) for _ in range(400)]
        seconds = until_pair_joins(server.port)
        measured("served after a flood at 256 descriptors", seconds, "s", "< 2")
        assert seconds < 2
        assert server.descriptors() < 256
        assert gauge(server, "crowded_out_total") > 0
        for sock in silent:
            sock.close()


@pytest.mark.row(4)
def test_where_ranks_have_all_places_they_keep_them_and_others_come_after(
    measured: Measured,
) -> None:
    with server_process(descriptors=256) as server:
        ranks = []
        with suppress(ConnectionError):
            for n in range(256):
                ranks.append(enter(server.port, "full", n, 1000)[0])
        assert 100 < len(ranks) < 250
        until(lambda: gauge(server, "ranks") == len(ranks))
        for each in ranks:
            reset(each)
        seconds = until_pair_joins(server.port)
        measured("served after ranks left, at 256 descriptors", seconds, "s", "< 2")
        assert seconds < 2


def test_who_makes_room() -> None:
    strangers: Strangers[int] = Strangers(room=5)
    for n, host in enumerate(("10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.2")):
        strangers.add(n, source(host), float(n))
    assert not strangers.crowded
    strangers.add(4, source("10.0.0.1"), 4.0)
    assert strangers.crowded
    assert strangers.next_to_go(source("10.0.0.2")) == 1  # it has more than half
    assert strangers.next_to_go(source("10.0.0.1")) == 0
    assert strangers.next_to_go(source("10.0.0.3")) == 0
    assert strangers.late(1.0) == [0, 1]
    assert strangers.discard(0) == 0.0
    assert strangers.discard(0) is None
    assert strangers.next_deadline == 1.0
    assert source("2001:db8::1") == source("2001:db8:0:0:ffff::") != source("2001:db8:0:1::1")


# ------------------------------------------------------------ memory, and HTTP meanwhile
@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[ServerProcess, float]]:
    """A server with 5,000 waiting ranks, and the KiB that each takes."""
    if why := need_descriptors(6000):
        pytest.skip(why)
    with server_process() as server:
        pair_joins(server.port, "first")
        ask(server, "/metrics")
        before = memory(server.pid, "VmRSS")
        waiting = [enter(server.port, "job", rank, 5001)[0] for rank in range(5000)]
        yield server, (memory(server.pid, "VmRSS") - before) / 1024 / 5000
        for sock in waiting:
            reset(sock)


@pytest.mark.row(5)
def test_five_thousand_wait_in_little_memory(
    crowd: tuple[ServerProcess, float], measured: Measured
) -> None:
    server, each = crowd
    measured("memory of a waiting rank, of 5,000", each, "KiB", "≤ 4")
    assert gauge(server, "ranks") == 5000
    assert each <= 4


@pytest.mark.row(16)
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_operators_are_answered_meanwhile(
    crowd: tuple[ServerProcess, float], path: str, measured: Measured
) -> None:
    times = sorted(ask(crowd[0], path)[0] for _ in range(9))
    measured(f"{path} with 5,000 waiters, slowest of 9", times[-1] * 1e3, "ms", "< 50")
    assert median(times) < 0.05  # one of them may meet neighbours on a busy machine


@pytest.mark.row(16)
def test_names_follow_the_conventions_of_prometheus() -> None:
    with server_process() as server:
        text = ask(server, "/metrics")[1]
    families = list(text_string_to_metric_families(text))
    assert len(families) > 10
    for family in families:
        assert re.fullmatch(r"rendezvous(_[a-z]+)+", family.name)
        assert family.documentation
        assert not re.search(r"_(total|count|sum|bucket|info)$", family.name), "a reserved suffix"
        assert not re.search(r"(milli|kilo|_kb|_ms|minutes)", family.name), "no base unit"
        for sample in family.samples:
            assert sample.name == family.name + "_total" * (family.type == "counter")
    assert {family.type for family in families} == {"counter", "gauge"}


@pytest.mark.row(16)
def test_many_silent_ones_do_not_keep_operators_out() -> None:
    with server_process() as server:
        viewer = knock(server.admin_port, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert viewer.recv(15) == b"HTTP/1.1 200 OK"
        silent = [knock(server.admin_port, b"GET /livez HTTP/1.1\r\n") for _ in range(300)]
        assert ask(server, "/livez")[1] == "ok\n"
        until(lambda: server.descriptors() < 2 * MAX_HTTP)
        viewer.setblocking(False)
        with suppress(BlockingIOError):  # it is still told; one that was cut off reads an end
            while True:
                assert viewer.recv(65536)
        for sock in [viewer, *silent]:
            sock.close()


# ---------------------------------------------------------------------- amplification
BAD = struct.pack("!I", 2**32 - 1)


@pytest.mark.row(7)
@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\0" + BAD, b"\0" + struct.pack("!I", 4097)),
        *(TINY[:-1], TINY, TINY + BAD, TINY + encode({"t": ""}), TINY + TINY[1:]),
        *(TINY + encode({"t": "proof", "mac": bytes(32)}), relay_request(bytes(16))),
        b"\0" + encode({"t": "hello"}),
    ],
    ids=lambda said: f"{len(said)}-{said[-4:].hex()}",
)
async def test_strangers_are_told_no_more_than_they_say(said: bytes) -> None:
    async with serving(b"0123456789abcdef") as (_, address):

        def talk() -> int:
            with knock(int(address.rpartition(":")[2]), said) as sock:
                sock.shutdown(socket.SHUT_WR)
                return len(ended(sock))

        told = await asyncio.to_thread(talk)
    assert told <= len(said)


@pytest.mark.row(7)
def test_frames_over_the_limit_are_not_allocated(measured: Measured) -> None:
    with server_process() as server:
        pair_joins(server.port, "first")
        before = memory(server.pid, "VmHWM")
        for announced in (4097, 2**32 - 1):
            for _ in range(200):
                with knock(server.port) as sock, suppress(ConnectionError):
                    sock.sendall(b"\0" + struct.pack("!I", announced) + bytes(4000))
                    assert ended(sock) == b""
        grown = (memory(server.pid, "VmHWM") - before) / 2**20
        measured("memory after 200 frames of 4 GiB announced", grown, "MiB", "< 4")
        assert grown < 4
        assert gauge(server, "refusals_total") == 400


# ----------------------------------------------------------------------- dead waiters
@pytest.mark.row(8)
def test_nobody_is_paired_with_the_dead(measured: Measured) -> None:
    with server_process() as server:
        paired = 0
        for n in range(1000):
            dead, _ = enter(server.port, f"job {n}", 0, 2)
            if n % 2:
                reset(dead)
            else:
                dead.close()
            # At once: the newcomer's handshake begins after the death, and no sooner.
            newcomer, events = enter(server.port, f"job {n}", 1, 2)
            paired += any(isinstance(event, Ready) for event in events)
            reset(newcomer)
        measured("newcomers paired with a dead one, of 1,000", paired, "", "0")
        assert paired == 0


@pytest.mark.row(8)
def test_a_dead_waiter_is_gone_at_once(measured: Measured) -> None:
    with server_process() as server:
        times = []
        for n in range(20):
            dead, _ = enter(server.port, f"job {n}", 0, 2)
            until(lambda: gauge(server, "ranks") == 1)
            (reset if n % 2 else socket.socket.close)(dead)
            times.append(until(lambda: gauge(server, "ranks") == 0))
        measured("a dead waiter is gone after, median of 20", median(times) * 1e3, "ms", "< 100")
        assert median(times) < 0.1
