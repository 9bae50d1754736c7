"""A rank that waits for a word: ``python -m tests.net.steps SERVER JOB RANK SIZE [STOP ...]``.

It prints the name of each STOP when it comes there, and goes on when it gets a line:

    joined   all ranks are there
    told     the server has just told it to punch; the line "deaf": it has not heard that
    linked   it has exchanged a message with the rank half the job away, and no other;
             the line may hold seconds for the allreduce that follows

Then it says in JSON how it ended, and how many seconds after its last stop.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from fmi_client import socket_endpoint, sync
from fmi_client.errors import FmiError
from fmi_client.socket_endpoint import SocketEndpoint
from tests.support import KEY

JOIN_SECONDS = 20.0
REJOIN_SECONDS = 4.0
"""Instead of 15: tests wait for the end of a rank's patience with a server that is gone."""
_began = time.monotonic()


def stop(name: str, stops: list[str]) -> str:
    global _began
    if name not in stops:
        return ""
    print(name, flush=True)
    word = sys.stdin.readline().strip()
    _began = time.monotonic()
    return word


def stop_when_told(stops: list[str]) -> None:
    punch = SocketEndpoint._punch

    def told(self: SocketEndpoint, instruction: Any) -> None:
        if stop("told", stops) != "deaf":
            punch(self, instruction)

    SocketEndpoint._punch = told  # type: ignore[method-assign]


def work(server: str, job: str, rank: int, size: int, stops: list[str]) -> dict[str, Any]:
    with sync.connect(server, job=job, rank=rank, size=size, key=KEY, timeout=JOIN_SECONDS) as comm:
        stop("joined", stops)
        comm.sendrecv(rank, (rank + size // 2) % size)
        patience = stop("linked", stops)
        total = comm.allreduce(np.full(100_000, rank + 1.0), timeout=float(patience or 10))
        comm.barrier()
        return {"total": total[-1], "kinds": {k["kind"] for k in comm.stats()["links"].values()}}


def main(server: str, job: str, rank: int, size: int, stops: list[str]) -> None:
    socket_endpoint.REJOIN_SECONDS = REJOIN_SECONDS
    stop_when_told(stops)
    try:
        result = work(server, job, rank, size, stops)
        result["kinds"] = sorted(result["kinds"])
    except FmiError as error:
        result = {"error": type(error).__name__, "why": str(error)}
    print(json.dumps(result | {"took": time.monotonic() - _began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
