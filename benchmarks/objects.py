"""The object channel on a store: ``python -m benchmarks.objects FOLDER_OR_S3_URL``.

Two ranks in processes of their own pass messages to and fro; prints a Markdown table with the
time of one message (half a round trip, median), its bandwidth, and the requests of both ranks
for each message. An S3 server other than AWS is named by AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.start import round_trip, run_ranks
from fmi_client import sync
from fmi_client.transport import store as stores

KIB, MIB = 1 << 10, 1 << 20
SIZES = {8: 60, KIB: 60, 64 * KIB: 40, MIB: 20, 16 * MIB: 8, 64 * MIB: 4}
"""Bytes, and how many round trips are timed."""

REQUESTS = {"put": "PUT", "get": "GET", "delete": "DELETE", "names": "LIST"}


class Counting:
    """A store that counts its requests."""

    def __init__(self, store: stores.Store, counts: Counter[str]) -> None:
        self._store, self._counts = store, counts

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self._counts[REQUESTS.get(name, "")] += 1
        found: Callable[..., Any] = getattr(self._store, name)
        return found


def be_rank(rank: int, size: int, url: str, job: str) -> dict[int, Any]:
    counts: Counter[str] = Counter()
    open_store = stores.open_store
    stores.open_store = lambda url: Counting(open_store(url), counts)
    results = {}
    with sync.connect(None, job=job, rank=rank, size=size, channel="object", store=url) as comm:
        for nbytes, count in SIZES.items():
            comm.barrier()
            counts.clear()
            seconds = [round_trip(comm, np.zeros(nbytes, "u1")) / 2 for _ in range(count)]
            results[nbytes] = (statistics.median(seconds), dict(counts), 2 * count)
        comm.barrier()
    return results


def main(url: Annotated[str, typer.Argument(help="A folder, or s3://bucket/prefix.")]) -> None:
    """Time messages through a store, and count its requests."""
    ranks = run_ranks(2, be_rank, url, f"bench-{time.time_ns()}")
    print("| bytes | ms | MB/s | " + " | ".join(REQUESTS.values()) + " |")
    print("|---|---|---|" + "---|" * len(REQUESTS))
    for nbytes in SIZES:
        seconds, _, messages = ranks[0][nbytes]
        total: Counter[str] = Counter()
        for each in ranks:
            total.update(each[nbytes][1])
        each_message = [f"{total[kind] / messages:.1f}" for kind in REQUESTS.values()]
        rate = f"{nbytes / seconds / 1e6:,.0f}" if nbytes >= 64 * KIB else ""
        print(f"| {nbytes:,} | {seconds * 1e3:.1f} | {rate} | " + " | ".join(each_message) + " |")


if __name__ == "__main__":
    typer.run(main)
