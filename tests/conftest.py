"""Settings for all tests."""

from __future__ import annotations

import logging

import structlog

# The servers that run inside tests log to nobody; the logs of processes are tested as such.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
