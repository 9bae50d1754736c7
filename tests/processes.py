"""Ranks, with the blocking communicator, and servers in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from fmi_client import sync
from tests.support import KEY

spawn = multiprocessing.get_context("fork")


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
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_be, args=(theirs, rank, function), daemon=True)
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


@contextmanager
def serve_rendezvous(*options: str) -> Iterator[str]:
    """host:port of a rendezvous server on free ports, a process of its own."""
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        events = (json.loads(line) for line in server.stderr)
        port = next(event["port"] for event in events if event["event"] == "listening")
        # Somebody has to read the log, or the server stops when the pipe is full.
        reader = threading.Thread(target=lambda: [None for _ in events])
        reader.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            reader.join()
