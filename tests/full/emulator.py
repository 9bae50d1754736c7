"""A local AWS (ministack) whose functions are processes of this environment's Python.

A function is a zip with a `bootstrap` that starts AWS's own runtime client, awslambdaric, so that
every concurrent invocation is a process of its own that asks the Lambda Runtime API for its event.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.processes import own_environment
from tests.support import closed_port, wait_for

ROOT = Path(__file__).parents[2]
MINISTACK = ROOT / ".tools/ministack/bin/ministack"
MACHINE = ROOT / "workflow/state_machine.asl.json"
REGION = "us-east-1"

# Kills its process group when its stdin closes, however the test's process has ended: functions'
# processes outlive ministack otherwise.
_GUARD = "trap '' TERM INT HUP; read -r _; kill -KILL 0"
_INFER = "lambda_worker.handlers.infer"
_BOOTSTRAP = """#!/bin/sh
export PYTHONPATH='{root}'
exec '{python}' -m awslambdaric "$_HANDLER"
"""


@dataclass
class Emulator:
    """What runs at `endpoint`, an URL; `log` is ministack's, with the functions' output."""

    endpoint: str
    log: Path
    stack: ExitStack
    clients: dict[str, Any] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        """The boto3 client of a service here."""
        if service not in self.clients:
            import boto3

            client = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name=REGION,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
            self.clients[service] = self.stack.enter_context(closing(client))
        return self.clients[service]

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its name."""
        self.client("s3").create_bucket(Bucket=name)
        return name

    def role(self, name: str) -> str:
        """Make a role that everything here may take; returns its ARN."""
        principal = {"Service": ["lambda.amazonaws.com", "states.amazonaws.com"]}
        trust = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        made = self.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=document)
        return str(made["Role"]["Arn"])

    def function(
        self, name: str, handler: str, role: str, timeout: int = 300, **environment: str
    ) -> str:
        """Make a function of a handler ("module.function"); returns its ARN.

        Args:
            timeout: seconds that an invocation may take.
            environment: variables of its processes, in addition to AWS_ENDPOINT_URL.
        """
        made = self.client("lambda").create_function(
            FunctionName=name,
            Runtime="provided.al2023",
            Handler=handler,
            Role=role,
            Code={"ZipFile": _code()},
            Timeout=timeout,
            MemorySize=1769,
            Environment={"Variables": environment},
        )
        return str(made["FunctionArn"])

    def machine(self, name: str, role: str, functions: Mapping[str, str]) -> str:
        """Make the state machine; returns its ARN.

        Args:
            functions: ARNs by what `${...}` in the definition calls them, as CloudFormation would
                fill them in ("InitFunctionArn": ...).
        """
        definition = MACHINE.read_text()
        for placeholder, arn in functions.items():
            definition = definition.replace(f"${{{placeholder}}}", arn)
        assert "${" not in definition, "a function's ARN is missing"
        made = self.client("stepfunctions").create_state_machine(
            name=name, roleArn=role, definition=definition
        )
        return str(made["stateMachineArn"])

    def deploy(self, name: str = "cosmic", infer: str = _INFER, **environment: str) -> str:
        """Make role, functions and state machine of a run; returns the machine's ARN.

        Args:
            name: of the machine, and where the functions' names start.
            infer: the handler of a rank's function, "module.function".
            environment: variables of all functions.
        """
        role = self.role(name)
        handlers = {h: f"lambda_worker.handlers.{h}" for h in ("init", "summarize", "blame")}
        functions = {
            f"{which.title()}FunctionArn": self.function(
                f"{name}-{which}", handler, role, **environment
            )
            for which, handler in (handlers | {"infer": infer}).items()
        }
        return self.machine(name, role, functions)

    def start(self, machine: str, event: Mapping[str, Any]) -> str:
        """Start an execution; returns its ARN."""
        started = self.client("stepfunctions").start_execution(
            stateMachineArn=machine, input=json.dumps(event)
        )
        return str(started["executionArn"])

    def finish(self, execution: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until an execution has ended; returns its description."""
        describe = self.client("stepfunctions").describe_execution

        def ended() -> Any:
            now = describe(executionArn=execution)
            return now["status"] != "RUNNING" and now

        found: dict[str, Any] = wait_for(ended, f"execution {execution}", seconds)
        return found


@contextmanager
def emulator(folder: Path, **environment: str) -> Iterator[Emulator]:
    """Run ministack on a free port of 127.0.0.1. Of a distributed Map it runs 64 children at once.

    Args:
        folder: an empty one, for its files.
        environment: more of its variables; DOCKER_HOST, for example, lets it start containers.
    """
    if not MINISTACK.exists():
        pytest.skip("needs a local AWS: run `make tools`")
    endpoint = f"http://127.0.0.1:{(port := closed_port())}"
    ours = {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",
        "TMPDIR": str(folder),
        "AWS_ENDPOINT_URL": endpoint,  # functions inherit it
        "LAMBDA_ACCOUNT_CONCURRENCY": "0",  # as many at once as a job has ranks
        "DOCKER_HOST": "unix:///nowhere",  # it ends containers of others that bear its label
    }
    log = folder / "ministack.log"
    with ExitStack() as stack:
        command = [str(MINISTACK)]
        process = stack.enter_context(
            _running(command, log, own_environment() | ours | environment)
        )
        here = Emulator(endpoint, log, stack)
        _wait_until_healthy(process, here)
        yield here


@contextmanager
def _running(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process whose children, too, end with the block or with this process."""
    shell = shutil.which("sh") or "/bin/sh"
    guard = subprocess.Popen([shell, "-c", _GUARD], stdin=subprocess.PIPE, process_group=0)
    assert guard.stdin is not None
    process = None
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=guard.pid,
            )
        yield process
    finally:
        guard.stdin.close()
        guard.wait()
        if process:
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], here: Emulator) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    def healthy() -> bool:
        assert process.poll() is None, here.log.read_text()
        try:
            with urlopen(f"{here.endpoint}/_ministack/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    wait_for(healthy, "ministack", 60)


def _code() -> bytes:
    """The zip file of all functions: they differ in their handler only."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        entry = zipfile.ZipInfo("bootstrap")
        entry.external_attr = 0o755 << 16
        archive.writestr(entry, _BOOTSTRAP.format(root=ROOT, python=sys.executable))
    return packed.getvalue()
