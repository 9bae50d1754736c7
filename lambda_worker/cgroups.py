"""The control groups of this process, which limit what a container may use.

Version 2 has one tree of groups, version 1 one for each controller ("cpu", "memory").
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Group", "groups", "memory_limit", "number"]

# Version 1 has no word for "no limit": it says the largest number of bytes, in whole pages.
_NO_LIMIT = 1 << 60


class Group(NamedTuple):
    """A folder of a group's files, and which version they are of."""

    folder: Path
    version: int


def groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """Each group that this process is in and all above, which limit it as well.

    Args:
        controller: "cpu" or "memory".
        root: where /proc and /sys are.

    Returns:
        Of a folder that is given here not all need be there: in a container the path is the
        host's, of which only the top is to be seen.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            top = root / "sys/fs/cgroup" / names
            folder = top / path.strip("/")
            above = (parent for parent in folder.parents if parent.is_relative_to(top))
            yield from (Group(place, 1 if names else 2) for place in (folder, *above))


def memory_limit(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> float | None:
    """What this process may use of memory, in MB (10^6 bytes); None where nothing says so.

    The least of its control groups' limits and of what the Lambda function has, whose MB are 2^20
    bytes: 1,769 of them are 1,855 here. Nobody's limit is what the machine has.
    """
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = [number(group.folder / names[group.version]) for group in groups("memory", root)]
    with suppress(KeyError, ValueError):
        limits.append(int(environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]) << 20)
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    return min(known) / 1e6 if known else None


def number(path: Path) -> int | None:
    """The whole number in a file; None without one, as in "max": no limit here."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
