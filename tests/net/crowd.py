"""Many ranks, in little memory: ``python -m tests.net.crowd SERVER NAMESPACE ...``.

What a rank needs is loaded once; then one process for each namespace is forked, goes there
and joins. Prints a JSON line for each rank, with the ranks that it is linked to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time

import numpy as np

from fmi_client import sync
from tests.net.lab import inside
from tests.support import KEY

JOIN_SECONDS = 30.0


def work(server: str, rank: int, size: int) -> dict[str, object]:
    with sync.connect(
        server, job="crowd", rank=rank, size=size, key=KEY, timeout=JOIN_SECONDS
    ) as comm:
        ready = time.monotonic()
        comm.barrier()
        linked = time.monotonic() - ready
        total = comm.allreduce(np.full(1000, rank))
        parts = comm.gather(rank)
        links = {peer: link["kind"] for peer, link in comm.stats()["links"].items()}
        comm.barrier()  # or the first to leave would be missed by those who still link
    return {"rank": rank, "links": links, "linked": linked, "total": int(total[-1]), "parts": parts}


def live(server: str, rank: int, namespaces: list[str]) -> None:
    with inside(namespaces[rank]):
        result = work(server, rank, len(namespaces))
    os.write(1, json.dumps(result).encode() + b"\n")  # one write: lines do not mix


def main(server: str, namespaces: list[str]) -> None:
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=live, args=(server, r, namespaces)) for r in range(len(namespaces))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
