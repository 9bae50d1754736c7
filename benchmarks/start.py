"""What the benchmarks share: a server and ranks as processes of their own, and a round trip."""

from __future__ import annotations

import multiprocessing
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from fmi_client import sync

ROOT = Path(__file__).parents[1]


@contextmanager
def serve() -> Iterator[str]:
    """Run a rendezvous server; ranks come back until it listens."""
    port = random.randrange(20_000, 30_000)  # below those that the system gives to ranks
    options = ["--port", str(port), "--admin-port", "-1", "--log-level", "error"]
    command = [sys.executable, "-m", "rendezvous_server", *options]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, cwd=ROOT, stderr=log) as server:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(rank, size, *arguments)` in `size` processes; returns their results.

    Raises:
        EOFError: a rank died; its traceback is on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = spawn.Pipe(duplex=False)
            target = (theirs, function, rank, size, *arguments)
            processes.append(spawn.Process(target=_be_rank, args=target, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
        return results
    finally:
        for process in processes:
            process.kill()


def _be_rank(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    pipe.send(function(*arguments))


def round_trip(comm: sync.Communicator, array: Any) -> float:
    """Return the seconds of `array` from rank 0 to rank 1 and back."""
    start = time.perf_counter()
    if comm.rank == 0:
        comm.send(array, 1)
        comm.recv(1, out=array)
    else:
        comm.recv(0, out=array)
        comm.send(array, 0)
    return time.perf_counter() - start


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
