"""How many threads are worth starting: the cores this process really has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path

from lambda_worker.cgroups import groups

LAMBDA_MB_PER_CORE = 1769  # docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html, 2026-11


def cores(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Count the cores that scheduler, container and AWS Lambda leave to this process.

    Args:
        environ: where AWS Lambda says how much memory, and so how much of a core, was paid for.
        root: of the file system with the control groups' files.

    Returns:
        At least 1; a part of a core counts as one, since a thread uses what there is of it.
    """
    affinity = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    limits = [float(len(affinity)), *_quotas(root)]
    if memory := environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE"):
        limits.append(int(memory) / LAMBDA_MB_PER_CORE)
    return max(1, ceil(min(limits)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of processor time that each control group above this process allows."""
    read = {1: _version_1, 2: _version_2}
    for folder, version in groups("cpu", root):
        with suppress(OSError, ValueError):
            yield read[version](folder)


def _version_2(group: Path) -> float:
    """Version 2: "100000 100000", or "max 100000", which is no limit."""
    quota, period = (group / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _version_1(group: Path) -> float:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    if quota <= 0:
        raise ValueError("no limit")
    return quota / int((group / "cpu.cfs_period_us").read_text())
