"""Settings for all tests."""

from __future__ import annotations

import logging
import socket

import pytest
import structlog

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
