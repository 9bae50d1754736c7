"""Stands in for AWS over HTTP: real clients talk to it, and an execution goes as a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from tests.support import in_thread

ACCOUNT = "123456789012"
MACHINE = f"arn:aws:states:eu-west-1:{ACCOUNT}:stateMachine:cosmic"
SUMMARY = {
    "rows": 40,
    "rows_excluded": 40,  # so that there is no plot to draw
    "excluded_rows": [],
    "batches": 4,
    "inference_seconds": 1.0,
    "rows_per_second": {"wall_clock": 40.0, "end_to_end": 20.0, "sum_of_ranks": 41.0},
    "engine": "torch",
    "precision_max_dz": None,
    "peak_memory_mb": 300.0,
    "metrics": {"mae": 0.01, "mse": 0.0002, "bias": -0.001, "nmad": 0.0131, "r2": 0.92},
}
RECORD = {
    "rows": 10,
    "num_batches": 1,
    "batch_size": 128,
    "calibration": None,
    "inference_time (seconds)": 0.5,
    "sample_persec": 20.0,
    "peak_memory (MB)": 300.0,
    **{"MAE": 0.01, "MSE": 0.0002, "bias": -0.001, "NMAD": 0.0131, "R2": 0.92},
}


@dataclass(frozen=True)
class Frame:
    """What a look at the execution shows: its status, and its Map Runs from first to last."""

    status: str
    maps: tuple[dict[str, Any], ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


def ranks(status: str = "RUNNING", **counts: int) -> dict[str, Any]:
    """A Map Run of 4 ranks."""
    names = ("running", "succeeded", "failed", "timedOut", "aborted", "resultsWritten")
    numbers = dict.fromkeys(names, 0) | counts
    return {"status": status, "itemCounts": {"total": 4, "pending": 0, **numbers}}


def succeeded(run: str) -> Frame:
    """The end of a run that went well."""
    place = f"s3://bucket/results/{run}"
    output = {
        "run": run,
        "results": place,
        "combined_data": f"{place}/combined_data.json",
        "summary_path": f"{place}/summary.json",
        "predictions": f"{place}/predictions.npz",
        "summary": SUMMARY,
    }
    done = (ranks("SUCCEEDED", succeeded=4),)
    return Frame("SUCCEEDED", done, {"output": json.dumps(output)})


@dataclass
class FakeAws:
    """The account.

    Attributes:
        frames: of the execution; each DescribeExecution goes one on, and the last one stays.
        errors: by operation, (HTTP status, code, message) of its next answers; the last one stays
            if it is in a tuple of its own.
        outputs: of the stack "cosmic"; None: there is no stack.
        calls: (operation, arguments) of all that was asked for.
        objects: of S3, by "bucket/key".
        log_group: of the functions; "": they have the usual ones.
        on_call: called with each operation, before its answer.
    """

    frames: list[Frame] = field(default_factory=list)
    errors: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    outputs: dict[str, str] | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    on_call: Callable[[str], None] = lambda operation: None
    log_group: str = "/cosmic/w"
    endpoint: str = ""
    name: str = ""
    looks: int = 0

    @property
    def arn(self) -> str:
        return f"arn:aws:states:eu-west-1:{ACCOUNT}:execution:cosmic:{self.name}"

    def asked(self, operation: str) -> list[Any]:
        """The arguments of all calls of an operation."""
        return [arguments for called, arguments in self.calls if called == operation]

    def answer(self, operation: str, arguments: Any) -> Any:
        """What an operation returns."""
        frame = self.frames[min(max(self.looks - 1, 0), len(self.frames) - 1)]
        match operation:
            case "StartExecution":
                self.name = arguments["name"]
                return {"executionArn": self.arn, "startDate": 0}
            case "DescribeExecution":
                self.looks += 1
                frame = self.frames[min(self.looks, len(self.frames)) - 1]
                return self._execution(frame)
            case "ListMapRuns":
                return {"mapRuns": [self._map(n) for n in range(len(frame.maps))][::-1]}
            case "DescribeMapRun":
                number = int(arguments["mapRunArn"].rpartition(":")[2])
                return {**self._map(number), "maxConcurrency": 4, **frame.maps[number]}
            case "StopExecution":
                return {"stopDate": 0}
            case "DescribeStateMachineForExecution":
                return {"definition": json.dumps(DEFINITION), "name": "cosmic", "roleArn": "r"}
        raise AssertionError(operation)

    def _execution(self, frame: Frame) -> dict[str, Any]:
        about = {"executionArn": self.arn, "stateMachineArn": MACHINE, "startDate": 0}
        return {**about, "status": frame.status, **frame.more}

    def _map(self, number: int) -> dict[str, Any]:
        arn = f"arn:aws:states:eu-west-1:{ACCOUNT}:mapRun:cosmic/Ranks:{number}"
        return {"mapRunArn": arn, "executionArn": self.arn, "startDate": number}


_TASK = {"FunctionName": f"arn:aws:lambda:eu-west-1:{ACCOUNT}:function:cosmic-infer:live"}
DEFINITION = {
    "States": {
        "Init": {"Parameters": {"FunctionName": "cosmic-init"}},
        "Infer": {"ItemProcessor": {"States": {"Rank": {"Parameters": _TASK}}}},
        "Summarize": {"Type": "Pass"},
    }
}


@contextmanager
def fake_aws() -> Iterator[FakeAws]:
    """Run the account on a free port."""
    aws = FakeAws()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if target := self.headers.get("X-Amz-Target"):
                self._json(target.rpartition(".")[2], json.loads(body))
            else:
                self._query({name: values[0] for name, values in parse_qs(body).items()})

        def do_GET(self) -> None:
            if self.path.endswith("/configuration"):  # of a function
                self._json("GetFunctionConfiguration", self.path)
            elif found := aws.objects.get(self.path.lstrip("/").partition("?")[0]):
                self._send(200, found)
            else:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            aws.objects[self.path.lstrip("/")] = body
            self._send(200, b"")

        def _json(self, operation: str, arguments: Any) -> None:
            aws.calls.append((operation, arguments))
            aws.on_call(operation)
            if error := self._error(operation):
                status, code, message = error
                self._send(status, json.dumps({"__type": code, "message": message}).encode())
            elif operation == "GetFunctionConfiguration":
                settings = {"LoggingConfig": {"LogGroup": aws.log_group}} if aws.log_group else {}
                self._send(200, json.dumps(settings).encode())
            else:
                self._send(200, json.dumps(aws.answer(operation, arguments)).encode())

        def _query(self, arguments: dict[str, str]) -> None:
            operation = arguments["Action"]
            aws.calls.append((operation, arguments))
            error = self._error(operation)
            if operation == "DescribeStacks" and aws.outputs is None:
                text = f"Stack with id {arguments['StackName']} does not exist"
                error = (400, "ValidationError", text)
            if error:
                status, code, message = error
                inner = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self._send(status, f"<ErrorResponse>{inner}</ErrorResponse>".encode())
                return
            self._send(200, f"<R><{operation}Result>{_xml(aws)}</{operation}Result></R>".encode())

        def _error(self, operation: str) -> tuple[int, str, str] | None:
            waiting = aws.errors.get(operation)
            return waiting.pop(0) if waiting else None

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with in_thread(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        server.daemon_threads = True
        aws.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield aws


def _xml(aws: FakeAws) -> str:
    """The answers of DescribeStacks and GetCallerIdentity in one: each reads its own."""
    outputs = "".join(
        f"<member><OutputKey>{key}</OutputKey><OutputValue>{value}</OutputValue></member>"
        for key, value in (aws.outputs or {}).items()
    )
    status = "<StackStatus>CREATE_COMPLETE</StackStatus>"
    stack = f"<Stacks><member>{status}<Outputs>{outputs}</Outputs></member></Stacks>"
    caller = f"<Account>{ACCOUNT}</Account><Arn>arn:aws-cn:iam::{ACCOUNT}:user/x</Arn>"
    return stack + caller
