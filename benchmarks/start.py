"""What the benchmarks share: a server and ranks as processes of their own, and a round trip."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from fmi_client import sync

ROOT = Path(__file__).parents[1]
SERVER = (sys.executable, "-m", "rendezvous_server")
SECRET = b"only for what we measure"


@contextmanager
def serve(*more: str) -> Iterator[str]:
    """Run a rendezvous server, with `more` options; ranks come back until it listens."""
    port = random.randrange(20_000, 30_000)  # below those that the system gives to ranks
    options = ["--port", str(port), "--admin-port", "-1", "--log-level", "error", *more]
    with subprocess.Popen([*SERVER, *options], cwd=ROOT, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


class Watched(NamedTuple):
    """A server that is looked at while it works."""

    address: str
    pid: int
    admin: str
    """Where its metrics are: http://host:port."""

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        nanoseconds, *_ = Path(f"/proc/{self.pid}/schedstat").read_text().split()
        return int(nanoseconds) / 1e9

    def metrics(self) -> dict[str, float]:
        """What it tells of itself, by name."""
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextmanager
def watch(*options: str) -> Iterator[Watched]:
    """Run a server as users do: with its log, its metrics and a secret, which is `SECRET`."""
    with tempfile.TemporaryFile() as log:
        command = [*SERVER, "--port", "0", "--admin-port", "0", "--host", "127.0.0.1"]
        secret = {"RENDEZVOUS_SECRET": SECRET.decode()}
        with subprocess.Popen(
            [*command, *options], cwd=ROOT, stderr=log, env=os.environ | secret
        ) as server:
            try:
                said = _listening(server, log)
                admin = f"http://127.0.0.1:{said['admin_port']}"
                yield Watched(f"127.0.0.1:{said['port']}", server.pid, admin)
            finally:
                server.kill()


def _listening(server: subprocess.Popen[bytes], log: IO[bytes]) -> dict[str, Any]:
    """Wait for the line of the log that names the ports."""
    while server.poll() is None:
        for line in os.pread(log.fileno(), 65536, 0).splitlines(keepends=True):
            if line.endswith(b"\n") and (said := json.loads(line))["event"] == "listening":
                return dict(said)
        time.sleep(0.01)
    raise RuntimeError(os.pread(log.fileno(), 65536, 0).decode())


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


def about(*packages: str) -> dict[str, Any]:
    """Return the day, the machine and the versions of `packages`, for the head of a report."""
    from lambda_worker.versions import installed
    from workflow.environment import cpu

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
