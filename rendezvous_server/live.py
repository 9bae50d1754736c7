"""The live page over HTTP: /, /events, /status, and /login where a token is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from functools import cache, wraps
from hashlib import sha256
from importlib import metadata
from typing import Any

import structlog
from aiohttp import web

from fmi_client.protocol.hello import MAX_JOB_NAME
from rendezvous_server import page
from rendezvous_server.access import COOKIE, SESSION_SECONDS, Access, TooManyTries
from rendezvous_server.server import Server
from rendezvous_server.status import Query, Snapshot, take

log = structlog.get_logger()

PERIOD = 1.0
"""A snapshot is made at most this often, whoever looks on."""
HEARTBEAT = 10.0
"""A viewer hears something this often; its page gives up after 25 s of silence."""
RETRY_MILLISECONDS = 2000
WRITE_SECONDS = 10.0
"""A viewer that takes nothing for so long is cut off."""
SEND_BUFFER = 128 * 1024
MAX_VIEWERS = 32
MAX_VIEWS = 2 * MAX_VIEWERS
MAX_FORM_BYTES = 4096
FORM_SECONDS = 10.0

SET_A_TOKEN = (
    "The live page is closed: this port can be reached from other machines, and no admin token is "
    "set. Start the server with --admin-token-file FILE or RENDEZVOUS_ADMIN_TOKEN "
    "(openssl rand -hex 32 makes one), or listen on 127.0.0.1.\n"
)
WRONG_HOST = "Ask for this page by the name localhost or 127.0.0.1: other names are refused.\n"
STRANGER = "Another site's page may not ask for this.\n"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash(page.SCRIPT)}; style-src {_hash(page.STYLE)}; "
        "connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class View:
    """What one query shows: made when somebody asks, and at most once a `PERIOD`."""

    def __init__(self, query: Query) -> None:
        self.query = query
        self.made = -math.inf
        self.snapshot: Snapshot = {}
        self.body = ""
        self.message = b""
        self.heartbeat = b""

    def make(self, server: Server, now: float) -> None:
        """Look at the server."""
        pairs = _relaying(server) if self.query.exact else ()
        self.snapshot = take(
            server.registry, _facts(server), server.refusals, now, self.query, pairs
        )
        told = self.snapshot["now"]
        tree = json.dumps(page.main(self.snapshot), separators=(",", ":"))
        if tree != self.body:
            title = json.dumps(page.title(self.snapshot))
            self.body = tree
            self.message = f'data: {{"now":{told},"title":{title},"page":{tree}}}\n\n'.encode()
        self.heartbeat = f'data: {{"now":{told}}}\n\n'.encode()


class Viewer:
    """One browser that looks on. It has what is latest to be sent, and nothing older."""

    def __init__(self, query: Query, gone: Callable[[], bool]) -> None:
        self.query = query
        self.gone = gone
        self.body: str | None = None
        self.told = -math.inf
        self.next: bytes | None = None
        self.ended = False
        self.woken = asyncio.Event()

    def offer(self, view: View, now: float) -> None:
        """Have it told what it does not know; else, now and then, that we are there."""
        if self.body != view.body:
            self.body, self.next = view.body, view.message
        elif self.next is None and now - self.told >= HEARTBEAT:
            self.next = view.heartbeat
        else:
            return
        self.told = now
        self.woken.set()


class Live:
    """All viewers of a server, and what they look at; without viewers nothing is done."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._views: dict[Query, View] = {}
        self.viewers: set[Viewer] = set()
        self.closed = False
        self._task: asyncio.Task[None] | None = None

    def look(self, query: Query) -> View:
        """Return the view, as it is or was less than `PERIOD` ago."""
        now = time.monotonic()
        view = self._views.get(query)
        if view is None:
            self._forget_old(now)
            view = self._views[query] = View(query)
        if now - view.made >= PERIOD:
            view.made = now
            view.make(self._server, time.time())
        return view

    def _forget_old(self, now: float) -> None:
        for query in [q for q, view in self._views.items() if now - view.made > 2 * PERIOD]:
            del self._views[query]
        while len(self._views) >= MAX_VIEWS:
            del self._views[next(iter(self._views))]

    def join(self, viewer: Viewer) -> None:
        self.viewers.add(viewer)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        try:
            await self._tell_all()
        except Exception:
            log.exception("live page")
        for viewer in self.viewers:
            viewer.ended = True  # it comes back, if it is still there
            viewer.woken.set()
        self._views.clear()

    async def _tell_all(self) -> None:
        while self.viewers and not self.closed:
            for viewer in list(self.viewers):
                if viewer.gone():
                    viewer.woken.set()
                else:
                    viewer.offer(self.look(viewer.query), time.monotonic())
                await asyncio.sleep(0)  # ranks are served between the queries
            await asyncio.sleep(PERIOD)

    async def follow(self, viewer: Viewer, response: web.StreamResponse) -> None:
        """Write to a viewer what is latest, for as long as it takes it."""
        self.join(viewer)
        try:
            while True:
                await viewer.woken.wait()
                viewer.woken.clear()
                if viewer.ended or viewer.gone() or self.closed:
                    return
                data, viewer.next = viewer.next, None
                if data is not None:
                    await asyncio.wait_for(response.write(data), WRITE_SECONDS)
        finally:
            self.viewers.discard(viewer)

    async def close(self) -> None:
        """Let go of all viewers: the server stops."""
        self.closed = True
        for viewer in self.viewers:
            viewer.woken.set()
        if self._task is not None:
            self._task.cancel()


