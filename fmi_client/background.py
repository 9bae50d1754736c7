"""A communicator in a thread of its own, for callers that must not wait, or wait elsewhere.

The thread runs an event loop with the async communicator: whatever was begun goes on side by
side, and peers are answered, while the caller computes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from fmi_client.communicator import Communicator, connect
from fmi_client.errors import Aborted, FmiError

CLOSE_SECONDS = 10.0
"""Leaving is limited by itself; so long a thread may take that gets no time to run."""

WORD_SECONDS = 10.0
"""So long joining may take without a word; its own limit is half an hour, as torch's is."""

LATE = (
    "rank %d has not joined job %r at %s yet: is the server there, and were all ranks started? "
    "cosmic check %s says more"
)

log = logging.getLogger(__name__)

Begin = Callable[[], Awaitable[Any]]


class Background:
    """A job's communicator, and the thread that alone may use it.

    Args and errors: those of `fmi_client.connect`.
    """

    comm: Communicator

    def __init__(self, server: str | None, **options: Any) -> None:
        self._process = os.getpid()
        self._rank: int = options.get("rank", 0)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.RLock()  # a signal's handler may close while its thread submits
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fmi-background", daemon=True)
        self._thread.start()
        try:
            joining = self.submit(lambda: _join(server, options))
            if not wait([joining], WORD_SECONDS).done:
                log.warning(LATE, self._rank, options.get("job"), server, server)
            self.comm = joining.result()
        except BaseException:  # Ctrl-C, too: joining then still goes on
            asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result(CLOSE_SECONDS)
            self._stop()
            raise
        atexit.register(self.close)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def submit(self, begin: Begin, then: Sequence[Callable[[], None]] = ()) -> Future[Any]:
        """Let the thread call `begin`, await what it returns, and call all of `then`.

        Operations begin in the order in which they were submitted, provided that `begin` itself
        calls the communicator's methods, which number them, and leaves only the waiting.
        """
        done: Future[Any] = Future()
        if os.getpid() != self._process:  # the thread, and maybe the lock, are the parent's
            why = "this process was forked from a rank, and is none itself"
            done.set_exception(FmiError(why, rank=self._rank))
            return done
        with self._lock:
            if self._closed:
                done.set_exception(self._over())
            else:
                self._loop.call_soon_threadsafe(self._begin, begin, then, done)
        return done

    def _over(self) -> FmiError:
        rank = self._rank
        return Aborted(by=rank, reason="this process has left the job", rank=rank)

    def _begin(self, begin: Begin, then: Sequence[Callable[[], None]], done: Future[Any]) -> None:
        try:
            task = self._loop.create_task(_await(begin(), then))
        except BaseException as error:
            done.set_exception(error)
            return
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, done))

    def _end(self, done: Future[Any], task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            done.set_exception(self._over())
        elif (error := task.exception()) is not None:
            done.set_exception(error)
        else:
            done.set_result(task.result())

    def close(self) -> None:
        """Leave the job; what is still under way is given up. Closing twice does nothing."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:
            return  # forked: the thread is the parent's, and so is the job
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        with contextlib.suppress(FmiError, OSError):
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(CLOSE_SECONDS)
        self._stop()

    async def _leave(self) -> None:
        await self._give_up()
        await self.comm.close()

    async def _give_up(self) -> None:
        for task in list(self._tasks):
            task.cancel("the process leaves")  # what the others hear, if they wait for it
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)


async def _join(server: str | None, options: dict[str, Any]) -> Communicator:
    return await connect(server, **options)


async def _await(awaitable: Awaitable[Any], then: Sequence[Callable[[], None]]) -> Any:
    result = await awaitable
    for call in then:
        call()
    return result
