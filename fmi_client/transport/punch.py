"""Making a direct connection between two ranks, of which neither may accept connections.

Both sides connect to each other from the port that the server saw, at the same time, and
listen on it too: whichever way round a connection comes about (ours, theirs, or TCP's
simultaneous open), each one is a `_Trial` that must prove itself. The lower rank keeps
the first that does; the higher one follows; the rest are closed afterwards.

A leg through the server's relay is one more trial, begun when there is no hope for a direct
connection or none has come about soon; it proves itself like the others.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError, PunchFailed
from fmi_client.protocol.addresses import Address, plain
from fmi_client.protocol.peer import Handshake
from fmi_client.protocol.rendezvous import PunchNow
from fmi_client.transport.knocking import Knocking
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.relay import Dial
from fmi_client.transport.sockets import keep_alive
from fmi_client.transport.tls import TlsSocket

RELAY_AFTER = 0.4
"""Seconds of punching before the relay is asked, too, where there is hope without it."""

RELAY_GRACE = 0.05
"""Seconds for which a proven relay leg lets a direct connection come first."""

DOUBT_SECONDS = 0.3
"""How long the peer may take to follow a choice: if it proves itself elsewhere later than that,
it is awake, and either the choice or its answer was lost."""

LAST_SECONDS = 2.0
"""How long a punch goes on that may be in vain: without the server or its relay, or after a
broken link."""

MAX_CALLERS = 16
"""Connections made to us that may be unproven at once for one peer. One more takes the place of the
oldest: whoever forges hellos gets no more than these, and cannot keep the peer out."""


class _Trial:
    """One connection on which the handshake runs."""

    def __init__(
        self, punch: Punch, sock: socket.socket, address: Address | None, kind: str = "direct"
    ) -> None:
        self.punch = punch
        self.sock = sock
        self.kind = kind
        self.address = address
        """Where we connected to, or None if the peer connected to us."""
        self.expected = kind == "relay" or address is not None or _host(sock) in punch.hosts
        """Whether it leads to where the peer should be: others may call us, and mean harm."""
        self.began = punch.reactor.now()
        self.handshake = punch.new_handshake()
        keep_alive(sock)
        # From here on: the handshake is four small messages, each of which Nagle would delay.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def begin(self, hello: bytes = b"") -> None:
        """Speak; `hello` is what the other side has said already."""
        self.punch.reactor.watch(self.sock, self.read)
        if self._write() and hello:
            self.take(hello)

    def read(self) -> None:
        try:
            data = self.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.take(data)
        else:
            self.punch.drop(self)

    def take(self, data: bytes) -> None:
        try:
            self.handshake.receive(data)
        except AuthenticationFailed as error:
            if self.expected:
                self.punch.stranger = error
            self.punch.drop(self)
            return
        except ProtocolError:
            self.punch.drop(self)
            return
        if self._write():
            self.punch.progress(self)

    def pick(self) -> None:
        self.handshake.pick()
        self._write()

    def _write(self) -> bool:
        out, self.handshake.outgoing = self.handshake.outgoing, bytearray()
        if not out:
            return True
        try:
            # A fresh connection takes these few bytes whole, or it is not worth keeping.
            whole = self.sock.send(out) == len(out)
        except OSError:
            whole = False
        if not whole:
            self.punch.drop(self)
        return whole

    @property
    def calls(self) -> bool:
        """Whether the other side connected to us."""
        return self.address is None and self.kind == "direct"

    def close(self) -> None:
        self.punch.reactor.unwatch(self.sock)
        self.sock.close()


def _host(sock: socket.socket) -> str | None:
    try:
        return plain(sock.getpeername()[0])
    except OSError:  # it has gone
        return None


class Punch:
    """The attempt to reach one peer.

    Args:
        instruction: the server's "punch now": addresses and cookie of this pair.
        port: local port to connect from, where the peer connects to.
        server: where relay legs go.
        channel: "direct" takes none, "relay" nothing else, "auto" what comes first.
        seconds: how long to try.
        new_handshake: makes the handshake for a connection with the peer.
        on_linked: given the chosen socket, its kind ("direct" or "relay"), and the bytes that
            came behind the handshake.
        on_failed: given the error when `seconds` have passed in vain.
        on_refused: called when the relay has ended our leg: with another ticket it may be taken.
    """

    def __init__(
        self,
        reactor: Reactor,
        instruction: PunchNow,
        *,
        rank: int,
        port: int,
        server: Address,
        channel: str,
        seconds: float,
        new_handshake: Callable[[], Handshake],
        on_linked: Callable[[socket.socket, str, bytes], None],
        on_failed: Callable[[FmiError], None],
        on_refused: Callable[[], None],
    ) -> None:
        self.reactor = reactor
        self.instruction = instruction
        self.peer = instruction.peer
        self.rank = rank
        self.new_handshake = new_handshake
        self._knocking = Knocking(
            reactor,
            instruction.addresses,
            port,
            gives_way=rank > self.peer,
            on_open=lambda sock, address: self._try(_Trial(self, sock, address)),
        )
        self._server = server
        self._channel = channel
        self._hopeless = instruction.hopeless or channel == "relay"
        self._relay: Dial | None = None
        self._on_linked = on_linked
        self._on_failed = on_failed
        self._on_refused = on_refused
        self._seconds = seconds
        self._trials: list[_Trial] = []
        self._picked: _Trial | None = None
        self._picked_at = 0.0
        self._over = False
        self.hosts = frozenset(host for host, _ in instruction.addresses)
        """Where the peer is thought to be. Only a hint: its NAT may have other addresses."""
        self._no_relay = "has not relayed yet" if instruction.ticket else "does not relay"
        """What the server does instead of relaying."""
        self.stranger: AuthenticationFailed | None = None
        """Set when somebody answered where the peer should be, or the peer without our key."""
        self._in_the_end: FmiError | None = None
        self._began = reactor.now()
        self._timer = reactor.call_later(seconds, self._expire)

    def start(self) -> None:
        if self._channel != "relay":
            self._knocking.start()
        if self.instruction.ticket is not None and self._channel != "direct":
            wait = 0.0 if self._hopeless else RELAY_AFTER
            self.reactor.call_later(wait, self._dial_relay)
        elif self._channel == "relay":
            self.reactor.call_later(0, self._expire)

    # ------------------------------------------------------------- ways to the peer
    def _dial_relay(self) -> None:
        ticket = self.instruction.ticket
        if not self._over and ticket is not None:
            self._relay = Dial(
                self.reactor, self._server, ticket, self._met_at_relay, self._relay_failed
            )

    def _met_at_relay(self, sock: socket.socket) -> None:
        self._try(_Trial(self, sock, None, "relay"))

    def _try(self, trial: _Trial, hello: bytes = b"") -> None:
        self._trials.append(trial)  # first: it may break at once
        trial.begin(hello)

    def _relay_failed(self, what: str, final: bool) -> None:
        self._no_relay = what
        if not final:
            self._on_refused()
            return
        # Only a direct connection can come now: at most as late as others come about.
        if self._channel == "relay":
            self._give_up_in(0.0)
        else:
            self._give_up_in(RELAY_AFTER if self._hopeless else LAST_SECONDS)

    def adopt(self, sock: socket.socket, hello: bytes) -> None:
        """Take over a connection that the peer made to our listener."""
        if self._over or self._channel == "relay":
            sock.close()
            return
        callers = [each for each in self._trials if each.calls and not each.handshake.proven]
        if len(callers) >= MAX_CALLERS:
            self.drop(next((each for each in callers if not each.expected), callers[0]))
        self._try(_Trial(self, sock, None), hello)

    # ------------------------------------------------------------------- choosing
    def progress(self, trial: _Trial) -> None:
        """A trial moved on: choose it, or finish with it."""
        if self._over:
            return
        if trial.handshake.complete:
            self._win(trial)
        elif trial.handshake.low and trial.handshake.proven:
            if self._picked is not None:
                self._doubt(self._picked, trial)
            elif trial.kind == "relay" and not self._hopeless:
                self.reactor.call_later(RELAY_GRACE, lambda: self._pick(trial))
            else:
                self._pick(trial)

    def _doubt(self, picked: _Trial, other: _Trial) -> None:
        """Give up a choice that the peer does not follow though it proves itself elsewhere.

        Not at once: a peer that has just woken up may follow next, and close the other.
        """

        def drop() -> None:
            if not self._over and self._picked is picked and other in self._trials:
                self.drop(picked)

        if self.reactor.now() - self._picked_at > DOUBT_SECONDS:
            self.reactor.call_later(RELAY_GRACE, drop)

    def _pick(self, trial: _Trial) -> None:
        if not self._over and self._picked is None and trial in self._trials:
            self._picked, self._picked_at = trial, self.reactor.now()
            trial.pick()

    def drop(self, trial: _Trial) -> None:
        """A trial broke; another proven one may take its place."""
        trial.close()
        if trial in self._trials:
            self._trials.remove(trial)
        if self._over:
            return
        if trial.address is not None:
            self._knocking.again(trial.address)
        if self._picked is trial:
            self._picked = None
            for other in list(self._trials):
                self.progress(other)

    def _win(self, trial: _Trial) -> None:
        self.reactor.unwatch(trial.sock)
        self._trials.remove(trial)
        self.cancel()
        stream = trial.handshake.stream
        sock = trial.sock if stream is None else TlsSocket(trial.sock, stream)
        self._on_linked(sock, trial.kind, trial.handshake.rest())

    @property
    def connected(self) -> bool:
        """Whether the peer may be there, or is awaited at the relay; strangers are found out."""
        if self._relay is not None and self._relay.waiting:
            return True
        since = self.reactor.now() - (DOUBT_SECONDS if self.stranger is not None else 0.0)
        return any(trial.began <= since for trial in self._trials)

    @property
    def chosen(self) -> bool:
        """Whether a proven connection only waits for the peer's last word."""
        return self._picked is not None

    def hurry(self, error: FmiError) -> None:
        """If nothing comes about soon, fail with `error`."""
        self._in_the_end = error
        self._give_up_in(LAST_SECONDS)

    def _give_up_in(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer.cancel()
        self._timer = self.reactor.call_later(self._seconds, self._expire)

    def _expire(self) -> None:
        if self.connected:
            # Connected, but not answered: the peer computes. The operation's deadline decides.
            self._timer = self.reactor.call_later(self._seconds, self._expire)
            return
        self.cancel()
        self._on_failed(self.error())

    def error(self) -> FmiError:
        """Return why there is no link."""
        if self.stranger is not None:
            return AuthenticationFailed(
                f"rank {self.peer} cannot be authenticated: {self.stranger.message}; "
                "all ranks of a job need the same key, or none",
                rank=self.rank,
                peer=self.peer,
            )
        if self._in_the_end is not None:
            return self._in_the_end
        return PunchFailed(
            f"no connection after {self.reactor.now() - self._began:.1f} s "
            f"(last: {self._knocking.last_error}); {self._why()}",
            rank=self.rank,
            peer=self.peer,
        )

    def _why(self) -> str:
        if self._channel == "relay":
            return f"channel='relay' allows nothing but the relay, and the server {self._no_relay}"
        relay = f"the server {self._no_relay}"
        if self._channel == "direct":
            relay = "channel='direct' rules out the relay"
        return f"a symmetric NAT or a firewall may be in the way, and {relay}"

    def cancel(self) -> None:
        """Stop trying and close what is open."""
        self._over = True
        self._timer.cancel()
        self._knocking.stop()
        if self._relay is not None:
            self._relay.cancel()
        for trial in self._trials:
            trial.close()
        self._trials.clear()
