"""What a check says to whatever listens at the server's address, and what the answer means."""

from __future__ import annotations

import socket
import ssl
import time

from fmi_client import findings
from fmi_client.errors import FmiError, RendezvousError
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import ClientSide
from fmi_client.transport.blocking import give, set_timeout, take
from fmi_client.transport.tls import make_identity, server_trust


class Failed(Exception):
    """A step found something wrong: a key of `findings.ADVICE`, and what it looks like."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


def encrypt(sock: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    """Begin TLS on a connection, as a rank does, until `deadline`, monotonic time.

    Raises:
        Failed: it is not spoken there or here, or the certificate is not trusted.
    """
    try:
        return _encrypt(sock, host, deadline)
    except Failed:
        sock.close()
        raise


def _encrypt(sock: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    try:
        make_identity()
    except RendezvousError as error:
        raise Failed("no_extra", error.message) from None
    try:
        trust = server_trust()
        set_timeout(sock, deadline)
        return trust.wrap_socket(sock, server_hostname=host)
    except RendezvousError as error:
        raise Failed("certificate", error.message) from None
    except ssl.SSLCertVerificationError as error:
        raise Failed("certificate", error.verify_message) from None
    except TimeoutError:
        raise Failed("no_tls", "it says nothing") from None
    except ssl.SSLError as error:
        raise Failed("no_tls", (error.reason or "no TLS").lower().replace("_", " ")) from None
    except OSError:
        raise Failed("no_tls", "it closes the connection") from None


def days_left(sock: ssl.SSLSocket) -> float:
    """Return for how long the other side's certificate is valid."""
    until = (sock.getpeercert() or {})["notAfter"]
    return (ssl.cert_time_to_seconds(str(until)) - time.time()) / 86_400


def handshake(sock: socket.socket, hello: Hello, deadline: float) -> float:
    """Return the seconds from the hello to the challenge.

    Raises:
        Failed: no rendezvous server answers.
    """
    side = ClientSide(hello, None)
    start = time.monotonic()
    first = b""
    try:
        give(sock, bytes(side.outgoing), deadline)
        side.outgoing.clear()
        while not side.outgoing:  # until it holds the proof
            data = take(sock, deadline)
            if not data:
                raise Failed(_who(first, "closed"), _said(first, "closes the connection"))
            first += data
            side.receive(data)
    except TimeoutError:
        raise Failed(_who(first, "silent"), _said(first, "says nothing")) from None
    except OSError:
        raise Failed(_who(first, "closed"), _said(first, "resets the connection")) from None
    except FmiError as error:
        raise Failed(_who(first, "stranger"), _said(first, error.message)) from None
    return time.monotonic() - start


def _who(first: bytes, silent: str) -> str:
    return findings.who_answers(first) if first else silent


def _said(first: bytes, otherwise: str) -> str:
    return f"it says {first[:40].decode('latin-1')!r}" if first else f"it {otherwise}"
