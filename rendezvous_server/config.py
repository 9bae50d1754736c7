"""The server's settings, checked once."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from urllib.parse import urlsplit

from rendezvous_server.listen import EVERYWHERE
from rendezvous_server.registry import RELAY_BYTES
from rendezvous_server.tickets import RELAY_PAIRS

MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one server.

    Attributes:
        host, port: where ranks connect; host "::" is everywhere, port 0 takes a free one.
        admin_port: where the page, /livez, /readyz, /metrics and /address are; negative: nowhere.
        admin_required: False: where that port is taken, do without it.
        admin_token: what admits to the page where others than this machine can reach it.
        secret: what tokens are made with; None: tokens cannot be checked.
        allow_anonymous: whether ranks without a token may join.
        relay: whether ranks that cannot be linked directly may meet here.
        relay_bytes: what may be passed on for one job, all in all.
        relay_pairs: how many pairs of one job may meet here at once.
        job_ttl: seconds after which any job is ended.
        proxy_protocol: whether every rank's connection begins with a balancer's header.
        legacy: whence TCPunch's own clients may come.
        redis_url: of the Redis through which servers share jobs (`--registry`); None: this one
            is alone.
        tls: the server's certificate; with one, ranks must come encrypted.
        log_level: as in `logging`.
    """

    host: str
    port: int
    admin_port: int
    secret: bytes | None
    allow_anonymous: bool
    job_ttl: float
    admin_required: bool = True
    admin_token: bytes | None = None
    relay: bool = True
    relay_bytes: int = RELAY_BYTES
    relay_pairs: int = RELAY_PAIRS
    proxy_protocol: bool = False
    legacy: tuple[IPv4Network, ...] = ()
    redis_url: str | None = None
    tls: ssl.SSLContext | None = None
    log_level: int = logging.INFO


class ConfigError(ValueError):
    """A setting that cannot be used; the text says what to do."""


def read_secret(
    path: Path | None,
    variable: str | None = None,
    name: str = "RENDEZVOUS_SECRET",
    what: str = "secret",
) -> bytes | None:
    """Read a secret, without the white space at its end.

    Args:
        path: the secret file, or None.
        variable: what the variable `name` holds, or None. Schedulers of containers (ECS) hand
            secrets over in variables only; there is no such option, for all users of a machine can
            read command lines.
        what: to call it in errors.

    Raises:
        ConfigError: both are given, or it cannot be read, or is too short to be a secret.
    """
    if path is None:
        return None if variable is None else _long_enough(variable.encode(), name, what)
    if variable is not None:
        raise ConfigError(f"give the {what} in {name} or in {path}, not in both")
    try:
        return _long_enough(path.read_bytes(), str(path), what)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error.strerror}") from None


def _long_enough(content: bytes, source: str, what: str) -> bytes:
    secret = content.rstrip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the {what} in {source} has {len(secret)} bytes; use at least {MIN_SECRET_BYTES}, "
            "for example: openssl rand -hex 32"
        )
    return secret


def read_admin_token(path: Path | None, variable: str | None, secret: bytes | None) -> bytes | None:
    """Read what admits to the page; see `read_secret`.

    Raises:
        ConfigError: it cannot be read, is too short, or is the jobs' secret.
    """
    token = read_secret(path, variable, "RENDEZVOUS_ADMIN_TOKEN", "admin token")
    if token is not None and token == secret:
        raise ConfigError(
            "the admin token must not be the secret that jobs' tokens are made from: it goes over "
            "the wire; make another one, for example: openssl rand -hex 32"
        )
    return token


def read_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Read the server's certificate (and what lies between it and its root) and private key.

    Raises:
        ConfigError: only one is given, one cannot be read, or they do not belong together.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together: give both, or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a rank connects once
    for option, file in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            file.open().close()  # `ssl` would not say which it cannot read
        except OSError as error:
            raise ConfigError(f"cannot read {option} {file}: {error.strerror}") from None
    try:
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-cert {certificate}, --tls-key {key}: {_unfit(error)}") from None
    return context


def _unfit(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "give the key that belongs to this certificate, this one does not"
    return "give two PEM files, with the certificate and with its key, without a passphrase"


def read_networks(texts: Iterable[str]) -> tuple[IPv4Network, ...]:
    """Read networks like "10.0.0.0/8"; a single address is one, too.

    Raises:
        ConfigError: one of them is none, or IPv6, which TCPunch cannot tell anybody.
    """
    try:
        return tuple(IPv4Network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"--legacy takes IPv4 networks, such as 10.20.0.0/16: {error}") from None


def check_redis_url(url: str | None, secret: bytes | None) -> str | None:
    """Return what `--registry` said, if that can be used.

    Raises:
        ConfigError: it is none of Redis, or there is no secret to know the other servers by.
    """
    if url is None:
        return None
    try:
        known = urlsplit(url).scheme in ("redis", "rediss") and urlsplit(url).port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError("--registry must be of the form redis://host:port/db")
    if secret is None:
        raise ConfigError(
            "servers with a --registry know each other by their secret: give all the same "
            "--secret-file"
        )
    return url


def choose_host(host: str | None, secret: bytes | None, allow_anonymous: bool) -> str:
    """Return the address to bind: an open port to the world needs a decision.

    Raises:
        ConfigError: an address that others can reach was asked for without a secret.
    """
    protected = secret is not None or allow_anonymous
    if host is None:
        return EVERYWHERE if protected else "127.0.0.1"
    if not protected and not is_loopback(host):
        raise ConfigError(
            f"without a secret the server serves loopback only, not {host}; give --secret-file, "
            "or --allow-anonymous to let anybody who reaches the port start jobs"
        )
    return host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
