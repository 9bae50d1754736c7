"""Every collective once, for both drivers, and what it must give."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

import fmi_client


def _calls(comm: Any) -> Generator[Any, Any, list[Any]]:
    """Yield what each call returns; to be sent its result."""
    rank, size = comm.rank, comm.size
    big = np.full(300_000, rank + 1, "f4")
    yield comm.barrier()
    pairs = yield comm.split(rank // 2)
    return [
        (yield comm.bcast({"a": rank}, root=size - 1)),
        (yield comm.gather(rank, root=1)),
        (yield comm.allgather(np.arange(rank)))[-1].tolist(),
        (yield comm.scatter([r * r for r in range(size)] if rank == 0 else None)),
        (yield comm.reduce(rank, fmi_client.MAX)),
        float((yield comm.allreduce(big))[-1]),
        (yield comm.allreduce(np.float64(0.5))).item(),
        (yield comm.reduce_scatter(np.arange(size))).tolist(),
        (yield comm.alltoall([(rank, d) for d in range(size)]))[0],
        (yield comm.scan(1)),
        (yield comm.exscan(1)),
        (yield comm.sendrecv(rank, (rank + 1) % size, (rank - 1) % size)),
        (yield pairs.allreduce(rank)),
        len((yield comm.bcast(bytes(5_000_000)))),
        {link["kind"] for link in comm.stats()["links"].values()},
    ]


def blocking(comm: Any) -> Any:
    """Run it on a blocking communicator."""
    calls = _calls(comm)
    try:
        result = next(calls)
        while True:
            result = calls.send(result)
    except StopIteration as stop:
        return stop.value


async def awaited(comm: Any) -> Any:
    """Run it on an async one."""
    calls = _calls(comm)
    try:
        result = await next(calls)
        while True:
            result = await calls.send(result)
    except StopIteration as stop:
        return stop.value


def expected(rank: int, size: int, kind: str) -> list[Any]:
    """Return what `rank` must have got, over links of this kind."""
    return [
        {"a": size - 1},
        list(range(size)) if rank == 1 else None,
        list(range(size - 1)),
        rank * rank,
        size - 1 if rank == 0 else None,
        size * (size + 1) / 2,
        size / 2,
        [rank * size],
        (0, rank),
        rank + 1,
        rank if rank else None,
        (rank - 1) % size,
        sum(r for r in range(size) if r // 2 == rank // 2),
        5_000_000,
        {kind},
    ]
