"""One operation of a process group under way, as torch sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
from torch.distributed import DistBackendError
from torch.distributed import Work as TorchWork

from fmi_client.errors import CollectiveTimeout


class Work(TorchWork):
    """What `async_op=True` returns, and what all calls without it wait for.

    Args:
        where: rank and operation, for errors.
        done: ends with the operation.
        tensors: what it fills.
    """

    def __init__(self, where: str, done: Future[Any], tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._where = where
        self.done = done
        self.tensors = list(tensors)
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until the operation is over.

        Args:
            timeout: for this wait only; zero: the operation's own.

        Raises:
            DistBackendError: it failed; ``__cause__`` is what the client raised.
            TypeError, ValueError: the tensors do not fit.
        """
        seconds = timeout.total_seconds()
        try:
            self.done.result(seconds if seconds > 0 else None)
        except TimeoutError as error:
            if not self.done.done():
                text = f"[{self._where}] no end within the {seconds:.3g} s of wait()"
                raise DistBackendError(text) from None
            raise self._seen(error) from error
        except Exception as error:
            raise self._seen(error) from error
        return True

    def _seen(self, error: BaseException) -> BaseException:
        """Return what torch's users expect: its own error, or what is wrong with an argument."""
        if isinstance(error, TypeError | ValueError):
            return type(error)(f"[{self._where}] {error}")
        text = str(error)
        if not text.startswith("["):
            text = f"[{self._where}] {text}"
        if isinstance(error, CollectiveTimeout) and "imed out" not in text:
            # gloo's errors say so, and programs look for it.
            where, _, why = text.partition("] ")
            text = f"{where}] Timed out ({why})"
        return DistBackendError(text)

    def synchronize(self) -> None:
        """Do `wait`: on a CPU there is no stream that could wait instead."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the operation is over, well or not; never blocks."""
        return self.done.done()

    def is_success(self) -> bool:
        """Whether it is over and nothing failed."""
        return self.done.done() and self.done.exception() is None

    def exception(self) -> BaseException | None:
        """Return what `wait` would raise; None while it goes on, and if nothing failed."""
        error = self.done.exception() if self.done.done() else None
        return None if error is None else self._seen(error)

    def result(self) -> list[torch.Tensor]:
        """Wait, and return the tensors that were filled; the errors of `wait`."""
        self.wait()
        return self.tensors

    def source_rank(self) -> int:
        """Return who sent what `recv` without a source received."""
        self.wait()
        source = self.done.result()
        return int(source)

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the tensors; its callbacks run in a thread of their own."""
        if self._future is None:
            first: torch.futures.Future[Any] = torch.futures.Future()
            # What raises in `then` is an error for torch's own threads, too.
            self._future = first.then(self._outcome)
            self.done.add_done_callback(lambda _: _in_a_thread(lambda: first.set_result(None)))
        return self._future

    def _outcome(self, _: object) -> list[torch.Tensor]:
        self.wait()
        return self.tensors


def _in_a_thread(call: Callable[[], None]) -> None:
    """Call the callbacks of a future, each of which may wait for the callbacks of others.

    For that a limited number of threads, however large, would be too few.
    """
    try:
        Thread(target=call, name="fmi-callback").start()
    except RuntimeError:  # the interpreter is ending, or the system has no more threads
        call()
