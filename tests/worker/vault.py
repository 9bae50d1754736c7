"""Secrets Manager and Parameter Store, as far as reading one value goes, over HTTP."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Vault(ThreadingHTTPServer):
    """Attributes:
    values: what is kept, by ARN; of an `Exception`, the code of the error to answer, and its text.
    asked: the ARNs that were asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.values: dict[str, str | bytes | Exception] = {}
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Vault

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.answer(self.headers["X-Amz-Target"], request)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, target: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        parameter = target == "AmazonSSM.GetParameter"
        assert parameter or target == "secretsmanager.GetSecretValue"
        arn = request["Name" if parameter else "SecretId"]
        self.server.asked.append(arn)
        absent = "ParameterNotFound" if parameter else "ResourceNotFoundException"
        value = self.server.values.get(arn, Exception(absent))
        if isinstance(value, Exception):
            code, text = [*value.args, "for a reason"][:2]
            return 400, {"__type": code, "message": text}
        if parameter:
            assert request["WithDecryption"] is True
            return 200, {"Parameter": {"Name": arn, "Type": "SecureString", "Value": value}}
        return 200, {"ARN": arn, "SecretString": value}
