"""Predicted against measured: ``python -m benchmarks.predicted [WHERE] --size 4``.

WHERE is a rendezvous server (host:port), or a folder or s3:// URL for the object channel; without
it a server is started. Every rank is a process of its own. They calibrate a model, then each
operation is timed on its slowest rank (median of repetitions, each after a barrier); prints what
stands in docs/channels.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.start import run_ranks, serve
from fmi_client import sync
from fmi_client.cost_model import OPERATIONS, Model

SIZES = (1 << 10, 1 << 20, 16 << 20)
REPETITIONS = 7
SECONDS = 120

Found = tuple[Model, dict[tuple[str, int], float]]
"""A rank's model, and the seconds of each operation and size."""


def be_rank(rank: int, size: int, where: dict[str, Any], sizes: Sequence[int]) -> Found:
    with sync.connect(job="predicted", rank=rank, size=size, timeout=SECONDS, **where) as comm:
        model = comm.calibrate()
        cases = [(op, n) for op in OPERATIONS for n in ((0,) if op == "barrier" else sizes)]
        times = {case: measure(comm, *case) for case in cases}
        comm.barrier()
    return model, times


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


def table(ranks: Sequence[Found]) -> str:
    """Return what all ranks found in Markdown, as it stands in docs/channels.md."""
    size, model = len(ranks), ranks[0][0]
    lines = [
        f"{size} ranks: latency {model.latency * 1e6:,.0f} µs, bandwidth "
        f"{model.bandwidth / 1e6:,.0f} MB/s, reduction {model.reduction / 1e9:.1f} GB/s",
        "",
        "| operation | bytes | predicted ms | measured ms | measured / predicted |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for op, nbytes in ranks[0][1]:
        predicted = model.seconds(op, nbytes, size)
        measured = max(times[op, nbytes] for _, times in ranks)
        ratios.append(measured / predicted)
        numbers = f"{predicted * 1e3:,.2f} | {measured * 1e3:,.2f} | {ratios[-1]:.2f}"
        lines.append(f"| {op} | {nbytes:,} | {numbers} |")
    lines += ["", f"Measured / predicted: {min(ratios):.2f} to {max(ratios):.2f}."]
    return "\n".join(lines)


def main(
    where: Annotated[
        str | None,
        typer.Argument(help="host:port, a folder, or s3://bucket/prefix  [default: a server here]"),
    ] = None,
    size: Annotated[int, typer.Option(min=2, help="Number of ranks.")] = 4,
) -> None:
    """Compare what the model predicts with what it takes."""
    with serve() if where is None else nullcontext(where) as place:
        options: dict[str, Any] = {"server": place}
        if "/" in place:
            options = {"server": None, "channel": "object", "store": place}
        print(table(run_ranks(size, be_rank, options, SIZES)))


if __name__ == "__main__":
    typer.run(main)
