"""What the tests of the check share: looking into reports, and listeners that are no server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import fmi_client
from fmi_client.check import Plan, run
from fmi_client.findings import Report, Step
from fmi_client.protocol import frames
from tests.support import close_by_reset

SECRET = b"0123456789abcdef"


async def checked(server: str, **arguments: Any) -> Report:
    arguments = {"admin_port": 0, "timeout": 5.0} | arguments
    return await asyncio.to_thread(run, Plan.make(server, **arguments))


def step(report: Report, name: str) -> Step:
    return next(step for step in report.steps if step.name == name)


def statuses(report: Report) -> dict[str, str]:
    return {step.name: step.status for step in report.steps}


def causes(report: Report) -> list[str | None]:
    return [step.cause for step in report.steps if step.status == "failed"]


ALONE = {
    **dict.fromkeys(
        ("resolve", "connect", "server", "authenticate", "round trip", "address", "NAT"), "ok"
    ),
    "links": "skipped",
}


def token(expires: float = 3600, job: str = "job", size: int = 1, secret: bytes = SECRET) -> str:
    return fmi_client.make_token(secret, job=job, size=size, expires=time.time() + expires)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[int]:
    talks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with suppress(OSError), closing(writer):
            await talk(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    for task in talks:
        task.cancel()
    await asyncio.gather(*talks, return_exceptions=True)
    await asyncio.sleep(0)  # a transport closes in the next turn of the loop


def says(data: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()

    return talk


def after_hello(*answers: frames.Message) -> Talk:
    """Say a message to each that comes, then read on."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        for answer in answers:
            await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
            writer.write(frames.encode(answer))
        await reader.read()

    return talk


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    await reader.read(4096)


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    close_by_reset(writer.get_extra_info("socket"))


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A frame of 256 bytes, a byte at a time: each read is fast, the whole never ends."""
    writer.write(b"\x00\x00\x01\x00")
    while True:
        writer.write(b"\x80")
        await writer.drain()
        await asyncio.sleep(0.02)


CHALLENGE = {"t": "challenge", "nonce": bytes(16)}
