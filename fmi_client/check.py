"""Look at a rendezvous server and the way there, step by step: what to run when nothing works.

`run` never disturbs a job: on its own it joins a job of one rank under a random name. Given
a job, a rank and a size it joins that job, and tests the links with the other ranks, each of
which runs the same check. What was found is judged in `findings`.
"""

from __future__ import annotations

import itertools
import json
import socket
import statistics
import time
from collections.abc import Callable

from fmi_client import findings, linktest
from fmi_client.check_plan import MOST_RANKS, Plan
from fmi_client.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    FmiError,
    JoinTimeout,
    RendezvousError,
    ServerDraining,
)
from fmi_client.findings import Report, Status, Step, plain, time_text
from fmi_client.greeting import Failed, days_left, encrypt, handshake
from fmi_client.hosts import resolve
from fmi_client.payloads import allocate
from fmi_client.protocol import addresses, auth
from fmi_client.protocol.addresses import Address, format_address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.notice import some_ranks
from fmi_client.socket_endpoint import SocketEndpoint
from fmi_client.sync import Communicator, wait_ready
from fmi_client.transport.blocking import connected, http_get, in_time
from fmi_client.transport.reactor import SyncReactor

__all__ = ["MOST_RANKS", "Plan", "Report", "Step", "run"]

ADMIN_SECONDS = 3.0
"""The admin port is often closed to ranks, and peers wait for us meanwhile."""

SOON_DAYS = 14
"""A certificate that ends so soon is worth a warning: most are renewed a month before."""

ROUND_TRIPS = 20
ROUND_TRIP_SECONDS = 1.0


def _nothing(*_: object) -> None:
    pass


def run(
    plan: Plan,
    begin: Callable[[str, str], None] = _nothing,
    end: Callable[[Step], None] = _nothing,
) -> Report:
    """Check a server; a check that fails is a result, too.

    Args:
        plan: what to check.
        begin: called with the name of each step that begins, and what it does.
        end: called with each step when it has ended.
    """
    check = _Check(plan, begin, end)
    check.run()
    return check.report


Found = str | tuple[Status, str]
"""What a step that did not fail found: a text, or a status other than "ok" with one."""


