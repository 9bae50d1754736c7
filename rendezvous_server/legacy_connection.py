"""The TCP side of TCPunch's own clients: bytes to `legacy`, its replies to the sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network
from typing import cast

import structlog

from fmi_client.errors import FmiError
from fmi_client.protocol.addresses import Address, format_address
from rendezvous_server.legacy import (
    QUIET_SECONDS,
    Client,
    NameReader,
    Pool,
    Reply,
    Request,
    ipv4,
    refusal,
)

log = structlog.get_logger()


class Legacy:
    """What these connections share.

    Args:
        networks: whom to serve at all.
        ttl: seconds that a client may wait for its peer.
        on_refusal: told whom we refuse, as what, and why.
    """

    def __init__(
        self,
        networks: Iterable[IPv4Network],
        ttl: float,
        on_refusal: Callable[[Address, str, str], None] = lambda address, kind, why: None,
    ) -> None:
        self._networks = tuple(networks)
        self.pool = Pool(ttl)
        self.open: set[LegacyConnection] = set()
        self.on_refusal = on_refusal

    def serves(self, host: str) -> bool:
        address = ipv4(host)
        return address is not None and any(address in network for network in self._networks)

    def expire(self, now: float) -> None:
        """Send away who has waited too long; all who wait, where `now` is infinite."""
        self.deliver(self.pool.expire(now))

    def deliver(self, replies: Iterable[Reply]) -> None:
        for client, data, last in replies:
            connection = cast(LegacyConnection, client.connection)
            connection.write(data, last)

    def close(self) -> None:
        for connection in list(self.open):
            connection.write(b"", last=True)


class LegacyConnection(asyncio.Protocol):
    """One client, from the first byte of its name; takes over from `Connection`.

    Args:
        observed: where it comes from.
        deadline: when, by the loop's clock, its name must have come.
    """

    def __init__(
        self, transport: asyncio.Transport, legacy: Legacy, observed: Address, deadline: float
    ) -> None:
        self._transport = transport
        self._legacy = legacy
        self._address = (str(ipv4(observed[0])), observed[1])
        self._reader = NameReader()
        self._client: Client | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.call_at(deadline, transport.abort)
        self._quiet: asyncio.TimerHandle | None = None
        legacy.open.add(self)

    def data_received(self, data: bytes) -> None:
        self._stop_quiet()
        if self._client is not None:
            # Its name went on after a pause, so that we took a part for the whole.
            self._refuse("bytes after the name")
            return
        try:
            request = self._reader.receive(data)
        except FmiError as error:
            self._refuse(error.message)
            return
        if request is not None:
            self._join(request)
        else:
            self._quiet = self._loop.call_later(QUIET_SECONDS, self._on_quiet)

    def _on_quiet(self) -> None:
        request = self._reader.quiet()
        if request is not None:
            self._join(request)

    def _join(self, request: Request) -> None:
        self._deadline.cancel()
        self._client = client = Client(request, self._address, self)
        try:
            peer, replies = self._legacy.pool.join(client, self._loop.time())
        except FmiError as error:
            self._refuse(error.message)
            return
        self._legacy.deliver(replies)
        if peer is None:
            self._log("legacy waiting")
        else:
            self._log("legacy paired", peer=format_address(peer.address))

    def write(self, data: bytes, last: bool) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
        if last:
            self._transport.close()

    def _refuse(self, why: str) -> None:
        self._legacy.on_refusal(self._address, "Legacy", why)
        log.info("refused", address=format_address(self._address), why=why)
        self._leave()
        self.write(refusal(self._reader.version), last=True)

    def _leave(self) -> None:
        if self._client is not None and self._legacy.pool.leave(self._client):
            self._log("legacy left")

    def _log(self, event: str, **more: str) -> None:
        assert self._client is not None
        version, name, _ = self._client.request
        text = name.decode(errors="backslashreplace")
        log.info(event, version=version, name=text, address=format_address(self._address), **more)

    def _stop_quiet(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_quiet()
        self._deadline.cancel()
        self._legacy.open.discard(self)
        self._leave()
