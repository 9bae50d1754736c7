"""Ranks, with the blocking communicator, and servers in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fmi_client import sync
from tests.support import KEY

fork = multiprocessing.get_context("fork")


RankFunction = Callable[[sync.Communicator], Any]
Tell = Callable[[Any], None]
"""Hands over what a process has to say: its result."""


def _be(pipe: Any, rank: int, function: Callable[[int, Tell], None]) -> None:
    # Inherited handlers would report our own death to the parent's event loop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        function(rank, pipe.send)
    except BaseException as error:
        pipe.send(error)


@contextmanager
def processes(size: int, function: Callable[[int, Tell], None]) -> Iterator[list[RankProcess]]:
    """Let `function(rank, tell)` run in `size` processes; they end with the block, in any case."""
    ranks: list[RankProcess] = []
    try:
        for rank in range(size):
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_be, args=(theirs, rank, function), daemon=True)
            process.start()
            theirs.close()
            ranks.append(RankProcess(process, ours))
        yield ranks
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()
            each.pipe.close()


def running(
    address: str | None, size: int, function: RankFunction, job: str = "job", **options: Any
) -> AbstractContextManager[list[RankProcess]]:
    """Let `function(comm)` run in `size` processes; see `processes`."""

    def be(rank: int, tell: Tell) -> None:
        given: Any = {"job": job, "rank": rank, "size": size, "key": KEY, "timeout": 15}
        with sync.connect(address, **given | options) as comm:
            tell(function(comm))

    return processes(size, be)


def run_processes(
    address: str | None, size: int, function: RankFunction, job: str = "job", **options: Any
) -> list[Any]:
    """Run `function(comm)` in `size` processes; results, errors or "died" in rank order."""
    with running(address, size, function, job, **options) as ranks:
        return [rank.result() for rank in ranks]


class RankProcess(NamedTuple):
    """A rank, and the pipe through which it says how it went."""

    process: Any
    pipe: Any

    def result(self, seconds: float = 20) -> Any:
        """Return what its function returned or raised, "died" or "silent"."""
        try:
            return self.pipe.recv() if self.pipe.poll(seconds) else "silent"
        except EOFError:
            return "died"


def own_environment() -> dict[str, str]:
    """Our environment without what is meant for other servers or jobs."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FMI_"))}


def memory(pid: int, what: str) -> int:
    """Return "VmRSS" of a process, or "VmHWM", the most ever, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


@dataclass(frozen=True)
class ServerProcess:
    """A rendezvous server: its process and its ports."""

    pid: int
    port: int
    admin_port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def server_process(
    *options: str, secret: str = "", descriptors: int | None = None
) -> Iterator[ServerProcess]:
    """Run a rendezvous server on free ports of this machine; it must outlive the block.

    Args:
        options: of its command line.
        secret: what admits ranks; default: it admits anybody.
        descriptors: how many it may have open.
    """
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "0"]
    limited = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"] if descriptors else []
    with subprocess.Popen(
        [*limited, *command, "--host", "127.0.0.1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({"RENDEZVOUS_SECRET": secret} if secret else {}),
    ) as process:
        assert process.stderr is not None
        at = _listening(process.stderr)
        # Somebody has to read the log, or the server stops when the pipe is full.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            yield ServerProcess(process.pid, at["port"], at["admin_port"])
            assert process.poll() is None, "the server has ended by itself"
        finally:
            _end(process)
            reader.join()


def _listening(log: Iterable[str]) -> dict[str, Any]:
    """Return the line that names the ports."""
    said = []
    for line in log:
        said.append(line)
        if '"listening"' in line:
            return dict(json.loads(line))
    raise AssertionError(f"the server did not start: {''.join(said)}")


def _end(process: subprocess.Popen[str]) -> None:
    """In order, and after a moment at any rate: ranks that are still there would be waited for."""
    process.terminate()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def serve_rendezvous(*options: str, secret: str = "") -> Iterator[str]:
    """host:port of a rendezvous server; see `server_process`."""
    with server_process(*options, secret=secret) as server:
        yield server.address
