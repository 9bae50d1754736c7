"""Ranks in processes of their own, with the blocking communicator."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from fmi_client import sync
from tests.support import KEY

spawn = multiprocessing.get_context("fork")


RankFunction = Callable[[sync.Communicator], Any]


def _be_rank(
    pipe: Any,
    address: str | None,
    job: str,
    rank: int,
    size: int,
    function: RankFunction,
    options: dict[str, Any],
) -> None:
    # Inherited handlers would report our own death to the parent's event loop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        arguments = {"job": job, "rank": rank, "size": size, "key": KEY, "timeout": 15} | options
        with sync.connect(address, **arguments) as comm:
            pipe.send(function(comm))
    except BaseException as error:
        pipe.send(error)


def run_processes(
    address: str | None, size: int, function: RankFunction, job: str = "job", **options: Any
) -> list[Any]:
    """Run `function(comm)` in `size` processes; results, errors or "died" in rank order."""
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=_be_rank, args=(theirs, address, job, rank, size, function, options), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_result(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _result(pipe: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(20) else "silent"
    except EOFError:
        return "died"
