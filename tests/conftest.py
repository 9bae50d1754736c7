"""Settings for all tests, and an S3 server in a thread."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from tests.s3 import KEYS, serve_s3

# A busy machine is not an error: pytest-timeout ends what hangs.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# The servers that run inside tests log to nobody; the logs of processes are tested as such.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture
def ipv6() -> None:
    """Skip on a machine without IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Endpoint and folder of a real S3 server (nanio: buckets are folders, objects are files)."""
    folder = tmp_path_factory.mktemp("s3")
    with serve_s3(folder) as server:
        yield server.endpoint, folder


@pytest.fixture
def bucket(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder behind s3://bucket; the environment points boto3 at the server."""
    endpoint, folder = s3_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    (folder / "bucket").mkdir(exist_ok=True)
    return folder / "bucket"
