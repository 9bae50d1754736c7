"""The blocking communicator: what a Lambda handler uses.

The same methods as the async one, each returning its result. All progress (also answering
a peer that wants a link) happens inside the calls, in the calling thread: no event loop, and
no thread but those in which the object channel waits for its store. Not to be shared between
threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from fmi_client import channels
from fmi_client.calls import LAST_SECONDS, STUCK_SECONDS, Call, UnderWay
from fmi_client.collectives import Step
from fmi_client.endpoint import Endpoint
from fmi_client.errors import FmiError
from fmi_client.hints import Choice
from fmi_client.join_request import JoinRequest
from fmi_client.joining import LEAVE_SECONDS, Joining, ask_before
from fmi_client.operations import Operations, OpLike
from fmi_client.ops import SUM
from fmi_client.payloads import allocate
from fmi_client.protocol.transfers import Receive
from fmi_client.transport.reactor import SyncReactor

__all__ = ["Communicator", "Request", "connect"]

HEAR_SECONDS = 1.0
"""How long `poll` waits to be told why the job is over, once it is known that something is; and
for a server that seems to be back."""

POLL_SECONDS = 0.001
"""At most so long a loop of calls that all find their data ready is deaf to everything else."""


SPIN_SECONDS = 200e-6
"""How long a wait looks at its link again and again before it sleeps: to be woken takes 50 µs.
In between it lets go of the core: where ranks outnumber cores, the peer needs it to answer."""

LONGEST_SKIP = 63
"""After a spin in vain so many waits, at most, sleep at once: the next may be as long."""


class Communicator(Operations):
    """Operations that return when they are done, and ``i…``, which return a `Request` at once.

    `connect` makes it; as ``with`` it leaves the job at the end, and an exception inside aborts it
    on all ranks. For one thread only.

    ``i…`` take the arguments of the operations that they begin. A wrong argument, and that the job
    is over, they say themselves; whatever goes wrong later, `Request.wait` raises. Several may be
    under way, also beside operations that wait; all ranks must begin collectives in the same order.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        reactor: SyncReactor,
        group: Sequence[int],
        context: int,
        timeout: float,
        *,
        whole_job: bool = True,
    ) -> None:
        super().__init__(endpoint, group, context, timeout, whole_job=whole_job)
        self._reactor = reactor
        self._skip = self._skips = 0
        self._begin_only = False
        """Whether `_run` begins what it is given, and returns it as a request."""

    def _run(self, call: Call) -> Any:
        if self._begin_only:
            return Request(self, call)
        reactor = self._reactor
        now = reactor.now()
        deadline = now + call.timeout
        try:
            if now - reactor.polled > POLL_SECONDS and not reactor.closed:
                reactor.poll(0.0)  # calls that need not wait must still hear of an abort
            self._begin(call)
            step = call.steps.send(None)
            while True:
                step = call.steps.send(self._perform(step, call, deadline))
        except StopIteration as stop:
            return stop.value
        except BaseException as error:
            self._interrupted(call, error)
            raise
        finally:
            self._spent(call, reactor.now() - now)

    def _perform(self, step: Step, call: Call, deadline: float) -> Receive | None:
        under_way = self._post(step, call)
        if not under_way.done:
            self._wait(call, under_way, deadline)
        self._check(call, under_way)
        return under_way.received

    def _spin(self, under_way: UnderWay) -> bool:
        """Wait without sleeping, while that has been worth it; True if the step is done."""
        look, now = self._look(under_way), self._reactor.now
        look()
        if under_way.done:
            return True
        if self._skip:
            self._skip -= 1
            return False
        end = now() + SPIN_SECONDS
        while now() < end:
            os.sched_yield()
            look()
            if under_way.done:
                self._skips = 0
                return True
        self._skip = self._skips = min(2 * self._skips + 1, LONGEST_SKIP)
        return False

    def _look(self, under_way: UnderWay) -> Callable[[], object]:
        """Return the quickest way to find out whether a step is done."""
        source = under_way.step.source
        if source is not None and under_way.only_receiving:
            return self.link(source).read
        return partial(self._reactor.poll, 0.0)

    def _wait(self, call: Call, under_way: UnderWay, deadline: float) -> None:
        if not self._spin(under_way):
            self._sleep(call, lambda: under_way.done, deadline)

    def _sleep(self, call: Call, done: Callable[[], bool], deadline: float) -> None:
        """Serve the sockets until `done()`, or nobody has found out in time why it is not."""
        reactor = self._reactor
        if reactor.run_until(done, min(deadline, reactor.now() + STUCK_SECONDS)):
            return
        self._ask(call)
        stuck = call.stuck
        if stuck:
            self._endpoint.make_room(True)
        try:
            in_time = reactor.run_until(done, deadline)
        finally:
            if stuck:
                self._endpoint.make_room(False)
        if not in_time and call.under_way is not None:
            self._late(call, call.under_way)
            reactor.run_until(done, reactor.now() + LAST_SECONDS)

    def poll(self) -> None:
        """Take in what has come, without waiting; `Operations.poll` says what for.

        Waits up to a second only when a connection broke, to be told why.

        Raises:
            FmiError: what the next operation would raise now.
        """
        reactor, endpoint = self._reactor, self._endpoint
        if not reactor.closed:
            reactor.poll(0.0)
            if endpoint.look():
                heard = reactor.now() + HEAR_SECONDS
                reactor.run_until(lambda: not endpoint.look(), heard)
        self.raise_ended("poll")

    # ------------------------------------------------------- without waiting for it
    def isend(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> Request:
        """Begin to `send`; ``wait()`` returns when the system has taken it all."""
        return self._started(self.send, obj, dest, tag, timeout=timeout)

    def irecv(
        self, source: int, tag: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Request:
        """Begin to `recv`; ``wait()`` returns the object, or `out`."""
        return self._started(self.recv, source, tag, out=out, timeout=timeout)

    def ibarrier(self, *, timeout: float | None = None) -> Request:
        """Begin a `barrier`; ``wait()`` returns when all ranks have begun it."""
        return self._started(self.barrier, timeout=timeout)

    def ibcast(
        self, obj: Any, root: int = 0, *, out: Any = None, timeout: float | None = None
    ) -> Request:
        """Begin a `bcast`; ``wait()`` returns the root's object, or `out`."""
        return self._started(self.bcast, obj, root, out=out, timeout=timeout)

    def iallreduce(
        self, obj: Any, op: OpLike = SUM, *, out: Any = None, timeout: float | None = None
    ) -> Request:
        """Begin an `allreduce`; ``wait()`` returns the combination, or `out`."""
        return self._started(self.allreduce, obj, op, out=out, timeout=timeout)

    def _started(self, operation: Callable[..., Any], *args: Any, **options: Any) -> Request:
        self._begin_only = True
        try:
            request: Request = operation(*args, **options)
        finally:
            self._begin_only = False
        return request

    def part(self, group: Sequence[int], context: int) -> Self:
        """Return a communicator of some ranks of the job; see `Caller.part`."""
        return type(self)(
            self._endpoint, self._reactor, group, context, self.timeout, whole_job=False
        )

    def close(self) -> None:
        """Leave the job in order; a communicator made by `split` leaves nothing.

        Waits some seconds at most for the server to hear of it, and raises no error of the job. The
        second time nothing happens. The others go on; one that needs us raises `RankFailed`.
        """
        reactor = self._reactor
        if not self._whole_job or reactor.closed:
            return
        try:
            self._endpoint.leave()
            reactor.run_until(lambda: self._endpoint.left, reactor.now() + LEAVE_SECONDS)
        finally:
            self._endpoint.close()
            reactor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is not None:
            self._tell_error(error)
        self.close()


class Request:
    """An operation that was begun: `wait` for its result, or `test` whether it is there.

    Until then its arrays belong to the operation: do not change what is sent, nor read what
    is received. Its time runs from the call that began it.

    Progress is made inside the calls of this rank's communicators, in the calling thread: there is
    no other one. A rank that computes for long should call `test` now and then; a peer that waits
    for its part of an operation waits until it does.
    """

    def __init__(self, comm: Communicator, call: Call) -> None:
        self._comm = comm
        self._call = call
        self._deadline = comm._reactor.now() + call.timeout
        self._result: Any = None
        self._error: Exception | None = None
        self._ended = False
        comm._begin(call)
        self._advance(None)

    def _advance(self, received: object) -> None:
        """Take the steps that need no waiting."""
        comm, call = self._comm, self._call
        try:
            while True:
                under_way = comm._post(call.steps.send(received), call)
                if not under_way.done:
                    self._call_back(under_way)
                    return
                comm._check(call, under_way)
                received = under_way.received
        except StopIteration as stop:
            self._end(stop.value, None)
        except Exception as error:
            comm._interrupted(call, error)
            self._end(None, error)

    def _call_back(self, under_way: UnderWay) -> None:
        for half, _ in under_way.halves():
            if not half.done:
                half.on_done = self._on_done

    def _on_done(self) -> None:
        under_way = self._call.under_way
        if under_way is not None and under_way.done and not self._ended:
            # Not here: a link or an inbox is in the middle of its work.
            self._comm._reactor.soon(self._resume)

    def _resume(self) -> None:
        under_way = self._call.under_way
        if self._ended or under_way is None:
            return
        try:
            self._comm._check(self._call, under_way)
        except Exception as error:
            self._comm._interrupted(self._call, error)
            self._end(None, error)
        else:
            self._advance(under_way.received)

    def _end(self, result: Any, error: Exception | None) -> None:
        self._result, self._error, self._ended = result, error, True
        self._comm._ended(self._call)

    def wait(self) -> Any:
        """Return the operation's result when it is there; the same, if called again.

        Returns:
            what the blocking operation would have returned.

        Raises:
            TypeError, ValueError, FmiError: what the blocking operation would have raised, and with
                the same consequences.
        """
        comm, call = self._comm, self._call
        if not self._ended:
            try:
                comm._sleep(call, lambda: self._ended, self._deadline)
                if not self._ended and call.under_way is not None:
                    comm._check(call, call.under_way)
            except BaseException as error:
                comm._interrupted(call, error)
                if not isinstance(error, FmiError):
                    raise
                self._end(None, error)
        if self._error is not None:
            raise self._error.fresh() if isinstance(self._error, FmiError) else self._error
        return self._result

    def test(self) -> bool:
        """Make what progress is possible at once.

        Returns:
            whether `wait` would return (or raise) now.
        """
        reactor = self._comm._reactor
        if not self._ended and not reactor.closed:
            reactor.poll(0.0)
        return self._ended or reactor.now() >= self._deadline


def connect(
    server: str | None,
    *,
    job: str,
    rank: int,
    size: int,
    key: bytes | str | None = None,
    token: str | None = None,
    epoch: int = 0,
    timeout: float = 30.0,
    channel: str | Choice = "auto",
    store: str | None = None,
) -> Communicator:
    """Join `job` as `rank` of `size`; returns when all are there.

    Arguments and errors are those of `fmi_client.connect`.

    Returns:
        a `Communicator`, to be entered with ``with``, or closed.
    """
    request = JoinRequest.make(server, job, rank, size, key, token, epoch, timeout, channel, store)
    place = channels.find(request)
    reactor = SyncReactor()
    endpoint = channels.endpoint(reactor, place, request, allocate)
    communicator = Communicator(endpoint, reactor, range(size), 0, request.timeout)
    try:
        endpoint.connect()
        wait_ready(endpoint, reactor, request.timeout)
    except BaseException:
        communicator.close()
        raise
    return communicator


def wait_ready(endpoint: Joining, reactor: SyncReactor, timeout: float) -> None:
    """Wait until all ranks of a job are there; the errors of `connect`."""
    end = reactor.now() + timeout
    if not reactor.run_until(lambda: endpoint.settled, end - ask_before(timeout)):
        endpoint.ask_missing()
        if not reactor.run_until(lambda: endpoint.settled, end):
            raise endpoint.join_error()
    if endpoint.failure is not None:
        raise endpoint.failure.fresh()
