"""deploy/local_aws.py as a process, and a shell that has its environment."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import own_environment
from tests.support import closed_port, wait_for

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"


@dataclass(frozen=True)
class LocalAws:
    """What runs: the variables that lead to it, and its log."""

    variables: Mapping[str, str]
    log: Path

    @contextlib.contextmanager
    def client(self, service: str) -> Iterator[Any]:
        """A boto3 client of a service here."""
        import boto3

        make: Any = boto3.client
        made = make(
            service,
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            verify=self.variables["AWS_CA_BUNDLE"],
            region_name=self.variables["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.variables["AWS_SECRET_ACCESS_KEY"],
        )
        with contextlib.closing(made):
            yield made


def tool(name: str) -> str:
    """Where a program of `make tools` is; without it the test skips."""
    places = {"sam": "sam", "cfn-lint": "sam", "checkov": "checkov", "python": "ministack"}
    program = TOOLS / places[name] / "bin" / name
    if not program.exists():
        pytest.skip(f"needs {name}: run `make tools`")
    return str(program)


@contextlib.contextmanager
def local_aws(folder: Path, **variables: str) -> Iterator[LocalAws]:
    """Run it at a free port; afterwards no container of it is left.

    Args:
        folder: an empty one, for its log.
        variables: more environment of the process.
    """
    port = str(closed_port())
    ours = {"GATEWAY_PORT": port, "TMPDIR": str(folder), "MINISTACK_HOSTNAME": "tests"}
    log = folder / "local-aws.log"
    command = [tool("python"), str(ROOT / "deploy/local_aws.py")]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=own_environment() | ours | variables
        )
    assert process.stdout is not None
    try:
        said = process.stdout.readline().decode().split()
        assert said[:1] == ["export"], log.read_text()
        here = LocalAws(dict(pair.split("=", 1) for pair in said[1:]), log)
        _wait_until_it_answers(process, here)
        yield here
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # with containers it may take longer; those we remove ourselves
        process.kill()
        process.wait()
        _remove_containers(f"ministack.instance=tests:{port}")


class Shell:
    """One bash for commands that build on each other; the first that fails ends it."""

    def __init__(self, folder: Path, log: Path, **variables: str) -> None:
        self._log = log
        self._errors = log.open("wb")
        self._bash = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
            env=own_environment() | variables,
            text=True,
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.kill()
        self._bash.wait()
        self._errors.close()
        self._bash.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._bash.stdin.close()

    def run(self, commands: str) -> str:
        """Run commands; returns what they wrote to stdout."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"set -v\n{commands}\n{{ set +v; echo; echo :done; }} 2>/dev/null\n")
        self._bash.stdin.flush()
        lines: list[str] = []
        for line in self._bash.stdout:
            if line == ":done\n":
                return "".join(lines)
            lines.append(line)
        self._bash.wait()
        said = self._log.read_text(errors="replace")[-6000:]
        raise AssertionError(f"{shlex.quote(commands[-300:])} failed:\n{''.join(lines)}\n{said}")


def _wait_until_it_answers(process: subprocess.Popen[bytes], here: LocalAws) -> None:
    from botocore.exceptions import EndpointConnectionError

    def answers() -> bool:
        assert process.poll() is None, here.log.read_text()
        with contextlib.suppress(EndpointConnectionError):
            return bool(sts.get_caller_identity())
        return False

    with here.client("sts") as sts:
        wait_for(answers, "a local AWS", 60)


def _remove_containers(label: str) -> None:
    import docker
    import docker.errors

    with contextlib.suppress(docker.errors.DockerException):
        engine = docker.from_env()
        for container in engine.containers.list(all=True, filters={"label": label}):
            with contextlib.suppress(docker.errors.APIError):
                container.remove(force=True)
        engine.close()
