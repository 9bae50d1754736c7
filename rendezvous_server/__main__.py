"""The command line: ``python -m rendezvous_server``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvloop
from aiohttp.http import HttpProcessingError
from aiohttp.web import AppRunner

from rendezvous_server import admin
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
from rendezvous_server.listen import raise_limit
from rendezvous_server.registry import RELAY_BYTES, RELAY_PAIRS
from rendezvous_server.server import Server

log = structlog.get_logger()

ENV = "RENDEZVOUS_"
ADMIN_PORT = 10001


class _Libraries(logging.Handler):
    """What libraries log, as lines like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            # Whoever reaches the port can send what is no HTTP: that is not worth a traceback.
            log.debug("no HTTP", why=error.message[:200])
            return
        text = record.getMessage()
        log.log(record.levelno, text, logger=record.name, exc_info=record.exc_info)


def _configure_logs(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"unknown log level {level!r}: use debug, info, warning or error")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING)


# Plain help: it is read in container logs and CI as often as in a terminal.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    host: Annotated[
        str | None,
        typer.Option(
            envvar=ENV + "HOST",
            help="Address to listen on; ::, all of IPv4 and IPv6.  "
            "[default: 127.0.0.1 without a secret, else ::]",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(envvar=ENV + "PORT", min=0, max=65535, help="Port for ranks; 0: any.")
    ] = 10000,
    admin_port: Annotated[
        int | None,
        typer.Option(
            envvar=ENV + "ADMIN_PORT",
            min=-1,
            max=65535,
            help="Port for the live page, /livez, /readyz, /metrics and /address; 0: any, -1: none."
            "  [default: 10001, if it is free]",
        ),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=ENV + "ADMIN_TOKEN_FILE",
            help="File with the token (at least 16 bytes) that admits to the live page; or the "
            "token itself in RENDEZVOUS_ADMIN_TOKEN.  [default: none: the page is there on "
            "loopback only]",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            envvar=ENV + "SECRET_FILE",
            help="File with the secret that jobs' tokens are made from (at least 16 bytes); or the "
            "secret itself in RENDEZVOUS_SECRET.",
        ),
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option(
            "--allow-anonymous",
            envvar=ENV + "ALLOW_ANONYMOUS",
            help="Let ranks without a token join, from anywhere.",
        ),
    ] = False,
    no_relay: Annotated[
        bool,
        typer.Option(
            "--no-relay",
            envvar=ENV + "NO_RELAY",
            help="Do not pass on data between ranks whose NATs keep them apart: they fail.",
        ),
    ] = False,
    relay_bytes: Annotated[
        int,
        typer.Option(
            envvar=ENV + "RELAY_BYTES",
            min=1,
            help="Bytes that are passed on for one job; one that needs more is ended.",
        ),
    ] = RELAY_BYTES,
    relay_pairs: Annotated[
        int,
        typer.Option(
            envvar=ENV + "RELAY_PAIRS",
            min=1,
            help="Pairs of one job that may meet here at once; more cannot be linked.",
        ),
    ] = RELAY_PAIRS,
    proxy_protocol: Annotated[
        bool,
        typer.Option(
            "--proxy-protocol",
            envvar=ENV + "PROXY_PROTOCOL",
            help="Take ranks' addresses from the load balancer's PROXY header (version 2), "
            "and nobody without one.  Whoever else reaches the port can claim any address.",
        ),
    ] = False,
    legacy: Annotated[
        list[str] | None,
        typer.Option(
            envvar=ENV + "LEGACY",
            metavar="CIDR",
            help="Also serve TCPunch's own clients (C++ FMI) from this IPv4 network, which prove "
            "nothing; may be repeated.  [default: none]",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar=ENV + "TLS_CERT",
            help="PEM file with the server's certificate (and those between it and its root): "
            "ranks must come with tls://, and are encrypted.  [default: none]",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(envvar=ENV + "TLS_KEY", help="PEM file with that certificate's private key."),
    ] = None,
    job_ttl: Annotated[
        float,
        typer.Option(envvar=ENV + "JOB_TTL", min=1, help="Seconds after which any job is ended."),
    ] = 6 * 3600,
    registry: Annotated[
        str | None,
        typer.Option(
            envvar=ENV + "REGISTRY",
            metavar="URL",
            help="redis://host:port/db, by which several servers with one secret share their jobs "
            "behind one load balancer.  [default: none: this server is the only one]",
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(envvar=ENV + "LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Bring the ranks of jobs together so that they can punch TCP holes to each other.

    Without a secret the server serves this machine only. For others to reach it, make
    a secret, and tokens from it with fmi_client.make_token.

    It logs JSON lines to stderr. SIGTERM drains: nobody new, waiting ranks are told to
    come back, running jobs get a few seconds to end; links between ranks do not notice.

    \b
    Examples:
      python -m rendezvous_server                         this machine only
      openssl rand -hex 32 > secret
      python -m rendezvous_server --secret-file secret    ranks with a token, from anywhere
    """  # noqa: D301 (typer's mark for lines that stay as they are)
    try:
        _configure_logs(log_level)
        secret = read_secret(secret_file, os.environ.get(ENV + "SECRET"))
        config = Config(
            host=choose_host(host, secret, allow_anonymous),
            port=port,
            admin_port=ADMIN_PORT if admin_port is None else admin_port,
            secret=secret,
            allow_anonymous=allow_anonymous,
            job_ttl=job_ttl,
            admin_required=admin_port is not None,
            admin_token=read_admin_token(
                admin_token_file, os.environ.get(ENV + "ADMIN_TOKEN"), secret
            ),
            relay=not no_relay,
            relay_bytes=relay_bytes,
            relay_pairs=relay_pairs,
            proxy_protocol=proxy_protocol,
            legacy=read_networks(legacy or ()),
            redis_url=check_redis_url(registry, secret),
            tls=read_tls(tls_cert, tls_key),
        )
        raise_limit()
        uvloop.run(_serve(config))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        typer.echo(f"rendezvous_server: cannot listen: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _make(config: Config) -> Server:
    if config.redis_url is None:
        return Server(config)
    try:
        from rendezvous_server.several import SharingServer
    except ModuleNotFoundError as error:
        raise ConfigError(f"--registry: {error}; pip install 'cosmic-fmi[redis]'") from None
    return SharingServer(config)


async def _start_admin(server: Server) -> tuple[AppRunner | None, int | None]:
    """Serve HTTP where asked to; a second server on one machine does without by default."""
    config = server.config
    if config.admin_port < 0:
        return None, None
    try:
        return await admin.start(server, config.host, config.admin_port)
    except OSError as error:
        if config.admin_required:
            raise
        log.warning("no admin port", port=config.admin_port, why=error.strerror)
        return None, None


async def _serve(config: Config) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = _make(config)
    port = await server.start()
    runner, admin_port = await _start_admin(server)
    log.info("listening", host=config.host, port=port, admin_port=admin_port)
    if config.secret is None:
        whom = "anybody" if config.allow_anonymous else "this machine only; give --secret-file"
        log.warning("no secret", serves=whom)
    await stopping.wait()
    await server.drain()
    await server.stop()
    if runner is not None:
        await runner.cleanup()
    log.info("stopped")


if __name__ == "__main__":
    app(prog_name="python -m rendezvous_server")
