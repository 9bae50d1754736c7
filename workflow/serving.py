"""A rendezvous server on this machine, as one of a family's processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from asyncio.subprocess import Process
from collections.abc import Sequence

from workflow.calls import RunFailed, start, with_log
from workflow.processes import ProcessFamily, death_note

__all__ = ["NAME", "start_server"]

NAME = "the rendezvous server"
_START_SECONDS = 10.0
_OPTIONS = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0")


async def start_server(
    family: ProcessFamily, command: Sequence[str], *options: str
) -> tuple[Process, str]:
    """Start a server on a free port; returns its process and "host:port", once it listens.

    Whoever asked for it must go on to read the process's stderr, or the server stops when the
    pipe is full.

    Raises:
        RunFailed: it cannot be started, has ended, or does not listen in time; with its log.
    """
    # Settings that are exported for another server (a secret, a certificate) are not for this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RENDEZVOUS_")}
    server = await start(family, NAME, (*command, *_OPTIONS, *options), env)
    assert server.stderr is not None
    seen = ""
    try:
        async with asyncio.timeout(_START_SECONDS):
            while line := (await server.stderr.readline()).decode(errors="replace"):
                seen += line
                if port := _listening_port(line):
                    return server, f"127.0.0.1:{port}"
            note = death_note(await server.wait())
    except TimeoutError:
        note = f"did not listen within {_START_SECONDS:g} s"
    raise RunFailed(NAME, with_log(note, seen))


def _listening_port(line: str) -> int | None:
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.get("event") == "listening":
            return int(entry["port"])
    return None
