"""A real S3 server in a thread, and what goes wrong between it and its clients.

nanio: buckets are folders, objects are files. `S3Server.trouble` is asked before each request, and
may have it refused, delayed, or its answer cut.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import close_by_reset

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


@dataclass
class Trouble:
    """What happens to a request: first a delay in seconds; then an error of S3 (status and code)
    in place of an answer, or an answer that breaks off after so many bytes of its body, or from
    there on comes one byte every `trickle` seconds. `reset` lets it break off by RST, not by FIN;
    `headers` take the place of the answer's own."""

    delay: float = 0
    status: int = 0
    code: str = ""
    cut: int | None = None
    reset: bool = False
    trickle: float = 0
    headers: Mapping[bytes, bytes] = field(default_factory=dict)


SLOW_DOWN = Trouble(status=503, code="SlowDown")
DENIED = Trouble(status=403, code="AccessDenied")


class S3Server:
    """Attributes:
    endpoint: URL for AWS_ENDPOINT_URL.
    trouble: gives what happens to a request, by its method and path with query.
    clients: addresses and ports, one of each connection.
    requests: method and path of each, in the order in which they came.
    busy, busiest: requests that wait for the delay of their trouble; and most so far.
    """

    def __init__(self, app: App) -> None:
        self.endpoint, self._app = "", app
        self.requests: list[tuple[str, str]] = []
        self.clients: set[tuple[str, int]] = set()
        self.busy = self.busiest = 0
        self.trouble: Callable[[str, str], Trouble | None] = lambda method, path: None

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        query = scope["query_string"].decode()
        path = scope["path"] + ("?" + query if query else "")
        self.requests.append((scope["method"], path))
        self.clients.add(scope["client"])
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        trouble = self.trouble(scope["method"], path) or Trouble()
        await asyncio.sleep(trouble.delay)
        self.busy -= 1  # now: a client that has its answer may be here again before this ends
        if trouble.status:
            return await _refuse(trouble, scope["method"], receive, send)
        if trouble.headers:
            send = _other_headers(trouble, send)
        return await self._app(scope, receive, send if trouble.cut is None else _cut(trouble, send))


async def _refuse(trouble: Trouble, method: str, receive: Any, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    text = f"<Error><Code>{trouble.code}</Code><Message>as the test wants it</Message></Error>"
    text = text if trouble.code else "<html>as a proxy has it"
    body = b"" if method == "HEAD" else text.encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": trouble.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Cut(Exception):
    pass


def _cut(trouble: Trouble, send: Send) -> Send:
    left = trouble.cut or 0

    async def cut(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            message["body"], rest = body[:left], body[left:]
            left -= len(message["body"])
            await send({**message, "more_body": True})
            if not left and trouble.trickle:
                for byte in rest:
                    await asyncio.sleep(trouble.trickle)
                    await send({**message, "body": bytes((byte,)), "more_body": True})
            if not left and trouble.reset:
                _reset(send)
            if not left:
                raise _Cut  # uvicorn closes the connection, as its answer is not complete
        else:
            await send(message)

    return cut


def _reset(send: Any) -> None:
    transport = send.__self__.transport
    close_by_reset(transport.get_extra_info("socket"))
    transport.abort()


def _other_headers(trouble: Trouble, send: Send) -> Send:
    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in trouble.headers]
            message["headers"] = [*kept, *trouble.headers.items()]
        await send(message)

    return changed


@contextmanager
def serve_s3(folder: Path, page: int = 1000) -> Iterator[S3Server]:
    """Serve the buckets in a folder on a free port of this machine, names by so many at a time."""
    import uvicorn
    from nanio.app import build_app
    from nanio.auth.credentials import EnvCredentialResolver
    from nanio.config import Settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANIO_ACCESS_KEY", KEYS["AWS_ACCESS_KEY_ID"])
        patch.setenv("NANIO_SECRET_KEY", KEYS["AWS_SECRET_ACCESS_KEY"])
        who = EnvCredentialResolver()
        s3 = S3Server(build_app(Settings(data_dir=folder, credentials=who, max_list_keys=page)))
    config = uvicorn.Config(s3, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        s3.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield s3
        server.should_exit = server.force_exit = True  # an answer may be on its way for ever
        thread.join()


@contextmanager
def s3_client(endpoint: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process's S3 client use a server, and none use the client of another test."""
    from lambda_worker.storage import s3

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        patch.setenv(name, value)
    s3.close()
    yield
    s3.close()
