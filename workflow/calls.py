"""One handler in one process: an event goes in on stdin, JSON lines come out on stdout.

``python -m lambda_worker init|infer|summarize`` writes any number of ``{"progress": …}`` lines and
then one ``{"result": …}`` or ``{"error": …}``; its log goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fmi_client import errors
from workflow.plan import Json
from workflow.processes import LINE_LIMIT, ProcessFamily, death_note, read_tail

__all__ = ["Call", "RunFailed", "error_json", "error_text", "start", "with_log"]


class RunFailed(Exception):
    """The run failed; all its processes have ended.

    ``who`` is what failed ("rank 2", "init", "the rendezvous server", "the run"), ``kind`` the
    error's type where the process itself reported one.
    """

    def __init__(
        self, who: str, message: str, kind: str | None = None, rank: int | None = None
    ) -> None:
        super().__init__(f"{who} failed: {kind}: {message}" if kind else f"{who} {message}")
        self.who, self.message, self.kind, self.rank = who, message, kind, rank

    @property
    def only_noticed(self) -> bool:
        """True for what a healthy rank says when another one is lost: the blame moves on."""
        return self.kind in errors.__all__

    def as_json(self) -> Json:
        """Return the error as one JSON object."""
        return {"who": self.who, "type": self.kind, "message": self.message, "rank": self.rank}


def error_text(error: Exception) -> str:
    """Say what an error says, without the system's number of it."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return str(error)


def error_json(error: Exception) -> Json:
    """Return an error as one JSON object, as `RunFailed` does; others are the launcher's own."""
    if hasattr(error, "as_json"):
        known: Json = error.as_json()
        return known
    kind = type(error).__name__
    return {"who": "cosmic", "type": kind, "message": error_text(error), "rank": None}


@dataclass(frozen=True)
class Call:
    """A call of a handler; ``who`` names it in errors, ``rank`` is None for init and summarize."""

    who: str
    command: Sequence[str]
    event: Json
    rank: int | None = None

    async def run(
        self, family: ProcessFamily, env: Mapping[str, str], on_progress: Callable[[Json], None]
    ) -> Json:
        """Return the handler's result.

        Raises:
            RunFailed: the handler reported an error, died, or wrote something else.
        """
        process = await start(family, self.who, self.command, env)
        assert process.stdout is not None
        assert process.stderr is not None
        log = asyncio.create_task(read_tail(process.stderr))
        feed = asyncio.create_task(_feed(process, self.event))
        try:
            answer = await self._answer(process.stdout, on_progress)
            return self._judge(answer, await process.wait(), await log)
        finally:
            log.cancel()
            feed.cancel()

    async def _answer(
        self, stdout: asyncio.StreamReader, on_progress: Callable[[Json], None]
    ) -> Json:
        answer: Json = {}
        while line := await self._line(stdout):
            message = self._parse(line)
            if "progress" not in message:
                answer = message
                continue
            try:
                on_progress(message["progress"])
            except (KeyError, TypeError) as error:
                raise self._unreadable(line) from error
        return answer

    async def _line(self, stdout: asyncio.StreamReader) -> bytes:
        try:
            return await stdout.readline()
        except ValueError as error:
            raise self._failed(f"wrote a line of over {LINE_LIMIT:,} bytes on stdout") from error

    def _parse(self, line: bytes) -> Json:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and message.keys() & {"progress", "result", "error"}:
                return message
        raise self._unreadable(line)

    def _judge(self, answer: Json, code: int, log: str) -> Json:
        if error := answer.get("error"):
            kind = error.get("type", "error")
            raise RunFailed(self.who, error.get("message", ""), kind=kind, rank=self.rank)
        if code == 0 and "result" in answer:
            return dict(answer["result"])
        note = death_note(code) if code else "ended without a result"
        raise self._failed(with_log(note, log))

    def _unreadable(self, line: bytes) -> RunFailed:
        shown = line[:200].decode(errors="replace").strip()
        return self._failed(f"wrote on stdout what is no message of a worker: {shown}")

    def _failed(self, message: str) -> RunFailed:
        return RunFailed(self.who, message, rank=self.rank)


async def start(
    family: ProcessFamily, who: str, command: Sequence[str], env: Mapping[str, str]
) -> Process:
    """Start ``command`` as a member of ``family``; raises RunFailed where that is impossible."""
    try:
        return await family.start(command, env)
    except OSError as error:
        raise RunFailed(who, f"cannot be started: {error_text(error)}") from error


async def _feed(process: Process, event: Json) -> None:
    assert process.stdin is not None
    # A process that dies before it has read everything tells more by its exit code.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(json.dumps(event).encode())
        await process.stdin.drain()
    process.stdin.close()


def with_log(note: str, log: str) -> str:
    """Append the last lines of ``log``, if there are any, to ``note``."""
    last = log.splitlines()[-5:]
    return "\n  ".join([f"{note}; its last words:", *last]) if last else note
