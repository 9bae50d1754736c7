"""The program: ``python -m rendezvous_server``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

import structlog
import uvloop
from aiohttp.http import HttpProcessingError
from aiohttp.web import AppRunner

from rendezvous_server import admin
from rendezvous_server.config import Config, ConfigError
from rendezvous_server.listen import CannotListen, raise_limit
from rendezvous_server.options import PROGRAM, read_config
from rendezvous_server.server import Server

log = structlog.get_logger()


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


def _configure_logs(level: int) -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; exits with 2 for settings that cannot be used, 1 for ports."""
    config = read_config(sys.argv[1:] if arguments is None else arguments, os.environ)
    _configure_logs(config.log_level)
    raise_limit()
    try:
        uvloop.run(_serve(config))
    except (ConfigError, CannotListen) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


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
    except CannotListen as error:
        if config.admin_required:
            raise
        log.warning("no admin port", port=config.admin_port, why=str(error))
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
    main()
