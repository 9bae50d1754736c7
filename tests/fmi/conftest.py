from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

from tests.support import serving


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
