"""An S3 server of one object that answers as it is told, and wrongly, too."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
CHANGED = b"<Error><Code>PreconditionFailed</Code><Message>Not the one.</Message></Error>"


class Faulty(ThreadingHTTPServer):
    """Attributes:
    content, version: of the object.
    faults: what happens to the next GETs, in turn; "" for nothing.
    asked: the ranges that were asked for.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.version = content, '"1"'
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.connections = 0

    def handle_error(self, *arguments: object) -> None:
        pass  # clients that go away are what is tested

    def process_request(self, *arguments: object) -> None:
        self.connections += 1
        super().process_request(*arguments)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(200, {"Content-Length": str(len(self.server.content))})

    def do_GET(self) -> None:
        server, fault = self.server, self.server.faults.pop(0) if self.server.faults else ""
        server.asked.append(self.headers["Range"])
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found
        first, last = map(int, found.groups())
        if fault == "slow down":
            return self.answer(503, {}, SLOW_DOWN)
        if self.headers.get("If-Match") != server.version:
            return self.answer(412, {}, CHANGED)
        if fault == "whole":
            return self.answer(200, {}, server.content)
        if fault == "short":
            last -= 1
        body = server.content[first : last + 1]
        if fault == "shifted":
            first += 1
        headers = {"Content-Range": f"bytes {first}-{last}/{len(server.content)}"}
        if fault == "other":
            headers["ETag"] = '"2"'
        headers["Content-Length"] = str(len(body))
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        return self.answer(206, headers, body)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        defaults = {"Content-Length": str(len(body)), "ETag": self.server.version}
        for name, value in (defaults | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
