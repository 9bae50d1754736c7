"""What is sent to a rank that does not receive it takes no memory, of neither rank nor server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmi_client import sync
from fmi_client.communicator import Communicator
from fmi_client.errors import CollectiveTimeout, FmiError
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.peer import COLLECTIVE, Payload, head
from fmi_client.protocol.transfers import Receive
from tests.processes import fork, memory, running, server_process
from tests.reliability.conftest import Measured
from tests.support import run_ranks

pytestmark = pytest.mark.alone

MIB = 2**20
LIMIT = 16 * MIB
SENDER, RECEIVER, THIRD = range(3)

STUCK_SECONDS = 1.5
"""A send that takes longer stalls: 64 MiB pass a relay in a tenth of it."""


class Growth:
    """By how much the memory of processes grows at most, from now on."""

    def __init__(self, *pids: int) -> None:
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it is now
        self._before = {pid: memory(pid, "VmRSS") for pid in pids}

    def most(self) -> int:
        return max(memory(pid, "VmHWM") - before for pid, before in self._before.items())


STALLS = ("stopped", "computing", "elsewhere")
SENDS: dict[str, Callable[[int], Any]] = {
    "large": lambda total: np.ones(total, "u1"),
    "1 KiB": lambda total: np.ones(1024, "u1"),
    "empty": lambda total: b"",
}


def send_until_stuck(comm: sync.Communicator, message: Any, count: int) -> int:
    """Return how many of the messages have left."""
    for sent in range(count):
        try:
            comm.send(message, RECEIVER, timeout=STUCK_SECONDS)
        except CollectiveTimeout:
            return sent
    return count


def stall(comm: sync.Communicator, how: str) -> None:
    """Be in the job, and receive nothing of what is sent."""
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "elsewhere":
        with contextlib.suppress(FmiError):
            comm.recv(THIRD)


def grow(what: str, how: str, channel: str, total: int) -> tuple[int, int]:
    """Send to a rank that stalls.

    Returns:
        By how many bytes the sender, the receiver or the server grew, and the messages that left.
    """
    ready, sent = fork.Semaphore(0), fork.Semaphore(0)
    go, over, left = fork.Event(), fork.Event(), fork.Value("q", -1)

    def rank(comm: sync.Communicator) -> None:
        message, count = SENDS[what](total), 1 if what == "large" else total // 1024
        comm.alltoall([1] * comm.size)
        ready.release()
        if comm.rank == SENDER:
            go.wait()
            left.value = send_until_stuck(comm, message, count)
            sent.release()
        elif comm.rank == RECEIVER:
            stall(comm, how)
        over.wait()

    with (
        server_process() as server,
        running(server.address, 3, rank, channel=channel) as ranks,
    ):
        assert all(ready.acquire(timeout=20) for _ in ranks)
        growth = Growth(server.pid, *(ranks[r].process.pid for r in (SENDER, RECEIVER)))
        go.set()
        assert sent.acquire(timeout=60)
        return growth.most(), left.value


ALL = [(what, how, channel) for what in SENDS for how in STALLS for channel in ("auto", "relay")]


@pytest.mark.row(13)
@pytest.mark.parametrize(
    ("what", "how", "channel", "total"),
    [
        ("large", "computing", "relay", 64 * MIB),
        *(pytest.param(*case, 1024 * MIB, marks=pytest.mark.nightly) for case in ALL),
    ],
)
def test_what_nobody_receives_takes_no_memory(
    what: str, how: str, channel: str, total: int, measured: Measured
) -> None:
    grown, left = grow(what, how, channel, total)
    how_much = f"{total // MIB} MiB" if what == "large" else f"{total // 1024} messages ({what})"
    name = f"{how_much} to a rank that is {how}, channel {channel!r}: memory grows by"
    measured(name, grown / MIB, "MiB", "<= 16")
    assert left < (1 if what == "large" else total // 1024), "nothing has stalled"
    assert grown <= LIMIT


@pytest.mark.row(13)
@pytest.mark.parametrize("what", ["large", "1 KiB"])
async def test_in_one_loop_it_takes_none_either(what: str, measured: Measured) -> None:
    async def rank(comm: Communicator) -> int:
        message, count = SENDS[what](64 * MIB), 1 if what == "large" else 64 * 1024
        await comm.alltoall([1] * comm.size)
        if comm.rank == RECEIVER:
            await asyncio.wait([over], timeout=30)
        if comm.rank != SENDER:
            return 0
        growth = Growth(os.getpid())
        try:
            for _ in range(count):
                await comm.send(message, RECEIVER, timeout=STUCK_SECONDS)
        except CollectiveTimeout:
            return growth.most()
        finally:
            over.set_result(None)
        raise AssertionError("nothing has stalled")

    over = asyncio.get_running_loop().create_future()
    grown = max(await run_ranks(2, rank, "tcp"))
    measured(f"{what} messages in one loop: memory grows by", grown / MIB, "MiB", "<= 16")
    assert grown <= LIMIT


@pytest.mark.row(13)
@pytest.mark.parametrize("nbytes", [0, 1, 1000])
def test_an_inbox_knows_what_it_keeps(nbytes: int) -> None:
    """A million empty messages are not nothing, and a link stops reading when it is much."""
    inbox, count = Inbox(lambda size: memoryview(bytearray(size))), 1000
    payload = Payload(b"meta", [bytes(nbytes)])
    tracemalloc.start()
    try:
        for number in range(count):
            inbox.feed(head((COLLECTIVE, 0, number), b"signature", payload, nbytes) + bytes(nbytes))
        takes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert takes <= inbox.unexpected_bytes <= takes + 1024 * count
    for number in range(count):
        inbox.post(Receive((COLLECTIVE, 0, number), b"signature", None))
    assert inbox.unexpected_bytes == 0
