"""HTTP for operators: /livez, /readyz, /metrics, the live page, and /address for who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import fields

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rendezvous_server.access import Access
from rendezvous_server.config import is_loopback
from rendezvous_server.listen import listen, room_for_http
from rendezvous_server.live import Pages
from rendezvous_server.server import Server

IDLE_SECONDS = 30.0
"""A connection without a request, or with a part of one, is closed then: whoever opens many takes
descriptors that ranks need."""
STOP_SECONDS = 1.0
"""Requests under way get so long to end when the server stops; twice, as aiohttp does it."""


class _Metrics:
    """Reads the server's own counters when asked: nothing is counted twice."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server, counters = self._server, self._server.counters
        for name, text, value in (
            *((f.name, f.metadata["text"], getattr(counters, f.name)) for f in fields(counters)),
            ("punches", "Pairs told to punch", server.registry.punches),
            ("relays", "Pairs that met here because they could not punch", server.relayed.pairs),
            ("relayed_bytes", "Bytes passed on between ranks", server.relayed.bytes),
            ("legacy_pairs", "Pairs of TCPunch clients brought together", server.legacy.pool.pairs),
        ):
            yield CounterMetricFamily(f"rendezvous_{name}", text, value=value)
        for name, text, number in server.figures():
            yield GaugeMetricFamily(f"rendezvous_{name}", text, value=number)
        for name, text, value in (
            ("open_connections", "Connections open now", len(server.open)),
            ("strangers", "Connections that have proved nothing yet", len(server.strangers)),
            ("ranks", "Ranks present now", server.registry.ranks),
            ("jobs", "Jobs present now", len(server.registry.jobs)),
            ("tasks", "Tasks of the event loop now", len(asyncio.all_tasks())),
            ("legacy_waiting", "TCPunch clients that wait now", len(server.legacy.pool)),
        ):
            yield GaugeMetricFamily(f"rendezvous_{name}", text, value=value)


def make_app(server: Server, host: str) -> web.Application:
    """Return the application that answers for `server` at `host`."""
    collectors = CollectorRegistry()
    collectors.register(_Metrics(server))

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        if server.away:
            return web.Response(status=503, text=f"{server.away}\n")
        return web.Response(text="ok\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(collectors),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def address(request: web.Request) -> web.Response:
        """Where this connection comes from: some NATs choose a port for each destination."""
        peer = request.transport.get_extra_info("peername") if request.transport else None
        if peer is None:
            raise web.HTTPServiceUnavailable  # it has gone
        return web.json_response({"address": peer[0], "port": peer[1]})

    pages = Pages(server, Access(server.config.admin_token, is_loopback(host)))
    app = web.Application()
    app.on_shutdown.append(pages.close)
    app.add_routes(
        [
            web.get("/livez", live),
            web.get("/readyz", ready),
            web.get("/metrics", metrics),
            web.get("/address", address),
            *pages.routes(),
        ]
    )
    return app


async def start(server: Server, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Serve HTTP; returns what to clean up, and the port."""
    app, crowd, listeners = make_app(server, host), _Crowd(), list[asyncio.Server]()
    app.middlewares.append(crowd.watch)
    app.on_shutdown.append(lambda _: _stop_listening(listeners))
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=IDLE_SECONDS,
        shutdown_timeout=STOP_SECONDS,
        auto_decompress=False,  # nobody has a reason to send us more than some bytes
    )
    await runner.setup()

    def accept() -> asyncio.Protocol:
        assert runner.server is not None
        crowd.make_room(runner.server)
        return runner.server()

    sockets = listen(host, port)
    for sock in sockets:
        listeners.append(await asyncio.get_running_loop().create_server(accept, sock=sock))
    bound: int = sockets[0].getsockname()[1]
    return runner, bound


class _Crowd:
    """Bounds the connections.

    Those without a whole request make room, the older half of them; where all have one, the older
    half of all.
    """

    def __init__(self) -> None:
        self._room = room_for_http()
        self._busy: set[asyncio.BaseProtocol] = set()

    @web.middleware
    async def watch(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if not request.body_exists:  # one that never comes is no work of ours
            self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)

    def make_room(self, http: web.Server) -> None:
        """Close some, if there are many: before another comes."""
        here = http.connections
        if len(here) >= self._room:
            idle = [each for each in here if each not in self._busy] or here
            for each in idle[: max(1, len(idle) // 2)]:
                if each.transport is not None:
                    each.transport.abort()  # it may have left unread what it asked for


async def _stop_listening(listeners: list[asyncio.Server]) -> None:
    for each in listeners:
        each.close()
