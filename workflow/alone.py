"""A folder for one process at a time, by a lock that leaves no file and ends with its process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Taken(OSError):
    """Another process is at work on the folder."""


@contextmanager
def alone(folder: Path, instead: str) -> Iterator[None]:
    """Have a folder, made if it is not there, for this process alone; it goes if nothing is in it.

    Where the file system has no locks for folders, as NFS, it is left to the user.

    Args:
        folder: where this process is going to write.
        instead: what to do otherwise than wait, such as "take another --run".

    Raises:
        Taken: another process has it. OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        _lock(held, f"{folder}: another process is writing there: wait for it, or {instead}")
        try:
            yield
        finally:
            with suppress(OSError):  # something is in it
                folder.rmdir()
    finally:
        os.close(held)


def _lock(held: int, taken: str) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Taken(taken) from None
    except OSError:
        pass  # no such locks here
