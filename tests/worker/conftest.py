"""Small datasets, and an S3 server in a thread."""

from __future__ import annotations

import json
import os
import socket
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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Endpoint and folder of a real S3 server (nanio: buckets are folders, objects are files)."""
    import uvicorn
    from nanio.app import build_app
    from nanio.auth.credentials import EnvCredentialResolver
    from nanio.config import Settings

    folder = tmp_path_factory.mktemp("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANIO_ACCESS_KEY", "test")
        patch.setenv("NANIO_SECRET_KEY", "test-secret")
        app = build_app(Settings(data_dir=folder, credentials=EnvCredentialResolver()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", folder
        server.should_exit = True
        thread.join()


@pytest.fixture
def bucket(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder behind s3://bucket; the environment points boto3 at the server."""
    from lambda_worker import storage

    endpoint, folder = s3_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (folder / "bucket").mkdir(exist_ok=True)
    storage._s3.cache_clear()
    yield folder / "bucket"
    storage._s3().close()
    storage._s3.cache_clear()
