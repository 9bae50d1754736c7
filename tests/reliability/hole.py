"""A rank whose link is about to swallow everything: ``python -m tests.reliability.hole SERVER
JOB RANK WHAT DRIVER``.

It says "linked", goes on at a line, and says how it ended and how many seconds after the line:

    receive   waits for a message
    exchange  sends a MiB and waits for one
    send      sends more than any window holds
    filled    has begun to do so before: the peer's window is closed when the hole opens
    compute   holds the GIL for `COMPUTE_SECONDS`, then waits for a message
    told      sends a message that the system takes at once, and then the same
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import time
from typing import Any

import numpy as np

import fmi_client
from fmi_client import sync
from fmi_client.errors import FmiError
from tests.support import KEY

COMPUTE_SECONDS = 12
MUCH = np.zeros(64 << 20, "u1")


def wait_for_line() -> float:
    print("linked", flush=True)
    sys.stdin.readline()
    return time.monotonic()


def call(comm: Any, what: str) -> Any:
    """Begin the operation that the hole is to end."""
    peer = 1 - comm.rank
    if what == "send":
        return comm.send(MUCH, peer, timeout=60)
    if what == "exchange":
        return comm.sendrecv(np.zeros(1 << 20, "u1"), peer, timeout=60)
    if what in ("compute", "told"):
        ctypes.PyDLL(None).sleep(COMPUTE_SECONDS)  # PyDLL: the GIL is not let go
    return comm.recv(peer, timeout=60)


def blocking(server: str, job: str, rank: int, what: str) -> None:
    with sync.connect(server, job=job, rank=rank, size=2, key=KEY) as comm:
        comm.sendrecv(1, 1 - rank)
        sent = comm.isend(MUCH, 1 - rank, timeout=60) if what == "filled" else None
        began = wait_for_line()
        try:
            if what == "told":
                comm.send(1, 1 - rank)
            if sent:
                sent.wait()
            call(comm, what)
        except FmiError as error:
            say(error, began)


async def awaited(server: str, job: str, rank: int, what: str) -> None:
    async with fmi_client.connect(server, job=job, rank=rank, size=2, key=KEY) as comm:
        await comm.sendrecv(1, 1 - rank)
        sent = asyncio.ensure_future(call(comm, "send")) if what == "filled" else None
        await asyncio.sleep(0)  # it begins
        began = wait_for_line()
        try:
            if what == "told":
                await comm.send(1, 1 - rank)
            if sent:
                await sent
            await call(comm, what)
        except FmiError as error:
            say(error, began)


def say(error: FmiError, began: float) -> None:
    took = time.monotonic() - began
    print(json.dumps({"error": type(error).__name__, "why": str(error), "took": took}), flush=True)


if __name__ == "__main__":
    server, job, rank, what, driver = sys.argv[1:]
    if driver == "awaited":
        asyncio.run(awaited(server, job, int(rank), what))
    else:
        blocking(server, job, int(rank), what)
