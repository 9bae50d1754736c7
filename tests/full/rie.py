"""AWS Lambda's Runtime Interface Emulator, one per function instance.

The emulator comes inside aws-sam-cli (`make tools`). It starts the runtime client that AWS ships
in its Python images, our handler in it, at the first event; then it is warm.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import wait_for

ROOT = Path(__file__).parents[2]
INVOKE = "2015-03-31/functions/function/invocations"
START_SECONDS = 60.0


def emulator() -> Path | None:
    """The emulator's binary for this machine, or None where `make tools` was not run."""
    machine = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    place = f"sam/lib/python3*/site-packages/samcli/local/rapid/aws-lambda-rie-{machine}"
    return next((ROOT / ".tools").glob(place), None)


@dataclass
class Instance:
    """One instance of a function: it serves one event at a time."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    def invoke(self, event: object, timeout: float = 240.0) -> Any:
        """The handler's result, or the error object that AWS Lambda makes of its exception."""
        url = f"http://127.0.0.1:{self.port}/{INVOKE}"
        request = urllib.request.Request(url, json.dumps(event).encode())
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        try:
            return json.loads(text)
        except ValueError:  # the emulator's own words, as where a function takes too long
            return {"errorType": "Emulator", "errorMessage": text.decode(errors="replace")}

    def output(self) -> str:
        """All that the function has printed so far."""
        return (self.folder / "stdout").read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The function's lines of JSON: its log, and its metrics."""
        return [json.loads(line) for line in self.output().splitlines() if line.startswith("{")]

    def everything(self) -> str:
        """stdout and stderr, of the emulator too: where no secret may be."""
        return self.output() + (self.folder / "stderr").read_text()


@contextmanager
def instance(
    handler: str,
    folder: Path,
    env: Mapping[str, str] | None = None,
    *,
    seconds: int = 240,
    memory: int = 2048,
) -> Iterator[Instance]:
    """Run an instance of a function.

    Args:
        handler: as in a function's configuration, `lambda_worker.handlers.infer`.
        folder: takes its output and its temporary files.
        env: the function's environment, besides this process's own.
        seconds, memory: its time limit, and its memory (MB), of which it only is told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, runtime = _free_ports(2)
    addresses = {"runtime-interface-emulator": port, "runtime-api": runtime}
    options = [f"--{name}-address=127.0.0.1:{number}" for name, number in addresses.items()]
    # The virtual environment's own name for Python: what that links to knows no packages.
    command = [str(emulator()), *options, sys.executable, "-m", "awslambdaric", handler]
    limits = {"TIMEOUT": str(seconds), "MEMORY_SIZE": str(memory)}
    own = {f"AWS_LAMBDA_FUNCTION_{name}": value for name, value in limits.items()}
    own |= {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        out, err = (stack.enter_context((folder / n).open("wb")) for n in ("stdout", "stderr"))
        process = subprocess.Popen(
            command, env={**os.environ, **own, **(env or {})}, stdout=out, stderr=err, cwd=folder
        )
        stack.callback(_end, process)
        _wait_listening(port, process, folder)
        yield Instance(port, folder, process)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _wait_listening(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    def listens() -> bool:
        said = (folder / "stderr").read_text()
        assert process.poll() is None, f"the emulator ended with {process.returncode}: {said}"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, f"the emulator on port {port}", START_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the emulator and what it has started, which leads a process group of its own."""
    family = [process.pid, *_descendants(process.pid)]
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *_descendants(child)]
    return found
