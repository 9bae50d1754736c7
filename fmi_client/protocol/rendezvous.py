"""Both sides of the conversation between a rank and the rendezvous server (version 3).

::

    rank                                   server
    0x00, hello(job, size, rank, …) ──►
                                    ◄──    challenge(nonce)
    proof(mac)                      ──►
                                    ◄──    welcome(mac, observed address, run) or error(code)
                                    ◄──    ready                            all ranks are here
    link(peer, got)                 ──►
                                    ◄──    want(peer)       that peer asked for a link with you
                                    ◄──    punch(peer, addresses, cookie, ticket, got)  to both
    abort(kind, reason) / leave     ──►
                                    ◄──    lost(rank) / left(rank) / aborted(by, …) / draining

Both codes cover the entire hello and both nonces, each under its own label, with the
job's admission key (see `auth`). The connection stays open for the life of the job: its
end without "leave" is how the server notices that a rank died.

A server may die, too, or be stopped. Its ranks then come to the next one with the name of their
run, and whether they had heard "ready": of that the next server, which knows nothing, makes
the job anew. One that lives has announced a rank whose connection ended, and refuses it.

Where a punch fails, both ranks open a second connection to the server::

    0x00, relay(ticket)             ──►
                                    ◄──    0x01 once the peer's leg is there, or
                                           0x02 if the job has no pair left to relay

and from then on the server passes on bytes, which are those of a direct connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fmi_client.errors import (
    AuthenticationFailed,
    FmiError,
    JobFull,
    ProtocolError,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol import auth, frames
from fmi_client.protocol.addresses import Address, plain
from fmi_client.protocol.frames import Message, encode
from fmi_client.protocol.hello import Hello, cert, read_address, read_addresses, sixteen
from fmi_client.protocol.notice import MAX_REASON, SERVER, Notice

_E = TypeVar("_E")

AUTH_SECONDS = 5.0
"""From accept to proof; absolute, so that a byte a second does not help."""

REJOIN_SECONDS = 15.0
"""How long ranks wait for a server to come back, and it for them."""

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""TCP options of all connections, between ranks too: seconds, seconds, probes. Who vanished without
a word is noticed in 11 s."""

USER_TIMEOUT_MS = 8000
"""What was sent between rank and server and not acknowledged for so long shows the same."""

LEFT = "left"
"""Why a rank that said goodbye is not there any more."""

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 60.0
"""A server that sends us away for less or longer than that is not believed."""

ERRORS: dict[str, type[RendezvousError]] = {
    "auth": AuthenticationFailed,
    "full": JobFull,
    "taken": RankTaken,
    "draining": ServerDraining,
    "refused": RendezvousError,
}
"""What an error's code becomes at the rank."""

_CODES = {kind: code for code, kind in ERRORS.items()}
_GENERIC = "authentication failed"


# ------------------------------------------------------------------ the server's side


@dataclass(frozen=True, slots=True)
class Admission:
    """Whom the server lets in: `secret` None means that no token can be checked."""

    secret: bytes | None
    allow_anonymous: bool

    def key(self, hello: Hello, now: float) -> bytes | None:
        """Return the key that the rank must prove to have, or None if nothing admits it."""
        if hello.seen is not None:
            return auth.carrier_key(self.secret) if self.secret is not None else None
        if hello.expires == 0:
            return auth.ANONYMOUS if self.allow_anonymous else None
        if self.secret is None or hello.expires <= now:
            return None
        return auth.admission_key(self.secret, hello.job, hello.size, hello.expires)


@dataclass(frozen=True, slots=True)
class Authenticated:
    """The rank proved its right to join; if the registry takes it, answer with `welcome`."""

    hello: Hello
    welcome: Message


@dataclass(frozen=True, slots=True)
class RelayLeg:
    """Not a rank that joins, but the second connection of one that did: its ticket."""

    ticket: bytes
    on: bool = False
    """Whether another server passes it on to us."""


@dataclass(frozen=True, slots=True)
class Request:
    """An authenticated rank's message: link, abort, who or leave."""

    message: Message


