"""A server and a client that live long: ``python -m benchmarks.soak --minutes 30``.

Jobs begin at a steady rate. Rank 0 of each lives in one process, as in a warm worker; the others
are processes of their own, and some of them are killed wherever they are just then. After every
round the jobs are let end, and what the server and that one process hold is taken down.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

import fmi_client
from benchmarks.joins import EXPIRES, jobs, join_all
from benchmarks.start import SECRET, Watched, say, watch
from fmi_client.hosts import parse_endpoint

SIZES = (2, 3, 4, 6)
KILLED = 0.05
"""Of all ranks."""
RELAYED = 0.25
"""Of all jobs."""
TIMEOUT = 3.0
"""Seconds for joining and for each operation: how long the others wait for one killed early."""
LONGEST_LIFE = 0.1
"""Seconds within which those die that are to."""
HUNG_SECONDS = 30.0
SETTLE_SECONDS = 5.0
ROUNDS_OF_WORK = 5
KEY = bytes(32)

WARM_UP = 2000
"""Ranks that come and go before the first look: the server keeps the last 100 jobs that ended."""

FAILED = 10
"""Exit code of a rank that was told that its job failed."""


class Order(NamedTuple):
    """A job to run."""

    job: str
    size: int
    channel: str
    killed: dict[int, float]
    """Ranks that die, and after how many seconds."""

    def options(self, rank: int) -> dict[str, Any]:
        token = fmi_client.make_token(SECRET, job=self.job, size=self.size, expires=EXPIRES)
        return {
            **{"job": self.job, "rank": rank, "size": self.size, "channel": self.channel},
            **{"key": KEY, "token": token, "timeout": TIMEOUT},
        }


class Held(NamedTuple):
    """What a process holds at one moment."""

    tasks: int
    descriptors: int
    rss: int
    """Bytes."""


class Sample(NamedTuple):
    """A look at a moment when no job runs."""

    seconds: float
    server: Held
    client: Held


class Record(NamedTuple):
    """What a soak found."""

    samples: list[Sample]
    jobs: int
    ranks: int
    killed: int
    ends: Counter[str]
    """How ranks ended: well, failed, killed, and what must not be: hung or another exit code."""


# ----------------------------------------------------------------- ranks that may be killed
def _be_rank(address: str, order: Order, rank: int) -> None:
    if rank in order.killed:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which is to die at once, as of SIGKILL
        signal.setitimer(signal.ITIMER_REAL, order.killed[rank])
    try:
        with fmi_client.sync.connect(address, **order.options(rank)) as comm:
            for number in range(ROUNDS_OF_WORK):
                if rank in order.killed and number == ROUNDS_OF_WORK - 1:
                    signal.pause()  # if it has not died on its way
                total = comm.allreduce(np.full(1000, rank))
                assert int(total[0]) == order.size * (order.size - 1) // 2
                comm.barrier()
    except fmi_client.FmiError:
        os._exit(FAILED)


def _fork_ranks(pipe: Connection, address: str) -> None:
    """Start ranks as told, and tell how each ended."""
    fork = multiprocessing.get_context("fork").Process
    running: dict[Any, float] = {}
    while True:
        if pipe.poll(0.02):
            order = pipe.recv()
            for rank in range(1, order.size):
                process = fork(target=_be_rank, args=(address, order, rank))
                process.start()
                running[process] = time.monotonic()
        for process in list(running):
            if process.exitcode is not None:
                pipe.send(_end(process.exitcode))
            elif time.monotonic() - running[process] > HUNG_SECONDS:
                process.kill()
                pipe.send("hung")
            else:
                continue
            del running[process]


def _end(code: int) -> str:
    known = {0: "well", FAILED: "failed", -signal.SIGALRM: "killed"}
    return known.get(code, f"exit code {code}")


@contextmanager
def _forker(address: str) -> Iterator[Connection]:
    """Run `_fork_ranks` in a process without sockets, which ranks would inherit."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_fork_ranks, args=(theirs, address)
    )
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


# -------------------------------------------------------------------- the one that stays
async def _be_first(address: str, order: Order) -> str:
    try:
        async with fmi_client.connect(address, **order.options(0)) as comm:
            for _ in range(ROUNDS_OF_WORK):
                await comm.allreduce(np.full(1000, 0))
                await comm.barrier()
    except fmi_client.FmiError:
        return "failed"
    return "well"


