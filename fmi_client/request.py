"""Operations that go on while their rank does something else.

Progress is made inside the calls of this rank's communicators, in the calling thread: there
is no other one. A rank that computes for long should call `test` now and then; a peer that
waits for its part of an operation waits until it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fmi_client.calls import Call, UnderWay
from fmi_client.collectives import Step
from fmi_client.errors import FmiError
from fmi_client.transport.reactor import SyncReactor


class Driver(Protocol):
    """What a request needs of its communicator."""

    _reactor: SyncReactor

    def _begin(self, call: Call) -> None: ...

    def _post(self, step: Step, call: Call) -> UnderWay: ...

    def _check(self, call: Call, under_way: UnderWay) -> None: ...

    def _interrupted(self, call: Call, error: BaseException) -> None: ...

    def _ended(self, call: Call) -> None: ...

    def _sleep(self, call: Call, done: Callable[[], bool], deadline: float) -> None: ...


class Request:
    """An operation that was begun: `wait` for its result, or `test` whether it is there.

    Until then its arrays belong to the operation: do not change what is sent, nor read what
    is received. Its time runs from the call that began it.
    """

    def __init__(self, driver: Driver, call: Call) -> None:
        self._driver = driver
        self._call = call
        self._deadline = driver._reactor.now() + call.timeout
        self._result: Any = None
        self._error: Exception | None = None
        self._ended = False
        driver._begin(call)
        self._advance(None)

    def _advance(self, received: object) -> None:
        """Take the steps that need no waiting."""
        driver, call = self._driver, self._call
        try:
            while True:
                under_way = driver._post(call.steps.send(received), call)
                if not under_way.done:
                    self._call_back(under_way)
                    return
                driver._check(call, under_way)
                received = under_way.received
        except StopIteration as stop:
            self._end(stop.value, None)
        except Exception as error:
            if not isinstance(error, FmiError):
                driver._interrupted(call, error)
            self._end(None, error)

    def _call_back(self, under_way: UnderWay) -> None:
        for half, _ in under_way.halves():
            if not half.done:
                half.on_done = self._on_done

    def _on_done(self) -> None:
        under_way = self._call.under_way
        if under_way is not None and under_way.done and not self._ended:
            # Not here: a link or an inbox is in the middle of its work.
            self._driver._reactor.soon(self._resume)

    def _resume(self) -> None:
        under_way = self._call.under_way
        if self._ended or under_way is None:
            return
        try:
            self._driver._check(self._call, under_way)
        except Exception as error:
            self._end(None, error)
        else:
            self._advance(under_way.received)

    def _end(self, result: Any, error: Exception | None) -> None:
        self._result, self._error, self._ended = result, error, True
        self._driver._ended(self._call)

    def wait(self) -> Any:
        """Return the operation's result when it is there; again, if called again.

        Returns:
            what the blocking operation would have returned.

        Raises:
            FmiError: what the blocking operation would have raised.
        """
        driver, call = self._driver, self._call
        if not self._ended:
            try:
                driver._sleep(call, lambda: self._ended, self._deadline)
                if not self._ended and call.under_way is not None:
                    driver._check(call, call.under_way)
            except FmiError as error:
                self._end(None, error)
            except BaseException as error:
                driver._interrupted(call, error)
                raise
        if self._error is not None:
            raise self._error.fresh() if isinstance(self._error, FmiError) else self._error
        return self._result

    def test(self) -> bool:
        """Make what progress is possible at once.

        Returns:
            whether `wait` would return (or raise) now.
        """
        reactor = self._driver._reactor
        if not self._ended and not reactor.closed:
            reactor.poll(0.0)
        return self._ended or reactor.now() >= self._deadline