class ServerSide:
    """One connection as the server sees it; `now` is Unix time in seconds throughout."""

    __slots__ = (
        "_admission",
        "_challenge",
        "_hello",
        "_hello_body",
        "_joined",
        "_leg",
        "_preface_seen",
        "_reader",
        "deadline",
        "failure",
        "observed",
        "outgoing",
    )

    def __init__(self, admission: Admission, observed: Address, now: float) -> None:
        self._admission = admission
        self._reader = frames.FrameReader(frames.MAX_FRAME_BEFORE_AUTH)
        self._preface_seen = False
        self._hello: Hello | None = None
        self._hello_body = b""
        self._challenge = b""
        self._joined = self._leg = False
        self.observed = plain(observed[0]), observed[1]
        self.failure: FmiError | None = None
        """What is wrong behind the events that `receive` returned; no more bytes are taken."""
        self.deadline = now + AUTH_SECONDS
        self.outgoing = bytearray()
        """Bytes to write; the caller takes and clears them."""

    @property
    def proven(self) -> bool:
        """Whether the rank has proved its right to join."""
        return self._joined

    def receive(self, data: bytes, now: float) -> list[Authenticated | RelayLeg | Request]:
        """Take bytes from the rank and return what they mean.

        What is wrong behind an event is in `failure`: however the bytes were cut, what came
        before it counts.

        Raises:
            AuthenticationFailed, ProtocolError: send what `refusal` says, if anything; close.
        """
        if not self._preface_seen:
            if data[:1] != frames.PREFACE:
                raise ProtocolError("not a version 3 client")
            self._preface_seen = True
            data = data[1:]
        feed = self._reader.feed(data)
        events: list[Authenticated | RelayLeg | Request]
        events, self.failure = _up_to_error(self._handle(*frame, now) for frame in feed)
        return events

    def _handle(
        self, message: Message, body: bytes, now: float
    ) -> Authenticated | RelayLeg | Request | None:
        if self._leg:
            raise ProtocolError("a relay leg has nothing to say before its peer is there")
        if self._joined:
            return Request(message)
        if self._hello is None and message["t"] == "relay":
            if self._reader.waiting:
                raise ProtocolError("relay: bytes that came before the word to begin")
            self._leg = True
            return RelayLeg(sixteen(message, "ticket"), message.get("on") is True)
        if self._hello is None:
            self._hello, self._hello_body = Hello.decode(message), body
            self._challenge = auth.nonce()
            self.outgoing += encode({"t": "challenge", "nonce": self._challenge})
            return None
        return self._check_proof(self._hello, message, now)

    def _check_proof(self, hello: Hello, message: Message, now: float) -> Authenticated:
        mac = message.get("mac") if message["t"] == "proof" else None
        proof = mac if isinstance(mac, bytes) else b""
        key = self._admission.key(hello, now)
        expected = auth.mac(key or b"", "fmi3 rank", self._hello_body, self._challenge)
        if not auth.same(proof, expected) or key is None:
            raise AuthenticationFailed(_GENERIC)
        self._joined = True
        self.observed = hello.seen or self.observed
        self._reader.limit = frames.MAX_FRAME
        seen = encode_address(self.observed)
        code = auth.mac(key, "fmi3 server", self._hello_body, self._challenge, seen)
        return Authenticated(hello, {"t": "welcome", "mac": code, "seen": list(self.observed)})

    def refusal(self, error: Exception) -> Message | None:
        """Return what to answer before closing, or None: nothing, for who sent no whole hello.

        Before proof all get the same, whatever was wrong: bad proof, bad frame, bad token.
        """
        if self._hello is None:
            return None
        return error_message(error if self._joined else AuthenticationFailed(_GENERIC))


def _up_to_error(events: Iterable[_E | None]) -> tuple[list[_E], FmiError | None]:
    """Return the events up to the first error, and the error; raise it where it comes first."""
    found: list[_E] = []
    try:
        found.extend(event for event in events if event is not None)
    except FmiError as error:
        if not found:
            raise
        return found, error
    return found, None


def encode_address(address: Address) -> bytes:
    """Return the bytes under a code that stand for an address."""
    return f"{address[0]} {address[1]}".encode()


def error_message(error: Exception) -> Message:
    """Return the wire form of an error: one generic answer for all that precedes joining."""
    code = _CODES.get(type(error)) if isinstance(error, RendezvousError) else "refused"
    text = error.message if isinstance(error, RendezvousError) else "malformed request"
    message = {"t": "error", "code": code or "refused", "why": text[:MAX_REASON]}
    return message | ({"after": error.retry_after} if isinstance(error, ServerDraining) else {})


def read_error(message: Message) -> RendezvousError:
    """Return the error that a server's answer stands for."""
    kind = ERRORS.get(str(message.get("code")), RendezvousError)
    error = kind(frames.field(message, "why", str))
    after = message.get("after")
    if (
        isinstance(error, ServerDraining)
        and isinstance(after, int | float)
        and not math.isnan(after)
    ):
        error.retry_after = min(max(MIN_RETRY_SECONDS, after), MAX_RETRY_SECONDS)
    return error


# -------------------------------------------------------------------- the rank's side


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server took us in and sees us at `observed`."""

    observed: Address
    run: bytes = b""
    """What to call this run of the job when rejoining; empty: the server is too old for that."""


@dataclass(frozen=True, slots=True)
class Ready:
    """All ranks of the job are here."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Answer to `who`: the ranks that have not joined."""

    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Gone:
    """A rank is no longer there: it said goodbye (`clean`), or was lost."""

    rank: int
    clean: bool
    why: str


@dataclass(frozen=True, slots=True)
class Want:
    """`peer` asked for a link; answer with `link(peer)` when ready to punch."""

    peer: int


