"""What a check of a rendezvous server found: its steps, and what they mean. No I/O.

`check` does the looking; here is decided what to make of it: which NAT this is, what went
wrong (a `cause`), and the one sentence of advice that ends the report.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fmi_client.errors import (
    AuthenticationFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    FmiError,
    JobFull,
    JoinTimeout,
    PunchFailed,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.tls import WANTS_TLS

Status = Literal["ok", "warning", "failed", "skipped"]

Nat = Literal["none", "preserving", "endpoint_independent", "symmetric", "changed"]
"""How the addresses that the server sees differ from the local one.

none                  not at all
preserving            the port is the same
endpoint_independent  another port, but the same one at two server ports
symmetric             another address at each server port
changed               another port; only one server port told, so it may be either
"""

Credentials = Literal["none", "unused", "token", "expired", "secret"]
"""What we show the server; unused: FMI_TOKEN is set, but the job that it is for is not given."""

NAT_TEXT: dict[Nat, str] = {
    "none": "none: the server sees our own address",
    "preserving": "keeps the port: links can be punched",
    "endpoint_independent": "changes the port, the same way for two server ports; "
    "punching does not use that: links are relayed",
    "symmetric": "another port for each destination (symmetric): links are relayed",
    "changed": "changes the port: links are relayed",
}
RELAYING: frozenset[Nat] = frozenset({"endpoint_independent", "symmetric", "changed"})

ADVICE: dict[str, str] = {
    # resolve
    "no_such_name": "Correct the host name {host!r}, which is not known, or give the server's "
    "IP address.",
    "name_server": "Give the server's IP address, or mend the network here: no name server "
    "answers (a Lambda in a VPC needs DNS resolution switched on).",
    # connect
    "refused": "Start the server at {ip}, or correct port {port}: nothing listens there (without "
    "--secret-file or --allow-anonymous, a server listens for its own machine only).",
    "black_hole": "Open TCP port {port} of {ip} in its security group or firewall, and see that "
    "the machine is up: packets vanish without an answer (a Lambda in a VPC also needs a way "
    "out, such as a NAT gateway).",
    "unreachable": "Mend the network here, or correct the address: there is no way to {ip}.",
    "draining": "Wait some seconds and try again, or start a new server: this one is shutting "
    "down and takes nobody new.",
    # server
    "http": "Give the port where ranks join (10000 by default): an HTTP server answers at port "
    "{port}, as on the admin port.",
    "ssh": "Give the port where ranks join (10000 by default): an SSH server answers at port "
    "{port}.",
    "tls": "Give a port that leads to the rendezvous server without TLS: something at port {port} "
    "wants to speak TLS.",
    "stranger": "Correct the address: what answers at {ip}:{port} is no rendezvous server that "
    "this version understands.",
    "silent": "Correct the address, or see whether the server hangs: something at {ip}:{port} "
    "accepts connections and says nothing (a load balancer with no server behind it, perhaps).",
    "closed": "Correct the address, or update the server: something at {ip}:{port} closes "
    "connections without a word (an old version, or a load balancer with no server behind it).",
    # TLS
    "no_extra": "Install the package cryptography here: with tls:// each rank makes a certificate.",
    "no_tls": "Start the server with --tls-cert and --tls-key, or leave out tls://: what answers "
    "at {ip}:{port} does not speak TLS 1.3.",
    "certificate": "Let FMI_TLS_CA name a file with the certificate that signed the server's, give "
    "the host name that is in it, or renew it: as it is, ranks do not trust it.",
    # authenticate
    "wants_tls": "Give the address with tls:// before it: this server takes nobody in plain.",
    "token_missing": "Give what admits you: --secret-file with the server's secret, or --token "
    "(FMI_TOKEN) with the --job, --size and --rank that it was made for.",
    "token_unused": "Give --job, --size and --rank as well: FMI_TOKEN admits one job of one size "
    "only.",
    "token_expired": "Make a new token: this one has expired.",
    "token_wrong": "Make the token anew from this server's secret, for exactly job {job!r} and "
    "size {size}: this one does not fit.",
    "secret_wrong": "Give the --secret-file that this server was started with: the one given is "
    "another.",
    "job_full": "Give all ranks the same --size and start them once only, or choose another "
    "--job: {job!r} has another size or runs already.",
    "rank_taken": "Give each process a --rank of its own, or choose another --job: another process "
    "is rank {rank} of {job!r}.",
    "turned_away": "Look at the server's log: it turns this rank away.",
    "lost": "Try again, and look at the server's log and at what is in between (a proxy, a "
    "firewall) if it happens again: the connection to the server breaks.",
    # peers and links
    "missing": "Start rank {missing} of {size} too, with the same --job and --size and within "
    "{wait} s: without it no link can be tried.",
    "key": "Give all ranks the same FMI_KEY, or none.",
    "no_link": "Start the server without --no-relay, or give one of the two ranks a public "
    "address: no direct connection comes about.",
    "peer_lost": "Look at what rank {peer} says: it ended during the test.",
    "mismatch": "Run the check as every rank of {job!r}, or choose another --job: rank {peer} does "
    "something else.",
    "stalled": "Try again, with a larger --timeout on a slow network: rank {peer} stopped "
    "answering during the test.",
}
"""One sentence for each cause."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried.

    Attributes:
        name: "resolve", "connect", "TLS" (with tls://), "server", "authenticate", "round trip",
            "address", "NAT", "peers", "link N" with peer N, or "links" where there is none to try,
            or one of two other ranks fails.
        status: how it went; a "warning" works all the same.
        text: what was found, for people.
        seconds: how long it took.
        cause: what is wrong, a key of `ADVICE`; None if it did not fail.
    """

    name: str
    status: Status
    text: str
    seconds: float = 0.0
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class LinkFound:
    """A link between this rank and a peer.

    Attributes:
        kind: "direct" or "relay".
        round_trip_seconds: of 8 bytes, the median.
        send_bytes_per_second, receive_bytes_per_second: one direction at a time.
    """

    peer: int
    kind: str
    round_trip_seconds: float
    send_bytes_per_second: float
    receive_bytes_per_second: float


@dataclass(slots=True)
class Report:
    """All that one check found.

    Attributes:
        server: as it was given, "host:port".
        facts: what the advice may name: host, ip, port, job, rank, size, wait, missing, peer.
        local: our end of the connection to the server.
        observed: where the server sees us.
        round_trip_seconds: to the server and back.
    """

    server: str
    facts: dict[str, object] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    local: Address | None = None
    observed: Address | None = None
    nat: Nat | None = None
    round_trip_seconds: float | None = None
    links: list[LinkFound] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(step.status == "failed" for step in self.steps)

    @property
    def advice(self) -> str:
        """One sentence: what to do about the first thing wrong, or what to expect."""
        for step in self.steps:
            if step.cause is not None:
                return ADVICE[step.cause].format_map(self.facts)
        return outlook(self.nat, self.local, self.links)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "server": self.server,
            "ok": self.ok,
            "advice": self.advice,
            "round_trip_seconds": self.round_trip_seconds,
            "local": list(self.local) if self.local else None,
            "observed": list(self.observed) if self.observed else None,
            "nat": self.nat,
            "links": [asdict(link) for link in self.links],
            "steps": [asdict(step) for step in self.steps],
        }


def outlook(nat: Nat | None, local: Address | None, links: Sequence[LinkFound]) -> str:
    """Return what to expect where nothing failed."""
    relayed = [link.peer for link in links if link.kind != "direct"]
    if relayed:
        ranks = ", ".join(map(str, relayed))
        return (
            f"It works, but data between this rank and rank {ranks} go through the server, which "
            "sets their rate; a public address, or a NAT that keeps ports, at either end would "
            "make the link direct."
            if nat in RELAYING
            else f"It works, but data between this rank and rank {ranks} go through the server, "
            "which sets their rate; look at the NAT of the other end, which this check shows when "
            "it runs there."
        )
    if links:
        return "All is well: every link of this rank is direct."
    if nat in RELAYING:
        return (
            "It works, but expect relayed links: this NAT changes ports, so only ranks with a "
            "public address or behind the same NAT are reached directly."
        )
    if nat == "preserving":
        return "All is well: expect direct links, except with ranks whose NAT changes ports."
    if local is not None and _is_loopback(local):
        return "All is well on this machine; run the check again where the ranks will run."
    return "All is well: expect direct links, as no NAT is in between."


def _is_loopback(address: Address) -> bool:
    return address[0].startswith("127.") or address[0] == "::1"


def classify(local: Address, seen: Sequence[Address]) -> Nat | None:
    """Return the kind of NAT from what one or two server ports saw of one local port.

    Args:
        local: our end.
        seen: what the port for ranks saw, if it told, and then what the admin port saw.
    """
    if not seen:
        return None
    if seen[0] == local:
        return "none"
    if len(set(seen)) > 1:
        return "symmetric"
    if seen[0][1] == local[1]:
        return "preserving"
    return "changed" if len(seen) == 1 else "endpoint_independent"


def who_answers(first: bytes) -> str:
    """Return the cause for bytes that no rendezvous server says."""
    if first.startswith((b"HTTP/", b"<")):
        return "http"
    if first.startswith(b"SSH-"):
        return "ssh"
    if first[:2] == b"\x15\x03":  # a TLS alert (RFC 8446, 6 and 5.1)
        return "tls"
    return "stranger"


_CONNECT: Mapping[int | None, str] = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "black_hole",
    errno.ECONNRESET: "closed",
}


def connect_cause(error: OSError) -> str:
    """Return the cause for a TCP connection that did not come about."""
    if isinstance(error, TimeoutError):
        return "black_hole"
    return _CONNECT.get(error.errno, "unreachable")


_TOKEN: dict[Credentials, str] = {
    "none": "token_missing",
    "unused": "token_unused",
    "token": "token_wrong",
    "expired": "token_expired",
    "secret": "secret_wrong",
}


def join_cause(error: FmiError, credentials: Credentials) -> str:
    """Return the cause for a server that does not let us join."""
    match error:
        case AuthenticationFailed():
            return _TOKEN[credentials]
        case ServerDraining():
            return "draining"
        case JobFull():
            return "job_full"
        case RankTaken():
            return "rank_taken"
        case JoinTimeout():
            return "missing"
        case RendezvousError(message=said) if said == WANTS_TLS:
            return "wants_tls"
        case RendezvousError():
            return "turned_away"
    return "lost"


def link_cause(error: FmiError) -> str:
    """Return the cause for a link that did not come about, or broke."""
    match error:
        case AuthenticationFailed():
            return "key"
        case PunchFailed():
            return "no_link"
        case CollectiveTimeout():
            return "stalled"
        case CollectiveMismatch():
            return "mismatch"
        case RendezvousError():
            return "lost"
    return "peer_lost"


def time_text(seconds: float) -> str:
    """Return a duration for people: "0.31 ms", "12 ms", "1.2 s"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def rate_text(bytes_per_second: float) -> str:
    """Return a rate for people, with MB = 10⁶ bytes: "812 MB/s"."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= size:
            return f"{bytes_per_second / size:.3g} {unit}"
    return f"{bytes_per_second / 1e3:.3g} kB/s"


def plain(text: str, longest: int = 200) -> str:
    """Return what a stranger sent as text that can do a terminal no harm."""
    shown = "".join(char if char.isprintable() else "·" for char in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
