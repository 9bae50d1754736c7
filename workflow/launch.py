"""Ranks on this machine, as mpiexec starts them: ``python -m workflow.launch --ranks 4 FILE.py``.

Starts a rendezvous server, and the ranks as processes whose environment says which they are: by
FMI_SERVER, FMI_JOB, FMI_KEY, FMI_RANK and FMI_SIZE, and for torch by RANK and WORLD_SIZE. When one
ends with an error, the others follow; none outlives this process.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from typing import IO, Annotated

import typer

from workflow.calls import RunFailed, start
from workflow.processes import ProcessFamily, death_note, read_tail, run_until_signal
from workflow.serving import start_server
from workflow.signals import Stopped

GRACE = 5.0
"""Seconds that the others have, after a rank has failed, to notice and to say so."""

SERVER = (sys.executable, "-m", "rendezvous_server")

Ranks = Annotated[int, typer.Option(min=1, max=128, help="Processes to start.")]


def run_self() -> None:
    """Be the command line of the program that calls this: start its ranks; exits with a code."""
    program = sys.modules["__main__"]
    command = ("-m", program.__spec__.name) if program.__spec__ else (sys.argv[0],)

    def this_program(ranks: Ranks = 4) -> None:
        start_ranks(command, ranks)

    this_program.__doc__ = program.__doc__
    _run(this_program)


def run_program(
    command: Annotated[list[str], typer.Argument(metavar="FILE.py [ARGUMENTS]")], ranks: Ranks = 4
) -> None:
    """Run a Python program as so many ranks on this machine."""
    start_ranks(command, ranks)


def _run(command: Callable[..., None]) -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    # What follows FILE.py is for that program.
    app.command(context_settings={"allow_interspersed_args": False})(command)
    app()


def start_ranks(arguments: Sequence[str], size: int) -> None:
    """Run Python with these arguments as each of `size` ranks; exits with 0 if all do."""
    try:
        sys.exit(run_until_signal(_launch((sys.executable, *arguments), size)))
    except RunFailed as error:
        sys.exit(f"Error: {error}")
    except Stopped as stopped:
        print(f"Stopped by {stopped.name}; nothing is left running.", file=sys.stderr)
        raise
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


async def _launch(command: Sequence[str], size: int) -> int:
    async with ProcessFamily() as family:
        server, address = await start_server(family, SERVER)
        assert server.stderr is not None
        log = asyncio.create_task(read_tail(server.stderr))
        env = _environment(address)
        ranks = [
            await start(family, f"rank {rank}", command, env | _number(rank, size))
            for rank in range(size)
        ]
        try:
            return 0 if await _all(ranks) else 1
        finally:
            log.cancel()


def _environment(address: str) -> dict[str, str]:
    place = {"FMI_SERVER": address, "FMI_JOB": "launch"}
    # The ranks share this machine's cores: one thread each, unless told otherwise.
    env = {"OMP_NUM_THREADS": "1", **os.environ, **place, "FMI_KEY": secrets.token_hex(32)}
    env.pop("FMI_TOKEN", None)  # admits to another server
    # A program finds what lies in the current folder, wherever it lies itself: as by python -m.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    return env


def _number(rank: int, size: int) -> dict[str, str]:
    """Return what tells a process its rank, under our names and torch's."""
    ours = {"FMI_RANK": str(rank), "FMI_SIZE": str(size)}
    return ours | {"RANK": str(rank), "WORLD_SIZE": str(size)}


async def _all(ranks: Sequence[Process]) -> bool:
    """Wait for all ranks, or for `GRACE` seconds after the first that failed; whether none did."""
    tasks = [asyncio.create_task(_watch(number, rank)) for number, rank in enumerate(ranks)]
    running = set(tasks)
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if not all([task.result() for task in done]):
                if running:
                    await asyncio.wait(running, timeout=GRACE)
                return False
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # two may fail at once: one is raised


async def _watch(number: int, rank: Process) -> bool:
    """Pass on what a rank writes until it has ended; returns whether it did well."""
    assert rank.stdin is not None
    rank.stdin.close()
    await asyncio.gather(_pass_on(rank.stdout, sys.stdout), _pass_on(rank.stderr, sys.stderr))
    code = await rank.wait()
    if code < 0:
        print(f"rank {number} {death_note(code)}", file=sys.stderr)
    return code == 0


async def _pass_on(source: asyncio.StreamReader | None, to: IO[str]) -> None:
    assert source is not None
    async for line in source:  # whole lines, whoever else is writing
        to.write(line.decode(errors="replace"))
        to.flush()


if __name__ == "__main__":
    _run(run_program)
