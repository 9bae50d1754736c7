"""What TLS needs of the system: certificates, and a socket for links.

Only here is `cryptography` used, to make a rank's certificate: the standard library cannot.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from collections.abc import Iterable
from typing import Any, NamedTuple

from fmi_client.errors import AuthenticationFailed, RendezvousError
from fmi_client.protocol.tls import Pinned, TlsStream

CA_VARIABLE = "FMI_TLS_CA"

DAYS = 30
"""How long a rank's certificate is valid, and since when: no job is longer, and the clocks of two
ranks may differ. What protects is that it is known to the ranks of one run only."""

BATCH_BYTES = 256 * 1024
"""So much is encrypted before it is written."""

READ_BYTES = 256 * 1024
"""So much is read before it is decrypted."""


class Identity(NamedTuple):
    """What a rank shows to its peers: made when it joins, known to nobody else."""

    certificate: bytes
    """As DER: what peers are told of it."""
    pem: bytes
    """Certificate and private key."""

    def __repr__(self) -> str:
        return "Identity(…)"


def make_identity() -> Identity:
    """Make a certificate for this rank, signed by itself, and its key (EC P-256).

    Raises:
        RendezvousError: the package that makes it is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise RendezvousError(
            "tls:// needs the package cryptography: pip install 'cosmic-fmi[tls]'", op="connect"
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fmi rank")])
    now, valid = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=DAYS)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - valid)
        .not_valid_after(now + valid)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    der = certificate.public_bytes(serialization.Encoding.DER)
    return Identity(der, certificate.public_bytes(pem) + private)


def pin(identity: Identity, theirs: bytes, *, server_side: bool) -> Pinned:
    """Return what a link with the owner of the certificate `theirs` is encrypted with.

    Raises:
        AuthenticationFailed: that is no certificate.
    """
    kind = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a rank has no name, but this one certificate
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        context.num_tickets = 0  # nothing is ever resumed
    try:
        context.load_verify_locations(cadata=theirs)
    except (ssl.SSLError, ValueError):  # ValueError: it is empty
        raise AuthenticationFailed(
            "the server tells no certificate of that rank; all ranks of a job need tls://, or none"
        ) from None
    _show(context, identity)
    return Pinned(context, identity.certificate, theirs)


def _show(context: ssl.SSLContext, identity: Identity) -> None:
    """Load certificate and key, which `ssl` takes from files only: from one that is on no disk."""
    fd = os.memfd_create("fmi")
    try:
        os.write(fd, identity.pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def server_trust() -> ssl.SSLContext:
    """Return what the rendezvous server's certificate is checked with.

    Raises:
        RendezvousError: FMI_TLS_CA is not a file of certificates.
    """
    file = os.environ.get(CA_VARIABLE) or None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if file is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(file)
    except OSError as error:  # an SSLError is one, too
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise RendezvousError(f"{CA_VARIABLE}={file}: {why}", op="connect") from None
    return context


class TlsSocket(socket.socket):
    """A connection whose TLS handshake is over; takes over its descriptor.

    What was sent counts as sent when the system has taken all of its encrypted form, so that
    nothing is lost when the link closes; until then the same bytes must be offered again.
    """

    def __init__(self, sock: socket.socket, stream: TlsStream) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._stream = stream
        self._sealed = memoryview(b"")
        self.promised = 0
        """Of the bytes that are offered next, so many are encrypted already."""
        self.more = False
        """Whether to read again before the system says that there is something to read."""

    def send(self, data: Any, *_: Any) -> int:
        return self.sendmsg((data,))

    def sendmsg(self, buffers: Iterable[Any], *_: Any) -> int:
        if not self.promised:
            self._seal(buffers)
        while self._sealed:
            self._sealed = self._sealed[super().send(self._sealed) :]
        sent, self.promised = self.promised, 0
        return sent

    def _seal(self, buffers: Iterable[Any]) -> None:
        left = BATCH_BYTES
        for each in buffers:
            part = memoryview(each)[:left]
            left -= len(part)
            while part:
                part = part[self._stream.write(part) :]
        self.promised = BATCH_BYTES - left
        self._sealed = memoryview(self._stream.take())

    def recv_into(self, buffer: Any, *_: Any) -> int:
        room = memoryview(buffer)
        while not (count := self._stream.read_into(room)):
            data = self.recv(READ_BYTES)
            if not data:
                return 0
            self._stream.feed(data)
        self.more = count == len(room) and self._stream.buffered
        return count