@cache
def _version() -> str:
    try:
        return metadata.version("cosmic-fmi")
    except metadata.PackageNotFoundError:
        return "unknown"


def _facts(server: Server) -> dict[str, Any]:
    counters, relayed, config = server.counters, server.relayed, server.config
    return {
        "version": _version(),
        "started": round(server.started, 1),
        "connections_now": server.held,
        "connections": counters.connections,
        "joins": counters.joins,
        "lost": counters.lost_ranks,
        "jobs_started": counters.jobs_started,
        "refused": counters.refusals,
        "links": server.registry.punches,
        "relay": config.relay,
        "relay_pairs_now": sum(leg.meets for leg in relayed.legs) // 2,
        "relay_pairs": relayed.pairs,
        "relay_bytes": relayed.bytes,
        "relay_bytes_limit": config.relay_bytes,
        "legacy": bool(config.legacy),
        "legacy_waiting": len(server.legacy.pool),
        "legacy_pairs": server.legacy.pool.pairs,
    }


def _relaying(server: Server) -> Iterator[Snapshot]:
    """Pairs on the relay now."""
    for pair, passed in server.relayed.now():
        yield {"job": pair.job.name, "ranks": sorted(pair.ranks), "bytes": passed}


class Pages:
    """The handlers."""

    def __init__(self, server: Server, access: Access) -> None:
        self.live = Live(server)
        self._access = access

    def routes(self) -> list[web.RouteDef]:
        """Return what to add to the application."""
        return [
            web.get("/", self._guarded(self._page)),
            web.get("/status", self._guarded(self._status)),
            web.get("/events", self._guarded(self._events), allow_head=False),
            web.post("/login", self._login),
        ]

    async def close(self, _: web.Application) -> None:
        await self.live.close()

    # ------------------------------------------------------------------------ who may
    def _guarded(self, handler: Handler) -> Handler:
        @wraps(handler)
        async def guard(request: web.Request) -> web.StreamResponse:
            return self._refusal(request) or await handler(request)

        return guard

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Why not, or None."""
        if self._access.closed:
            return _text(403, SET_A_TOKEN)
        if not self._access.knows_host(request.headers.get("Host")):
            return _text(403, WRONG_HOST)
        if _strange(request) and request.headers.get("Sec-Fetch-Mode") != "navigate":
            return _text(403, STRANGER)
        return self._ask_for_token(request) if self._access.needs_token else None

    def _ask_for_token(self, request: web.Request) -> web.Response | None:
        now = time.time()
        if self._access.takes_cookie(request.cookies.get(COOKIE, ""), now):
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._check(request, token, lambda status, said: _text(status, said + "\n"))
        challenge = {"WWW-Authenticate": "Bearer"}
        if request.path == "/":
            return _html(401, page.form("This page needs the server's admin token."), challenge)
        return _text(401, "Send the admin token: Authorization: Bearer TOKEN\n", challenge)

    def _check(
        self, request: web.Request, token: str, answer: Callable[[int, str], web.Response]
    ) -> web.Response | None:
        sent = token.strip().encode(errors="surrogateescape")
        try:
            if self._access.takes(sent, request.remote or "", time.monotonic()):
                return None
        except TooManyTries as error:
            refusal = answer(429, f"There were {error}.")
            refusal.headers["Retry-After"] = str(math.ceil(error.wait))
            return refusal
        return answer(401, "That is not the admin token.")

    async def _login(self, request: web.Request) -> web.StreamResponse:
        """Give a browser a cookie for the token."""
        if not self._access.needs_token:
            return _text(403, SET_A_TOKEN) if self._access.closed else _to_page()
        if _strange(request):  # its wrong tokens would count as those of this browser
            return _text(403, STRANGER)
        if (request.content_length or MAX_FORM_BYTES + 1) > MAX_FORM_BYTES:
            return _text(413, "That is not the form of this page.\n")
        try:
            token = (await asyncio.wait_for(request.post(), FORM_SECONDS)).get("token")
        except TimeoutError:
            return _text(408, "The form did not come.\n")
        except (ValueError, LookupError, ConnectionError):
            # Bytes that are no text, in whatever they say it is; or it hung up amid them.
            return _text(400, "That is not the form of this page.\n")
        refusal = self._check(
            request, str(token), lambda status, said: _html(status, page.form(said))
        )
        if refusal is not None:
            return refusal
        answer = _to_page()
        answer.set_cookie(
            COOKIE,
            self._access.cookie(time.time()),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=request.secure,
        )
        return answer

    # ------------------------------------------------------------------------ answers
    async def _page(self, request: web.Request) -> web.StreamResponse:
        return _html(200, page.document(self.live.look(_query(request)).snapshot))

    async def _status(self, request: web.Request) -> web.StreamResponse:
        snapshot = self.live.look(_query(request)).snapshot
        return web.json_response(
            snapshot, headers=HEADERS, dumps=lambda each: json.dumps(each, indent=1) + "\n"
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if len(self.live.viewers) >= MAX_VIEWERS or self.live.closed:
            return _text(503, f"There are {MAX_VIEWERS} viewers already.\n")
        response = web.StreamResponse(headers=HEADERS | {"Content-Type": "text/event-stream"})
        transport = request.transport
        if transport is None:
            return response
        _bound(transport.get_extra_info("socket"))
        viewer = Viewer(_query(request), transport.is_closing)
        try:
            await response.prepare(request)
            await response.write(b"retry: %d\n\n" % RETRY_MILLISECONDS)
            await self.live.follow(viewer, response)
        except (ConnectionError, TimeoutError):
            transport.abort()
        return response


def _bound(sock: Any) -> None:
    """See to it that a viewer that does not read, or is no more, costs little, and not for long."""
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        milliseconds = int(2 * WRITE_SECONDS * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _strange(request: web.Request) -> bool:
    """Whether a page that is not ours makes a browser ask: one of another port is "same-site"."""
    return request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")


def _query(request: web.Request) -> Query:
    job, part = (_plain(request.query.get(name, "")) for name in ("job", "q"))
    return Query(job, exact=True) if job else Query(part)


def _plain(text: str) -> str:
    """No longer than a job's name, and without what is no text."""
    return text[:MAX_JOB_NAME].encode(errors="replace").decode()


def _to_page() -> web.Response:
    return web.Response(status=303, headers=HEADERS | {"Location": "./"})


def _text(status: int, text: str, more: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text, headers=HEADERS | (more or {}))


def _html(status: int, text: str, more: dict[str, str] | None = None) -> web.Response:
    headers = HEADERS | (more or {})
    return web.Response(status=status, text=text, content_type="text/html", headers=headers)
