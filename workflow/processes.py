"""The operating-system processes of one run: none of them outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from workflow.signals import Stopped, stop_signals

__all__ = [
    "LINE_LIMIT",
    "ProcessFamily",
    "death_note",
    "read_tail",
    "run_until_signal",
]

Result = TypeVar("Result")

# Sleeps on a pipe that only this process holds. When the pipe closes, however this process ended
# (SIGKILL included), it kills the group that it leads: itself and all members.
_GUARD = """trap '' TERM INT HUP; read -r _; rm -rf -- "$1"; kill -KILL 0"""

# A JSON line holds at most one rank's record or init's list of ranks.
LINE_LIMIT = 16 * 1024 * 1024
_TAIL = 8 * 1024


class ProcessFamily:
    """Processes of one process group, ended together when the ``async with`` block is left.

    The group is not the terminal's: a Ctrl-C reaches this process alone, which then ends the
    others in order. ``grace`` is how long they have, in seconds, between SIGTERM and SIGKILL.
    ``folder`` takes the members' temporary files, which go when the members go.
    """

    def __init__(self, grace: float = 1.0) -> None:
        self._grace = grace
        self._members: list[Process] = []

    async def __aenter__(self) -> Self:
        self.folder = tempfile.mkdtemp(prefix="cosmic-")
        self._guard = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _GUARD, "guard", self.folder),
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
            process_group=0,
        )
        return self

    async def start(self, command: Sequence[str], env: Mapping[str, str]) -> Process:
        """Start a member with its three streams piped.

        Raises OSError where the command cannot be executed.
        """
        member = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env={**env, "TMPDIR": self.folder},
            limit=LINE_LIMIT,
            process_group=self._guard.pid,
        )
        self._members.append(member)
        return member

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGTERM)
        waits = [member.wait() for member in self._members]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*waits), self._grace)
        self._signal(signal.SIGKILL)
        for process in [*self._members, self._guard]:
            await process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        # The guard ignores SIGTERM and is not reaped before SIGKILL, so the group's number is ours.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, number)


async def read_tail(stream: asyncio.StreamReader) -> str:
    """Read ``stream`` to its end and return the last 8 KiB as text: what a log is needed for."""
    tail = b""
    while chunk := await stream.read(64 * 1024):
        tail = (tail + chunk)[-_TAIL:]
    return tail.decode(errors="replace").strip()


def death_note(code: int) -> str:
    """Say how a process ended, from its return code as `subprocess` gives it."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def run_until_signal(work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work`` to its end; SIGINT, SIGTERM or SIGHUP cancels it.

    Raises:
        Stopped: a signal came, and ``work`` has cleaned up; ``work`` says what is left by raising
            `CancelledError` with a text, if it is not the usual.
    """
    caught: list[signal.Signals] = []
    try:
        return asyncio.run(_cancelled_by_signal(work, caught.append))
    except asyncio.CancelledError as error:
        if not caught:
            raise
        raise Stopped(caught[0], *error.args) from None


async def _cancelled_by_signal(
    work: Coroutine[Any, Any, Result], catch: Callable[[signal.Signals], None]
) -> Result:
    task = asyncio.create_task(work)

    def stop(number: signal.Signals) -> None:
        catch(number)
        # Once: a second Ctrl-C must not interrupt the cleaning up, which takes a second or two.
        if not task.cancelling():
            task.cancel()

    with _handling(stop):
        return await task


@contextlib.contextmanager
def _handling(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in stop_signals()}
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
