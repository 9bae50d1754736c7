"""What the relay costs: two ranks, directly linked and through the server, in turns.

::

    python -m benchmarks.relay              # 7 runs of each
    python -m benchmarks.relay --runs 15

Server and ranks are processes of their own on loopback; both kinds of link are measured in
the same run, one after the other, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import numpy as np
import typer

from benchmarks.start import round_trip, run_ranks, serve
from fmi_client.sync import Communicator, connect

MESSAGE_BYTES = 64_000_000
MESSAGES = 5
ROUND_TRIPS = 2000
KINDS = ("direct", "relay")


def one_way(comm: Communicator) -> float:
    """Return bytes per second from rank 0 to rank 1; the receiver's memory is warm."""
    message = np.ones(MESSAGE_BYTES, np.uint8)
    rates = []
    for _ in range(MESSAGES):
        comm.barrier()
        began = time.perf_counter()
        if comm.rank == 0:
            comm.send(message, 1)
            comm.recv(1)
        else:
            comm.recv(0, out=message)
            comm.send(None, 0)
        rates.append(MESSAGE_BYTES / (time.perf_counter() - began))
    return statistics.median(rates)


def be_rank(rank: int, size: int, address: str, kind: str) -> dict[str, float]:
    """Be one rank of a pair; returns the median seconds of a round trip, and bytes a second."""
    with connect(address, job=kind, rank=rank, size=size, channel=kind) as comm:
        comm.barrier()
        message = np.zeros(1)
        rtt = statistics.median(round_trip(comm, message) for _ in range(ROUND_TRIPS))
        figures = {"rtt": rtt, "rate": one_way(comm)}
        links = comm.stats()["links"]
        assert links[1 - rank]["kind"] == kind, links
    return figures


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return medians and ranges, and what one hop adds."""

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = ["| link | 64 MB one way, GB/s | 8 bytes there and back, µs |", "|---|---|---|"]
    for kind, runs in results.items():
        rates, rtts = [run["rate"] / 1e9 for run in runs], [run["rtt"] * 1e6 for run in runs]
        lines.append(f"| {kind} | {cell(rates)} | {cell(rtts)} |")
    pairs = zip(results["relay"], results["direct"], strict=True)
    hops = [(relayed["rtt"] - direct["rtt"]) / 2 * 1e6 for relayed, direct in pairs]
    lines.append(f"\nThrough the server a message takes {cell(hops)} µs longer each way.")
    return "\n".join(lines)


def main(runs: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 7) -> None:
    """Compare a direct link with one through the server."""
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with serve() as address:
        for _ in range(runs):
            for kind in KINDS:
                results[kind].append(run_ranks(2, be_rank, address, kind)[0])
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
