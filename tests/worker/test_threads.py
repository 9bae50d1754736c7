"""Cores that this process has, from made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lambda_worker.threads import cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_what_the_scheduler_allows(tmp_path: Path) -> None:
    assert cores({}, tmp_path) == 8


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        # The group's own limit, and that of the group above it: the lower one counts.
        (
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            },
            3,
        ),
        # A host's path, which is not there in a container.
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_what_a_container_allows(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert cores({}, write(tmp_path, files)) == expected


@pytest.mark.parametrize(("memory", "expected"), [(128, 1), (1769, 1), (1770, 2), (10_240, 6)])
def test_what_lambda_gives_for_the_memory(tmp_path: Path, memory: int, expected: int) -> None:
    assert cores({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory)}, tmp_path) == expected
