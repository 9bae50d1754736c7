"""The command line, and the environment variables that may stand for it, as a `Config`."""

from __future__ import annotations

import logging
import re
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rendezvous_server.config import (
    Config,
    ConfigError,
    check_redis_url,
    choose_host,
    read_admin_token,
    read_networks,
    read_secret,
    read_tls,
)
from rendezvous_server.registry import RELAY_BYTES
from rendezvous_server.tickets import RELAY_PAIRS

PROGRAM = "python -m rendezvous_server"
ENV = "RENDEZVOUS_"
ADMIN_PORT = 10001
MAX_TTL = 10**8

WORDS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
WORDS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)
LEVELS = ("debug", "info", "warning", "error")

ABOUT = """\
Bring the ranks of jobs together so that they can punch TCP holes to each other.

Without a secret the server serves this machine only. For others to reach it, make
a secret, and tokens from it with fmi_client.make_token.

It logs JSON lines to stderr. SIGTERM drains: nobody new, waiting ranks are told to
come back, running jobs get a few seconds to end; links between ranks do not notice."""

MORE = """\
An environment variable may stand for each, RENDEZVOUS_JOB_TTL=600 for --job-ttl 600,
RENDEZVOUS_NO_RELAY=1, RENDEZVOUS_LEGACY="10.20.0.0/16 192.0.2.7"; an option goes first.

Examples:
  python -m rendezvous_server                         this machine only
  openssl rand -hex 32 > secret
  python -m rendezvous_server --secret-file secret    ranks with a token, from anywhere"""


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"\s*[-+]?\d{1,18}\s*", text) else low - 1
        if number < low or (high is not None and number > high):
            raise ArgumentTypeError(f"give a whole number {bounds}, not {text!r}")
        return number

    return read


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= MAX_TTL:
        raise ArgumentTypeError(f"give seconds from 1 to {MAX_TTL}, not {text!r}")
    return number


def _word(text: str) -> bool:
    if text.lower() not in WORDS:
        raise ArgumentTypeError(f"give 1 or 0, not {text!r}")
    return WORDS[text.lower()]


def _level(text: str) -> int:
    if text.lower() not in LEVELS:
        raise ArgumentTypeError(f"unknown log level {text!r}: use {', '.join(LEVELS)}")
    return logging.getLevelNamesMapping()[text.upper()]


class Option(NamedTuple):
    """An option; `read` makes its value of a text. Without a metavar it takes none."""

    name: str
    read: Callable[[str], Any]
    default: Any
    metavar: str
    help: str
    action: str = "store"


OPTIONS = (
    Option(
        *("host", str, None, "ADDRESS"),
        "where to listen; ::, all of IPv4 and IPv6 [127.0.0.1 without a secret, else ::]",
    ),
    Option("port", _whole(0, 65535), 10000, "PORT", "for ranks; 0: any [10000]"),
    Option(
        *("admin-port", _whole(-1, 65535), None, "PORT"),
        "for the live page, /livez, /readyz, /metrics and /address; 0: any, -1: none "
        f"[{ADMIN_PORT}, if it is free]",
    ),
    Option(
        *("admin-token-file", Path, None, "FILE"),
        "with the token (at least 16 bytes) that admits to the live page; or the token itself in "
        "RENDEZVOUS_ADMIN_TOKEN [none: the page is there on loopback only]",
    ),
    Option(
        *("secret-file", Path, None, "FILE"),
        "with the secret that jobs' tokens are made from (at least 16 bytes); or the secret "
        "itself in RENDEZVOUS_SECRET",
    ),
    Option("allow-anonymous", _word, False, "", "let ranks without a token join, from anywhere"),
    Option(
        *("no-relay", _word, False, ""),
        "do not pass on data between ranks whose NATs keep them apart: they fail",
    ),
    Option(
        *("relay-bytes", _whole(1), RELAY_BYTES, "BYTES"),
        f"that are passed on for one job; one that needs more is ended [{RELAY_BYTES}]",
    ),
    Option(
        *("relay-pairs", _whole(1), RELAY_PAIRS, "PAIRS"),
        f"of one job that may meet here at once; more cannot be linked [{RELAY_PAIRS}]",
    ),
    Option(
        *("proxy-protocol", _word, False, ""),
        "take ranks' addresses from the load balancer's PROXY header (version 2), and nobody "
        "without one; whoever else reaches the port can claim any address",
    ),
    Option(
        *("legacy", str.split, (), "CIDR"),
        "IPv4 network whose TCPunch clients (C++ FMI) are served too, which prove nothing; may "
        "be repeated",
        "extend",
    ),
    Option(
        *("tls-cert", Path, None, "FILE"),
        "PEM, with the server's certificate (and those between it and its root): ranks must come "
        "with tls://, and are encrypted",
    ),
    Option("tls-key", Path, None, "FILE", "PEM, with that certificate's private key"),
    Option("job-ttl", _seconds, 21600.0, "SECONDS", "after which any job is ended [21600]"),
    Option(
        *("registry", str, None, "URL"),
        "redis://host:port/db, by which several servers with one secret share their jobs behind "
        "one load balancer [this server is the only one]",
    ),
    Option("log-level", _level, logging.INFO, "LEVEL", f"{', '.join(LEVELS)} [info]"),
)


def read_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Read the settings; an empty variable counts as none.

    Exits with code 0 after `--help`, and with 2 after a line that says what is wrong.
    """
    parser = make_parser()
    said = parser.parse_args(arguments)
    try:
        for each in OPTIONS:
            key = each.name.replace("-", "_")
            if key not in said:
                setattr(said, key, _from_variable(each, ENV + key.upper(), environment))
        return _config(said, environment)
    except ConfigError as error:
        parser.error(str(error))


def make_parser() -> ArgumentParser:
    """Make the parser of the command line; what is not given is not in what it returns."""
    parser = ArgumentParser(
        PROGRAM,
        usage="%(prog)s [--help] [OPTION ...]",
        description=ABOUT,
        epilog=MORE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for each in OPTIONS:
        _add(parser, each)
    return parser


def _from_variable(option: Option, name: str, environment: Mapping[str, str]) -> Any:
    text = environment.get(name)
    try:
        return option.read(text) if text else option.default
    except ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}") from None


def _add(parser: ArgumentParser, option: Option) -> None:
    takes: dict[str, Any] = {"action": "store_true"}
    if option.metavar:
        takes = {"action": option.action, "type": option.read, "metavar": option.metavar}
    parser.add_argument(f"--{option.name}", default=SUPPRESS, help=option.help, **takes)


def _config(said: Namespace, environment: Mapping[str, str]) -> Config:
    secret = read_secret(said.secret_file, environment.get(ENV + "SECRET"))
    token = environment.get(ENV + "ADMIN_TOKEN")
    return Config(
        host=choose_host(said.host, secret, said.allow_anonymous),
        port=said.port,
        admin_port=ADMIN_PORT if said.admin_port is None else said.admin_port,
        secret=secret,
        allow_anonymous=said.allow_anonymous,
        job_ttl=said.job_ttl,
        admin_required=said.admin_port is not None,
        admin_token=read_admin_token(said.admin_token_file, token, secret),
        relay=not said.no_relay,
        relay_bytes=said.relay_bytes,
        relay_pairs=said.relay_pairs,
        proxy_protocol=said.proxy_protocol,
        legacy=read_networks(said.legacy),
        redis_url=check_redis_url(said.registry, secret),
        tls=read_tls(said.tls_cert, said.tls_key),
        log_level=said.log_level,
    )
