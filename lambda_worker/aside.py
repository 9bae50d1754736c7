"""Work in threads that nobody has to wait for: a request to S3 may hang for minutes.

Not an executor's threads: those are waited for when its block, or the process, ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Look = Callable[[], None]

LOOK_SECONDS = 0.2


def nothing() -> None:
    """Who has nothing to look at."""


class Helper:
    """A thread that does one thing after another: one heap, where many threads would have many."""

    def __init__(self, name: str) -> None:
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], Result]) -> Future[Result]:
        """Begin `work` as soon as what was asked for before is done."""
        future: Future[Result] = Future()
        self._asked.put(partial(_settle, future, work))
        return future

    def end(self, seconds: float) -> None:
        """Let the thread end after what it does now, and wait so long for that."""
        self._asked.put(None)
        self._thread.join(seconds)

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None:
            work()


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Begin `work` in a thread; `name` is the thread's."""
    future: Future[Result] = Future()
    threading.Thread(target=_settle, args=(future, work), name=name, daemon=True).start()
    return future


def result(future: Future[Result], look: Look = nothing, what: str = "") -> Result:
    """What a future holds, once it is there.

    Args:
        look: called every 0.2 s meanwhile. What it raises ends the waiting, not the work, and gets
            a note that says for `what`, and for how long, this was waiting.

    Raises:
        Exception: what the work raises, or `look`.
    """
    began = time.monotonic()
    while not wait([future], LOOK_SECONDS).done:
        try:
            look()
        except BaseException as error:
            error.add_note(f"this rank was waiting for {what}, {time.monotonic() - began:.1f} s")
            raise
    return future.result()


def in_parallel(do: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """What `do` returns for each item, in order, for so many of them at a time.

    Raises:
        Exception: what `do` has raised first, as soon as it does. What has not begun by then never
            does, and nobody waits for the rest.
    """
    futures: list[Future[Result]] = [Future() for _ in items]
    left = deque(zip(items, futures, strict=True))

    def serve() -> None:
        while left:
            try:
                item, future = left.popleft()
            except IndexError:  # another thread was faster
                return
            _settle(future, partial(do, item))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=serve, name="in parallel", daemon=True).start()
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        left.clear()


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # no thread ends with a traceback: whoever waits is told
        future.set_exception(error)
