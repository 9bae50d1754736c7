"""Predicted against measured: ``python -m benchmarks.predicted WHERE --size 4``.

WHERE is a rendezvous server (host:port), or a folder or s3:// URL for the object channel. Every
rank is a process of its own. They calibrate a model, then each operation is timed on its slowest
rank (median of repetitions, each after a barrier); prints a Markdown table.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import Annotated, Any

import numpy as np
import typer

from fmi_client import sync
from fmi_client.model import OPERATIONS

SIZES = (1 << 10, 1 << 20, 16 << 20)
REPETITIONS = 7
SECONDS = 120


def be_rank(pipe: Any, where: dict[str, Any], rank: int, size: int) -> None:
    with sync.connect(job="predicted", rank=rank, size=size, timeout=SECONDS, **where) as comm:
        model = comm.calibrate()
        times = {(op, n): measure(comm, op, n) for op in OPERATIONS for n in sizes(op)}
        pipe.send((model, times))
        comm.barrier()


def sizes(op: str) -> tuple[int, ...]:
    return (0,) if op == "barrier" else SIZES


def measure(comm: sync.Communicator, op: str, nbytes: int) -> float:
    array = np.zeros(nbytes // 4, np.float32)
    arguments: dict[str, list[Any]] = {
        "barrier": [],
        "scatter": [[array] * comm.size],
        "alltoall": [[array] * comm.size],
    }
    seconds = []
    for _ in range(REPETITIONS):
        comm.barrier()
        start = time.perf_counter()
        getattr(comm, op)(*arguments.get(op, [array]))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(where: dict[str, Any], size: int) -> list[Any]:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = spawn.Pipe(duplex=False)
        processes.append(spawn.Process(target=be_rank, args=(theirs, where, rank, size)))
        processes[-1].start()
        pipes.append(ours)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results


def main(
    where: Annotated[str, typer.Argument(help="host:port, a folder, or s3://bucket/prefix.")],
    size: Annotated[int, typer.Option(min=2, help="Number of ranks.")] = 4,
) -> None:
    """Compare what the model predicts with what it takes."""
    store = "/" in where
    options = {"server": None, "channel": "object", "store": where} if store else {"server": where}
    ranks = run(options, size)
    model = ranks[0][0]
    print(
        f"{size} ranks: latency {model.latency * 1e6:,.0f} µs, bandwidth "
        f"{model.bandwidth / 1e6:,.0f} MB/s, reduction {model.reduction / 1e9:.1f} GB/s\n"
    )
    print("| operation | bytes | predicted ms | measured ms | measured / predicted |")
    print("|---|---|---|---|---|")
    for op, nbytes in ranks[0][1]:
        predicted = model.seconds(op, nbytes, size)
        measured = max(times[op, nbytes] for _, times in ranks)
        ratio = measured / predicted
        numbers = f"{predicted * 1e3:,.2f} | {measured * 1e3:,.2f} | {ratio:.2f}"
        print(f"| {op} | {nbytes:,} | {numbers} |")


if __name__ == "__main__":
    typer.run(main)
