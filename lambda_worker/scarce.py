"""Memory that is not there: what numpy, torch and others say then becomes one error that helps."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lambda_worker.cgroups import memory_limit

# As torch, ONNX Runtime, OpenVINO and C++ itself say it, in errors of all kinds.
_SAID = re.compile(
    r"bad_alloc|(can(no|')t|failed to|unable to) allocate|(not enough|out of) mem", re.I
)


class OutOfMemory(MemoryError):
    """This process got no more memory; the text says what to do."""


@contextmanager
def memory_told(stage: Callable[[], str]) -> Iterator[None]:
    """Let a lack of memory be told as such.

    Args:
        stage: what the block is doing when that happens.

    Raises:
        OutOfMemory: in place of what the block raised, if that means a lack of memory.
    """
    try:
        yield
    except Exception as error:
        if not _means_memory(error):
            raise
        text = f"out of memory at stage {stage()}{_limit()}{_detail(error)}"
        advice = "take a smaller batch size, more ranks, or give the worker more memory"
        raise OutOfMemory(f"{text}: {advice}") from None


def _means_memory(error: Exception) -> bool:
    if type(error).__module__.startswith(("lambda_worker", "fmi_client")):
        return False  # it may quote what another rank lacks
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(_SAID.search(str(error)))


def _limit() -> str:
    limit = memory_limit()
    return f", of {limit:,.0f} MB" if limit else ""


def _detail(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return f" ({line[:200]})" if line else ""
