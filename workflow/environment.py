"""Where something ran, for whoever compares numbers."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from lambda_worker.engine import LIBRARIES, Engine
from lambda_worker.threads import cores
from lambda_worker.versions import versions
from workflow.plan import Json

__all__ = ["cpu", "describe"]


def describe(threads: int | None = None, engine: Engine = "torch") -> Json:
    """Tell processor, memory and versions, as the original reports them, and more.

    Args:
        threads: of the inference; None: all cores that this process may use.
        engine: whose version is told, beside torch's.

    Returns:
        cpu, architecture, cores (of the machine), cores_usable, threads, ram_gb (10^9 bytes),
        platform and versions; the version of what is not installed is None.
    """
    packages = dict.fromkeys(("cosmic-fmi", "numpy", "torch", LIBRARIES[engine]))
    return {
        "cpu": cpu(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "threads": threads or cores(),
        "ram_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "platform": platform.platform(),
        "versions": versions(packages),
    }


def cpu() -> str:
    """Return the processor's name, or at least its architecture."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()  # what ARM's kernels do not tell