class _Soak:
    def __init__(self, server: Watched, forker: Connection, seed: int, idle: int) -> None:
        self._server, self._forker, self._idle = server, forker, idle
        self._random = random.Random(seed)
        self._ends: Counter[str] = Counter()
        self._jobs = self._ranks = 0

    def _order(self) -> Order:
        draw, size = self._random, self._random.choice(SIZES)
        probability = KILLED * size / (size - 1)  # rank 0 stays
        doomed = [rank for rank in range(1, size) if draw.random() < probability]
        self._jobs += 1
        self._ranks += size
        channel = "relay" if draw.random() < RELAYED else "auto"
        killed = {rank: draw.uniform(0.001, LONGEST_LIFE) for rank in doomed}
        return Order(f"soak-{self._jobs}", size, channel, killed)

    async def _round(self, seconds: float, count: int) -> None:
        loop = asyncio.get_running_loop()
        start, first = loop.time(), []
        for number in range(count):
            order = self._order()
            self._forker.send(order)
            first.append(asyncio.create_task(_be_first(self._server.address, order)))
            await asyncio.sleep(start + (number + 1) * seconds / count - loop.time())
        self._ends.update(await asyncio.gather(*first))
        while self._ends.total() < self._ranks:
            if self._forker.poll():
                self._ends[self._forker.recv()] += 1
            await asyncio.sleep(0.01)

    async def _look(self, start: float) -> Sample:
        """Wait until the server has seen all go, and look."""
        async with asyncio.timeout(HUNG_SECONDS):
            while True:
                said = await asyncio.to_thread(self._server.metrics)
                if not said["rendezvous_open_connections"] + said["rendezvous_jobs"]:
                    break
                await asyncio.sleep(0.05)
        server = await self._settled(int(said["rendezvous_tasks"]))
        client = _held(os.getpid(), len(asyncio.all_tasks()))
        return Sample(time.monotonic() - start, server, client)

    async def _settled(self, tasks: int) -> Held:
        """Look once more while there are more descriptors than before the first rank.

        What is closed just now, as our own question, is not held. A leak stays.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while (held := _held(self._server.pid, tasks)).descriptors > self._idle:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        return held

    async def run(self, rounds: int, seconds: float, count: int) -> Record:
        start, samples = time.monotonic(), []
        for number in range(rounds + 1):
            await self._round(seconds, count)
            samples.append(await self._look(start))
            say(f"round {number}: {samples[-1]}, {dict(self._ends)}")
        return Record(samples, self._jobs, self._ranks, self._ends["killed"], self._ends)


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _held(pid: int, tasks: int) -> Held:
    return Held(tasks, len(os.listdir(f"/proc/{pid}/fd")), resident(pid))


def soak(rounds: int, seconds: float, count: int, seed: int = 0) -> Record:
    """Run `count` jobs in each of `rounds` of so many `seconds`, after one to warm up."""
    with watch() as server, _forker(server.address) as forker:
        idle = _held(server.pid, 0).descriptors
        join_all(parse_endpoint(server.address), jobs("warm", WARM_UP, 4), 32, die_every=20)
        return asyncio.run(_Soak(server, forker, seed, idle).run(rounds, seconds, count))


def slope(samples: list[Sample], seconds: float = 1200.0) -> float:
    """Bytes by which the server grows in so many seconds: the line through all samples."""
    times = [sample.seconds for sample in samples]
    per_second, _ = np.polyfit(times, [sample.server.rss for sample in samples], 1)
    return float(per_second) * seconds


def main(
    minutes: Annotated[int, typer.Option(min=1, help="How long.")] = 30,
    count: Annotated[int, typer.Option("--jobs", min=1, help="Jobs in a minute.")] = 100,
    seed: Annotated[int, typer.Option(help="Of what is drawn: sizes, and who dies when.")] = 0,
) -> None:
    """Run jobs some of whose ranks are killed; prints how they ended, and what is still held."""
    record = soak(minutes, 57.0, count, seed)
    first, last = record.samples[0], record.samples[-1]
    print(f"{record.jobs} jobs, {record.ranks} ranks, {record.killed} killed: {dict(record.ends)}")
    print(f"server: {first.server} -> {last.server}")
    print(f"client: {first.client} -> {last.client}")
    print(f"slope of the server: {slope(record.samples) / 2**20:.2f} MiB in 20 minutes")


if __name__ == "__main__":
    typer.run(main)
