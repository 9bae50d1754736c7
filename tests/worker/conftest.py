"""Small datasets, and an S3 server in a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.worker.worker_data import MakePt, tensors

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture
def make_pt(tmp_path: Path) -> MakePt:
    """Write a dataset file: `make_pt("a.pt", rows)`; returns its path."""

    def make(name: str, rows: int, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(TensorDataset(*tensors(rows, **options)), path)  # type: ignore[arg-type]
        return path

    return make


@pytest.fixture(scope="session")
def rendezvous() -> Iterator[str]:
    """host:port of a rendezvous server, a process of its own."""
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        events = (json.loads(line) for line in server.stderr)
        port = next(event["port"] for event in events if event["event"] == "listening")
        # Somebody has to read the log, or the server stops when the pipe is full.
        reader = threading.Thread(target=lambda: [None for _ in events])
        reader.start()
        yield f"127.0.0.1:{port}"
        server.terminate()
        reader.join()


@pytest.fixture
def bucket(bucket: Path) -> Iterator[Path]:
    """The same, and no client of an earlier test's environment."""

    from lambda_worker.s3 import client

    client.cache_clear()
    yield bucket
    client().close()
    client.cache_clear()