@dataclass(frozen=True, slots=True)
class PunchNow:
    """Connect to `peer` now; it does the same."""

    peer: int
    addresses: tuple[Address, ...]
    """Of the IP versions that both have; of each, the outermost first."""
    cookie: bytes
    ticket: bytes | None = None
    """For a relay leg, where the server relays."""
    hopeless: bool = False
    """One side's NAT gives every connection another port, or the two have no IP version in
    common: relay at once."""
    got: int = 0
    """Bytes that the peer has of the link already, which a server relayed that is gone."""
    certificate: bytes = b""
    """The only one to trust on a link with it; empty: it encrypts nothing."""


@dataclass(frozen=True, slots=True)
class Draining:
    """The server is going away; links that exist are not affected."""


Event = Welcome | Ready | Missing | Gone | Want | PunchNow | Notice | Draining


class ClientSide:
    """One rank's conversation with the server.

    Args:
        hello: what the rank says of itself; its nonce must be fresh.
        token: what admits it, or None.
    """

    def __init__(self, hello: Hello, token: auth.Token | None) -> None:
        self._key = token.key if token else auth.ANONYMOUS
        self._reader = frames.FrameReader()
        self._frame = encode(hello.encode())
        self._body = self._frame[4:]
        self._challenge: bytes | None = None
        self._welcome = False
        self.failure: FmiError | None = None
        """What is wrong behind the events that `receive` returned; no more bytes are taken."""
        self.outgoing = bytearray(frames.PREFACE + self._frame)
        """Bytes to write; the caller takes and clears them."""

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the server and return what they mean; see `ServerSide.receive`.

        Raises:
            RendezvousError: the server refused us (its subclass says why).
            AuthenticationFailed: the server could not prove that it knows our token's secret.
            ProtocolError: it sent what the protocol forbids.
        """
        feed = self._reader.feed(data)
        events: list[Event]
        events, self.failure = _up_to_error(self._handle(message) for message, _ in feed)
        return events

    def _handle(self, message: Message) -> Event | None:
        kind = message["t"]
        if kind == "error":
            raise read_error(message)
        if self._challenge is None:
            self._answer(message)
            return None
        if not self._welcome:
            return self._check_server(message)
        decode = _EVENTS.get(kind)
        if decode is None:
            raise ProtocolError(f"unexpected message {kind!r} from the server")
        return decode(message)

    def _answer(self, message: Message) -> None:
        if message["t"] != "challenge":
            raise ProtocolError(f"expected challenge, got {message['t']!r}")
        self._challenge = frames.field(message, "nonce", bytes, low=auth.NONCE_BYTES)
        proof = auth.mac(self._key, "fmi3 rank", self._body, self._challenge)
        self.outgoing += encode({"t": "proof", "mac": proof})

    def _check_server(self, message: Message) -> Welcome:
        if message["t"] != "welcome":
            raise ProtocolError(f"expected welcome, got {message['t']!r}")
        seen = read_address(message.get("seen"))
        expected = auth.mac(
            self._key, "fmi3 server", self._body, self._challenge or b"", encode_address(seen)
        )
        if not auth.same(frames.field(message, "mac", bytes), expected):
            raise AuthenticationFailed("the server does not know the secret of our token")
        self._welcome = True
        return Welcome(seen, sixteen(message, "run") if "run" in message else b"")

    @property
    def answered(self) -> bool:
        """Whether the server may have let us in by now, as far as that depends on us."""
        return self._challenge is not None

    def link(self, peer: int, got: int = 0) -> None:
        """Ask for a link with `peer`, or agree to one that it wants.

        Args:
            got: bytes that have come over it, if there was one and its relay was lost.
        """
        self.outgoing += encode({"t": "link", "peer": peer} | ({"got": got} if got else {}))

    def who(self) -> None:
        """Ask which ranks are missing."""
        self.outgoing += encode({"t": "who"})

    def tell(self, notice: Notice) -> None:
        """Let all ranks know."""
        self.outgoing += encode(notice.encode("abort"))

    def leave(self) -> None:
        """Say goodbye: the end of this connection is no death."""
        self.outgoing += encode({"t": "leave"})


def _punch(message: Message) -> PunchNow:
    return PunchNow(
        frames.field(message, "peer", int),
        read_addresses(message, "at", low=0),
        sixteen(message, "cookie"),
        sixteen(message, "ticket") if "ticket" in message else None,
        frames.field(message, "hopeless", bool),
        frames.field(message, "got", int) if "got" in message else 0,
        cert(message),
    )


def _gone(message: Message) -> Gone:
    return Gone(
        frames.field(message, "rank", int),
        frames.field(message, "clean", bool),
        frames.field(message, "why", str),
    )


_EVENTS: dict[str, Callable[[Message], Event]] = {
    "ready": lambda _: Ready(),
    "missing": lambda m: Missing(frames.unpack_ranks(frames.field(m, "ranks", bytes))),
    "gone": _gone,
    "want": lambda m: Want(frames.field(m, "peer", int)),
    "punch": _punch,
    "aborted": lambda m: Notice.decode(m, frames.field(m, "by", int, low=SERVER)),
    "draining": lambda _: Draining(),
}
