"""The libraries that are compared, each behind the same few methods.

Every method does what a careful user of that library would write: memory is made once, arrays
are reduced and received in place.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

NAMES = ("sync", "async", "gloo", "mpi")
SECONDS = 120


class Peer:
    """One rank's side of a library; arrays are float32 and of the same length on all ranks."""

    rank: int
    size: int

    def barrier(self) -> Any:
        raise NotImplementedError

    def allreduce(self, array: Array) -> Any:
        """Sum into `array`."""
        raise NotImplementedError

    def gather(self, array: Array, parts: list[Array]) -> Any:
        """Collect everybody's `array` in `parts` at rank 0."""
        raise NotImplementedError

    def bcast(self, array: Array) -> Any:
        """Overwrite `array` with rank 0's."""
        raise NotImplementedError

    def repeat(self, operation: Callable[[], Any], count: int) -> float:
        """Run one of the above so often; returns the seconds of one."""
        start = time.perf_counter()
        for _ in range(count):
            operation()
        return (time.perf_counter() - start) / count


@contextmanager
def join(name: str) -> Iterator[Peer]:
    """Join the job that the environment describes (see `collectives.py`)."""
    if name == "sync":
        yield from _sync()
    elif name == "async":
        yield from _async()
    elif name == "gloo":
        yield from _gloo()
    else:
        yield _Mpi()


def _place() -> dict[str, Any]:
    names = {"job": str, "rank": int, "size": int}
    return {name: kind(os.environ[f"BENCH_{name.upper()}"]) for name, kind in names.items()}


class _Sync(Peer):
    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def barrier(self) -> Any:
        return self.comm.barrier()

    def allreduce(self, array: Array) -> Any:
        return self.comm.allreduce(array, out=array)

    def gather(self, array: Array, parts: list[Array]) -> Any:
        return self.comm.gather(array, out=parts if self.rank == 0 else None)

    def bcast(self, array: Array) -> Any:
        return self.comm.bcast(array, out=array)


def _sync() -> Iterator[Peer]:
    from fmi_client import sync

    with sync.connect(os.environ["BENCH_SERVER"], timeout=SECONDS, **_place()) as comm:
        yield _Sync(comm)


class _Async(_Sync):
    """The same methods, to be awaited."""

    def __init__(self, comm: Any, runner: asyncio.Runner) -> None:
        super().__init__(comm)
        self._runner = runner

    def repeat(self, operation: Callable[[], Any], count: int) -> float:
        async def loop() -> float:
            start = time.perf_counter()
            for _ in range(count):
                await operation()
            return (time.perf_counter() - start) / count

        return self._runner.run(loop())


def _async() -> Iterator[Peer]:
    import uvloop

    import fmi_client

    async def connect() -> Any:
        return await fmi_client.connect(os.environ["BENCH_SERVER"], timeout=SECONDS, **_place())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        comm = runner.run(connect())
        yield _Async(comm, runner)
        runner.run(comm.close())


class _Gloo(Peer):
    def __init__(self, dist: Any, rank: int, size: int) -> None:
        import torch

        self._tensor = torch.from_numpy
        self._dist, self.rank, self.size = dist, rank, size

    def barrier(self) -> None:
        self._dist.barrier()

    def allreduce(self, array: Array) -> None:
        self._dist.all_reduce(self._tensor(array))

    def gather(self, array: Array, parts: list[Array]) -> None:
        into = [self._tensor(part) for part in parts] if self.rank == 0 else None
        self._dist.gather(self._tensor(array), into)

    def bcast(self, array: Array) -> None:
        self._dist.broadcast(self._tensor(array), 0)


def _gloo() -> Iterator[Peer]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = _place()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['BENCH_FILE']}",
        rank=place["rank"],
        world_size=place["size"],
        timeout=timedelta(seconds=SECONDS),
    )
    yield _Gloo(dist, place["rank"], place["size"])
    dist.destroy_process_group()


class _Mpi(Peer):
    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self._all: Array | None = None

    def barrier(self) -> None:
        self._comm.Barrier()

    def allreduce(self, array: Array) -> None:
        self._comm.Allreduce(self._mpi.IN_PLACE, array)

    def gather(self, array: Array, parts: list[Array]) -> None:
        if self.rank == 0 and (self._all is None or self._all.size != array.size * self.size):
            self._all = np.empty(array.size * self.size, array.dtype)
        self._comm.Gather(array, self._all, root=0)

    def bcast(self, array: Array) -> None:
        self._comm.Bcast(array, root=0)
