"""Ranks by the thousand that join and leave again: ``python -m benchmarks.joins``.

What a rank says is made by the client's own code; only what follows "ready" is left out. So a
process makes several thousand ranks a second, about as many as a server takes on one core.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, NamedTuple

import typer

from benchmarks.start import SECRET, Watched, run_ranks, watch
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import ClientSide, Ready

EXPIRES = 2**32
"""Tokens that do not expire while we measure, as Unix seconds."""

PROCESSES = 2
IN_FLIGHT = 64
JOB_SIZE = 4

LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER: what is closed is reset, as by a process that was killed behind a NAT that says so."""


class Rank:
    """One rank's connection: joins, is ready, leaves, and waits for the server to close."""

    def __init__(self, server: Address, job: str, rank: int, size: int) -> None:
        self.sock = sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Each process has an address of its own, or thousands of closed connections in a second
        # would leave no port of the one.
        sock.bind(
            (f"127.{1 + (os.getpid() >> 16)}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}", 0)
        )
        self.began = time.perf_counter()
        sock.connect(server)
        sock.setblocking(False)
        key = auth.admission_key(SECRET, job, size, EXPIRES)
        hello = Hello(job, size, rank, 0, EXPIRES, (sock.getsockname(),), auth.nonce())
        self.side = ClientSide(hello, auth.Token(EXPIRES, key))
        self.ready = 0.0
        """Seconds from the first packet to "ready"."""
        self.flush()

    def flush(self) -> None:
        if self.side.outgoing:
            self.sock.send(self.side.outgoing)
            self.side.outgoing.clear()

    def read(self) -> bool:
        """Take what has come; whether the server has closed."""
        data = self.sock.recv(65536)
        if not self.ready:
            if any(isinstance(event, Ready) for event in self.side.receive(data)):
                self.ready = time.perf_counter() - self.began
            self.flush()
        return not data

    def leave(self) -> None:
        self.side.leave()
        self.flush()

    def die(self) -> None:
        """End as the kernel ends it for a process that was killed with data unread."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.sock.close()


def jobs(prefix: str, count: int, size: int) -> Iterator[tuple[str, int, int]]:
    """Job, rank and size of `count` ranks, one job after the other."""
    return ((f"{prefix}-{n // size}", n % size, size) for n in range(count))


def join_all(
    server: Address, whom: Iterable[tuple[str, int, int]], in_flight: int, die_every: int = 0
) -> list[float]:
    """Let ranks join, `in_flight` at a time, and leave when they are ready.

    Args:
        die_every: every so many-th rank dies instead of leaving; 0: none.

    Returns:
        Seconds from each rank's first packet to its "ready".
    """
    poll, coming, open_ranks = select.epoll(), iter(whom), {}
    seconds: list[float] = []

    def begin(count: int) -> None:
        for job, rank, size in islice(coming, count):
            each = Rank(server, job, rank, size)
            open_ranks[each.sock.fileno()] = each
            poll.register(each.sock, select.EPOLLIN)

    begin(in_flight)
    while open_ranks:
        for number, _ in poll.poll():
            each = open_ranks[number]
            waiting, closed = not each.ready, each.read()
            if waiting and each.ready:
                seconds.append(each.ready)
                closed = bool(die_every) and len(seconds) % die_every == 0
                each.die() if closed else each.leave()
            if closed:
                del open_ranks[number]
                each.sock.close()
        begin(in_flight - len(open_ranks))
    poll.close()
    return seconds


class Burst(NamedTuple):
    """What many processes' ranks took together."""

    joins: int
    wall: float
    cpu: float
    """Seconds, of the clock and of the server's CPU, for joining and leaving."""

    @property
    def per_core(self) -> float:
        """Joins a second that one core takes that does nothing else."""
        return self.joins / self.cpu


def _burst(_rank: int, _size: int, server: Address, count: int) -> tuple[float, float]:
    start = time.monotonic()
    join_all(server, jobs(f"burst-{os.getpid()}", count, JOB_SIZE), IN_FLIGHT)
    return start, time.monotonic()


def burst(server: Watched, count: int, processes: int = PROCESSES) -> Burst:
    """Let `count` ranks in jobs of `JOB_SIZE` join and leave as fast as the server takes them."""
    before, each = server.cpu(), count // processes
    times = run_ranks(processes, _burst, parse_endpoint(server.address), each)
    wall = max(end for _, end in times) - min(start for start, _ in times)
    return Burst(each * processes, wall, server.cpu() - before)


def sequence(server: Watched, count: int, name: str) -> list[float]:
    """Seconds that each of `count` jobs of one rank took, one after the other."""
    return sorted(join_all(parse_endpoint(server.address), jobs(name, count, 1), 1))


def _crowd(process: int, processes: int, server: Address, size: int) -> tuple[float, float, int]:
    start = time.monotonic()
    mine = ((f"crowd-{size}", rank, size) for rank in range(process, size, processes))
    seconds = join_all(server, mine, size, die_every=1)
    return start, start + max(seconds), len(seconds)


def crowd(server: Watched, size: int, processes: int = PROCESSES) -> float:
    """Seconds in which all `size` ranks of one job join: from the first packet to "ready"."""
    times = run_ranks(processes, _crowd, parse_endpoint(server.address), size)
    assert sum(ready for *_, ready in times) == size
    first = min(start for start, *_ in times)
    return float(max(end for _, end, _ in times) - first)


def main(
    joins: Annotated[int, typer.Option(min=PROCESSES, help="Ranks, in jobs of four.")] = 20_000,
    size: Annotated[int, typer.Option("--crowd", min=1, help="Ranks of one job.")] = 10_000,
) -> None:
    """Measure how many ranks a server takes in a second, and how soon all of one job are in."""
    with watch() as server:
        done = burst(server, joins)
        print(f"{done.joins / done.wall:,.0f} joins/s, {done.per_core:,.0f} per core of the server")
        seconds = sequence(server, 1000, "sequence")
        print(
            f"one after the other: p50 {seconds[500] * 1e3:.2f} ms, p99 {seconds[990] * 1e3:.2f} ms"
        )
        print(f"{size} ranks of one job: {crowd(server, size):.2f} s")


if __name__ == "__main__":
    typer.run(main)
