"""What the relay costs: two ranks, directly linked and through the server, in turns.

::

    python -m benchmarks.relay              # 7 runs of each
    python -m benchmarks.relay --runs 15

Server and ranks are processes of their own on loopback; both kinds of link are measured in
the same run, one after the other, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from fmi_client.sync import Communicator, connect
from fmi_client.transport.punch import Punch

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


def round_trip(comm: Communicator) -> float:
    """Return the median seconds of 8 bytes there and back."""
    message = np.zeros(1)
    taken = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        if comm.rank == 0:
            comm.send(message, 1)
            comm.recv(1, out=message)
        else:
            comm.recv(0, out=message)
            comm.send(message, 0)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def be(rank: int, address: str, kind: str) -> None:
    """Be one rank; rank 0 prints what it measured."""
    if kind == "relay":
        Punch._attempt = lambda *_: None  # type: ignore[method-assign]
    with connect(address, job=f"{kind} {os.getppid()}", rank=rank, size=2) as comm:
        comm.barrier()
        figures = {"rtt": round_trip(comm), "rate": one_way(comm)}
        links = comm.stats()["links"]
        assert links[1 - rank]["kind"] == kind, links
        if rank == 0:
            print(json.dumps(figures))


def measure(address: str, kind: str) -> dict[str, float]:
    """Run one pair of processes."""
    command = [sys.executable, "-m", "benchmarks.relay", "--at", address, "--kind", kind]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    figures: dict[str, float] = json.loads(outputs[0])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=7)
    for hidden in ("--rank", "--at", "--kind"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        be(int(arguments.rank), arguments.at, arguments.kind)
        return
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "-1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        listening: dict[str, Any] = json.loads(server.stderr.readline())
        address = f"127.0.0.1:{listening['port']}"
        results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.runs):
            for kind in KINDS:
                results[kind].append(measure(address, kind))
        print(table(results))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