class _Check:
    """One check under way."""

    def __init__(
        self, plan: Plan, begin: Callable[[str, str], None], end: Callable[[Step], None]
    ) -> None:
        self._plan = plan
        self._begin = begin
        self._end = end
        request = plan.request
        self.report = Report(plan.server)
        self.report.facts.update(
            host=request.server[0],
            port=request.server[1],
            job=request.job,
            rank=request.rank,
            size=request.size,
            wait=f"{request.timeout:.3g}",
        )
        self._servers: tuple[Address, ...] = ()
        self._address: Address = ("", 0)
        self._sock: socket.socket | None = None

    def _do(self, name: str, doing: str, work: Callable[[], Found]) -> bool:
        self._begin(name, doing)
        start = time.monotonic()
        status: Status
        cause = None
        try:
            found = work()
            status, text = ("ok", found) if isinstance(found, str) else found
        except Failed as failed:
            status, text, cause = "failed", str(failed), failed.cause
        step = Step(name, status, plain(text), time.monotonic() - start, cause)
        self.report.steps.append(step)
        self._end(step)
        return status != "failed"

    def _deadline(self) -> float:
        return time.monotonic() + self._plan.timeout

    def run(self) -> None:
        host = self._plan.request.server[0]
        if (
            self._do("resolve", f"looking up {host}", self._resolve)
            and self._do("connect", "connecting", self._connect)
            and (not self._plan.request.tls or self._do("TLS", "encrypting", self._encrypt))
            and self._do("server", "waiting for its answer", self._greet)
        ):
            self._join()

    # ---------------------------------------------------------------- the way there
    def _resolve(self) -> Found:
        host, port = self._plan.request.server
        try:
            found = in_time(lambda: resolve(host, port), self._plan.timeout)
        except TimeoutError:
            text = f"no name server answers within {self._plan.timeout:.3g} s"
            raise Failed("name_server", text) from None
        except RendezvousError as error:
            because = error.__context__
            again = isinstance(because, socket.gaierror) and because.errno == socket.EAI_AGAIN
            raise Failed("name_server" if again else "no_such_name", error.message) from None
        self._servers = found
        self.report.facts["ip"] = found[0][0]
        hosts = ", ".join(address for address, _ in found)
        return f"{host} is {hosts}" if host != hosts else f"{host} needs no looking up"

    def _connect(self) -> Found:
        """Try the server's addresses in turn, each with its share of the time."""
        deadline, failures = self._deadline(), []
        for left in range(len(self._servers), 0, -1):
            self._address = self._servers[-left]
            now = time.monotonic()
            try:
                self._sock = connected(self._address, 0, now + (deadline - now) / left)
            except OSError as error:
                failures.append((self._address, error))
            else:
                self.report.facts["ip"] = self._address[0]
                return f"{format_address(self._address)} accepts connections"
        raise self._not_connected(failures)

    def _not_connected(self, failures: list[tuple[Address, OSError]]) -> Failed:
        self._address, first = failures[0]
        cause = findings.connect_cause(first)
        if cause == "refused" and self._draining():
            cause = "draining"
        return Failed(cause, "; ".join(f"{format_address(at)}: {_why(e)}" for at, e in failures))

    def _draining(self) -> bool:
        """Whether the admin port, which lives longer, says that the server is ending."""
        try:
            return b"draining" in self._ask_admin("/readyz", 0)[0]
        except OSError:
            return False

    def _ask_admin(self, path: str, port: int) -> tuple[bytes, Address]:
        """Return the admin port's answer, and our end of the connection, from our `port`."""
        deadline = time.monotonic() + min(self._plan.timeout, ADMIN_SECONDS)
        return http_get((self._address[0], self._plan.admin_port), path, port, deadline)

    def _encrypt(self) -> Found:
        assert self._sock is not None
        self._sock = encrypted = encrypt(self._sock, self._plan.request.server[0], self._deadline())
        days = days_left(encrypted)
        text = f"{encrypted.version()}; the certificate is trusted, and valid for {days:.0f} days"
        return "warning" if days < SOON_DAYS else "ok", text

    def _greet(self) -> Found:
        """Say hello and wait for the challenge; leave before the proof, so nothing is joined."""
        assert self._sock is not None
        with self._sock as sock:
            hello = Hello("check", 1, 0, 0, 0, (sock.getsockname()[:2],), auth.nonce())
            self.report.round_trip_seconds = handshake(sock, hello, self._deadline())
        return "a rendezvous server, protocol version 3"

    # ------------------------------------------------------------------------- join
    def _join(self) -> None:
        plan, reactor = self._plan, SyncReactor()
        request = plan.request
        endpoint = SocketEndpoint(reactor, (self._address,), request, allocate)
        comm = Communicator(endpoint, reactor, range(request.size), 0, plan.timeout)
        try:
            endpoint.connect()
            joined = self._do(
                "authenticate", "joining", lambda: self._authenticate(endpoint, reactor)
            )
            measure = self._round_trips if joined else self._handshake_time
            answers = self._do("round trip", "measuring", lambda: measure(endpoint, reactor))
            joined = joined and answers
            self._do("address", "comparing", lambda: self._addresses(endpoint))
            self._do("NAT", "asking a second server port", lambda: self._nat(endpoint))
            if joined and request.size > 1:
                self._meet(comm, endpoint, reactor)
            elif joined:
                self._do("links", "", lambda: ("skipped", "no peers: needs a job, rank and size"))
        finally:
            comm.close()

    def _authenticate(self, endpoint: SocketEndpoint, reactor: SyncReactor) -> Found:
        reactor.run_until(lambda: bool(endpoint.observed or endpoint.failure), self._deadline())
        if endpoint.failure is not None:
            raise self._turned_away(endpoint.failure)
        if endpoint.observed is None:
            error = endpoint.join_error()
            if isinstance(error, ServerDraining):
                raise self._turned_away(error)
            raise Failed("lost", f"no word within {self._plan.timeout:.3g} s")
        request = self._plan.request
        match self._plan.credentials:
            case "secret":
                return "a token made from the secret admits us"
            case "token" | "expired":
                return f"the token admits rank {request.rank} of job {request.job!r}"
        return "admitted without a token"

    def _turned_away(self, error: FmiError) -> Failed:
        if isinstance(error, JoinTimeout):
            self.report.facts["missing"] = some_ranks(error.missing)
        return Failed(findings.join_cause(error, self._plan.credentials), error.message)

    def _handshake_time(self, *_: object) -> Found:
        return f"{time_text(self.report.round_trip_seconds or 0.0)}, of one handshake"

    def _round_trips(self, endpoint: SocketEndpoint, reactor: SyncReactor) -> Found:
        times: list[float] = []
        end = time.monotonic() + ROUND_TRIP_SECONDS
        while not times or (len(times) < ROUND_TRIPS and time.monotonic() < end):
            endpoint.missing = None
            start = time.perf_counter()
            endpoint.ask_missing()
            reactor.run_until(
                lambda: endpoint.missing is not None or endpoint.failure is not None,
                self._deadline(),
            )
            if endpoint.failure is not None:
                raise self._turned_away(endpoint.failure)
            if endpoint.missing is None:
                raise Failed("lost", f"no answer within {self._plan.timeout:.3g} s")
            times.append(time.perf_counter() - start)
        median = self.report.round_trip_seconds = statistics.median(times)
        return f"{time_text(median)} to the server and back, median of {len(times)}"

    # -------------------------------------------------------------------------- NAT
    def _addresses(self, endpoint: SocketEndpoint) -> Found:
        if endpoint.observed is None or endpoint.local is None:
            return "skipped", "the server tells it to the ranks that it admits only"
        self.report.local, self.report.observed = endpoint.local, endpoint.observed
        here, there = format_address(endpoint.local), format_address(endpoint.observed)
        return f"{here} here, {there} at the server"

    def _nat(self, endpoint: SocketEndpoint) -> Found:
        report = self.report
        seen = [report.observed] if report.observed else []
        second = None
        if self._plan.admin_port and (not seen or report.observed != report.local):
            second = self._seen_by_admin(report.local[1] if report.local else 0)
        if second is not None:
            report.local = report.local or second[0]
            seen.append(second[1])
        kind = report.nat = findings.classify(report.local, seen) if report.local else None
        if kind is None:
            return "skipped", "no server port told our address"
        one = len(seen) == 1 and kind != "none" and bool(report.observed)
        note = " (only one server port could be reached)" if one else ""
        status: Status = "warning" if kind in findings.RELAYING else "ok"
        return status, findings.NAT_TEXT[kind] + note

    def _seen_by_admin(self, port: int) -> tuple[Address, Address] | None:
        """Return both ends of a connection from our `port`, as we and the admin port see it."""
        try:
            body, local = self._ask_admin("/address", port)
            told = json.loads(body)
            return local, (addresses.plain(told["address"]), int(told["port"]))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            return None  # it is closed, or something else answers there

    # ------------------------------------------------------------------------ links
    def _meet(self, comm: Communicator, endpoint: SocketEndpoint, reactor: SyncReactor) -> None:
        request = self._plan.request
        doing = f"waiting for all {request.size} ranks, up to {request.timeout:.3g} s"
        if not self._do("peers", doing, lambda: self._peers(endpoint, reactor)):
            return
        for pair in itertools.combinations(range(request.size), 2):
            if not self._pair(comm, pair):
                return

    def _peers(self, endpoint: SocketEndpoint, reactor: SyncReactor) -> Found:
        try:
            wait_ready(endpoint, reactor, self._plan.request.timeout)
        except FmiError as error:
            raise self._turned_away(error) from None
        return f"all {self._plan.request.size} ranks are there"

    def _pair(self, comm: Communicator, pair: tuple[int, int]) -> bool:
        """Measure one pair's link while the other ranks wait."""
        if comm.rank in pair:
            peer = sum(pair) - comm.rank
            return self._do(f"link {peer}", "measuring", lambda: self._link(comm, peer))
        try:
            self._turn(comm)
        except FmiError as error:
            failed = self._link_failed(error, pair[0])
            return self._do("links", "", lambda: _raise(failed))
        return True

    def _turn(self, comm: Communicator) -> None:
        comm.barrier(timeout=2 * self._plan.timeout)

    def _link(self, comm: Communicator, peer: int) -> Found:
        try:
            self._turn(comm)
            link = linktest.measure(comm, peer)
        except FmiError as error:
            raise self._link_failed(error, peer) from None
        except (TypeError, ValueError):  # what came is no part of a check
            raise self._link_failed(CollectiveMismatch("not a check"), peer) from None
        self.report.links.append(link)
        out, back = link.send_bytes_per_second, link.receive_bytes_per_second
        rates = f"{findings.rate_text(out)} out, {findings.rate_text(back)} in"
        text = f"{link.kind}, round trip {time_text(link.round_trip_seconds)}, {rates}"
        return "ok" if link.kind == "direct" else "warning", text

    def _link_failed(self, error: FmiError, peer: int) -> Failed:
        missing = error.missing[:1] if isinstance(error, CollectiveTimeout) else []
        self.report.facts["peer"] = next(iter(missing), peer if error.peer is None else error.peer)
        return Failed(findings.link_cause(error), error.message)


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror or str(error)).lower()


def _raise(error: Exception) -> Found:
    raise error
