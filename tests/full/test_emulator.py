"""The emulator's functions are what the tests of the state machine take them for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.full.emulator import emulator, wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_functions_are_processes_that_end_with_it(tmp_path: Path) -> None:
    with emulator(tmp_path) as aws:
        function = aws.function("who", "tests.full.doomed.pid", aws.role("role"))
        answers = [aws.client("lambda").invoke(FunctionName=function) for _ in range(2)]
        pids = [json.loads(answer["Payload"].read()) for answer in answers]
        assert pids[0] == pids[1] != os.getpid(), "a warm function is the same process"
        assert alive(pids[0])
        with pytest.raises(ConnectionRefusedError):
            _connect_elsewhere(aws.endpoint)
    wait_for(lambda: not alive(pids[0]), "the end of the function's process", 10)


def _connect_elsewhere(endpoint: str) -> None:
    """Connect to the emulator's port at another address of this machine."""
    import socket

    port = int(endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.2", port), timeout=5):
        pass
