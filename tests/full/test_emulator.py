"""The emulator's functions are what the tests of the state machine take them for."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.full.emulator import emulator
from tests.support import wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_functions_are_processes_that_stay_warm(tmp_path: Path) -> None:
    with emulator(tmp_path) as aws:
        function = aws.function("who", "tests.full.doomed.pid", aws.role("role"))
        answers = [aws.client("lambda").invoke(FunctionName=function) for _ in range(2)]
        pids = [json.loads(answer["Payload"].read()) for answer in answers]
        assert pids[0] == pids[1] != os.getpid()
        assert alive(pids[0])


def test_it_listens_on_loopback_and_leaves_no_process_behind(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    with emulator(tmp_path) as aws:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(aws.endpoint.rpartition(":")[2])), 5)
        function = aws.function("busy", "tests.full.doomed.hang", aws.role("role"))
        event = json.dumps(str(place))
        aws.client("lambda").invoke(FunctionName=function, Payload=event, InvocationType="Event")
        wait_for(lambda: place.exists() and place.read_text().endswith("\n"), "the function", 60)
        pid = int(place.read_text())
        assert alive(pid)
    wait_for(lambda: not alive(pid), "the end of the function's process", 10)
