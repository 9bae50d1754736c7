from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import serving

if TYPE_CHECKING:  # torch is loaded late: most tests here do without
    from fmi_client.background import Background
    from fmi_client.torch_backend import FmiProcessGroup


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server in a thread of its own: the ranks block."""
    ready: concurrent.futures.Future[str] = concurrent.futures.Future()
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving() as (_, where):
            ready.set_result(where)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield ready.result(10)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def members(address: str) -> Iterator[list[Background]]:
    """All ranks of a job, for tests of the torch backend."""
    from tests.fmi import torch_ranks

    with torch_ranks.joined(address, torch_ranks.SIZE) as ranks:
        yield ranks


@pytest.fixture
def groups(members: list[Background]) -> list[FmiProcessGroup]:
    """A process group of all ranks, by rank; each test has its own."""
    from tests.fmi import torch_ranks

    context = 1000 + next(torch_ranks.numbers)
    return [torch_ranks.group_of(member, context=context) for member in members]
