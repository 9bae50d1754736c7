"""A rank in the lab: ``python -m tests.net.rank SERVER JOB SEAT SIZE TRIES``.

Joins one job after the other, uses all its links, and prints a JSON line for each job.
The seats take turns at being rank 0: who decides which connection lives may matter.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from fmi_client import sync
from fmi_client.errors import FmiError
from tests.support import KEY

PIECE = 1 << 16
PIECES = 16
"""A MiB each way, in pieces: none may be lost, or come before another."""

JOIN_SECONDS = 15.0
PATIENCE = 3.0
"""Seconds for the first barrier; a link is to be made within one."""

Record = dict[str, Any]


class WrongData(Exception):
    """What came is not what was sent."""


def payload(job: str, rank: int) -> bytes:
    return np.random.default_rng([rank, *job.encode()]).bytes(PIECE * PIECES)


def use(comm: sync.Communicator, job: str) -> float:
    """Make every link and prove it both ways; returns the seconds to the first barrier's end."""
    start = time.monotonic()
    comm.barrier(timeout=PATIENCE)
    seconds = time.monotonic() - start
    total = comm.allreduce(np.full(1000, comm.rank + 1.0))
    if not (total == comm.size * (comm.size + 1) / 2).all():
        raise WrongData("allreduce")
    mine = payload(job, comm.rank)
    pieces = [mine[start : start + PIECE] for start in range(0, len(mine), PIECE)]
    for step in range(1, comm.size):
        source, dest = (comm.rank - step) % comm.size, (comm.rank + step) % comm.size
        got = b"".join(comm.sendrecv(piece, dest, source) for piece in pieces)
        if got != payload(job, source):
            raise WrongData(f"sendrecv with rank {source}")
    comm.barrier()
    return seconds


def attempt(server: str, job: str, rank: int, size: int) -> Record:
    start = time.monotonic()
    try:
        with sync.connect(
            server, job=job, rank=rank, size=size, key=KEY, timeout=JOIN_SECONDS
        ) as comm:
            ready = time.monotonic()
            seconds = use(comm, job)
            links = comm.stats()["links"]
    except (FmiError, WrongData) as error:
        return {"error": type(error).__name__, "why": str(error), "took": time.monotonic() - start}
    kinds = {peer: link["kind"] for peer, link in links.items()}
    return {"linked": seconds, "joined": ready - start, "kinds": kinds}


def main(server: str, job: str, seat: int, size: int, tries: int) -> None:
    for number in range(tries):
        rank = (seat + number) % size
        record = attempt(server, f"{job}-{number}", rank, size)
        print(json.dumps({"rank": rank} | record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
