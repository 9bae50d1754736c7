"""How many rows a call of the model takes, where nobody has said so: `batch_size: "auto"`.

What is best depends on engine, cores and caches, so it is tried out on rows made up for it; what is
possible depends on memory. Each rank tries while the others do, as in the run itself, and the
slowest rank's rates decide (allreduce, MIN): all ranks choose the same, and none what another one
has no memory for.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lambda_worker.cgroups import groups, number
from lambda_worker.records import memory as resident

if TYPE_CHECKING:
    from lambda_worker.engine import Predict

CANDIDATES = (8, 16, 32, 64, 128, 256, 512)
NEAR = 0.03  # a smaller batch as fast as that is better: less memory, finer progress
BUDGET = 2.0  # seconds for all trials
FIRST = {8, 16, 32}  # tried even later than that: a hiccup in one trial should not decide
ROUNDS = 3  # of which the best counts: others are at work here, and sizes new to the engine
MEMORY_SHARE = 0.5  # of what is available: the allocator's and the system's needs are unknown
ROW_BYTES = 4 * (5 * 32 * 32 + 5)
READ_AHEAD = 4  # batches of rows in memory besides the one in the model

Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Trials:
    """What one rank found out.

    Attributes:
        rates: rows/s of each of CANDIDATES; 0 where there was no memory or no time for it, infinite
            where the rank has too few rows for it to matter.
        memory: bytes that a batch may take here, and what limits them.
        seconds: how long it took.
    """

    rates: Rates
    memory: tuple[int, str]
    seconds: float


def choose(rates: Rates) -> int:
    """The smallest of CANDIDATES whose rate is within NEAR of the best one.

    Args:
        rates: as in `Trials`, of one rank or the least of all ranks.
    """
    known = np.where(np.isfinite(rates), rates, 0.0)
    return CANDIDATES[int(np.argmax(known >= (1 - NEAR) * known.max()))]


def report(trials: Trials, rates: Rates) -> dict[str, Any]:
    """The choice as records and `cosmic infer --json` tell it.

    Args:
        rates: what `choose` was given.
    """
    known = [float(rate) if 0 < rate < np.inf else None for rate in rates]
    return {
        "asked": "auto",
        "chosen": choose(rates),
        "rows_per_second": dict(zip(map(str, CANDIDATES), known, strict=True)),
        "memory_mb": trials.memory[0] / 1e6,
        "memory_limit": trials.memory[1],
        "seconds": trials.seconds,
    }


def calibrate(
    predict: Predict,
    rows: int,
    *,
    memory: tuple[int, str] | None = None,
    used: Callable[[str], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Trials:
    """Call the model with batches of rising size, for BUDGET seconds or hardly more.

    Args:
        predict: the model, as the run will call it.
        rows: rows of this rank: no batch need be larger.
        memory: bytes that a batch may take and what limits them; default: what is available.
        used: resident memory in MB, as `records.memory` tells it.
        clock: seconds.
    """
    used = used or resident
    memory = memory or allowance()
    _timed(predict, CANDIDATES[0], clock)  # the very first call makes what later ones use
    began, before = clock(), used("VmRSS")
    best: dict[int, float] = {}
    for _ in range(ROUNDS):
        need = 0.0
        for size in _worth_trying(rows):
            fastest = max((s / took for s, took in best.items()), default=np.inf)
            late = clock() - began + size / fastest > BUDGET and (best.keys() >= FIRST)
            if need > memory[0] or late:
                break  # the larger ones would fit even less
            took = _timed(predict, size, clock)
            best[size] = min(took, best.get(size, np.inf))
            # The peak is never below the real need, but may be older: then the guess is too high.
            peak = (used("VmHWM") - before) * 1e6
            need = 2 * (max(peak, 0.0) + size * ROW_BYTES * READ_AHEAD)
    return Trials(_rates(rows, best), memory, clock() - began)


def _worth_trying(rows: int) -> list[int]:
    """Candidates up to the first one that takes all rows at once."""
    return [size for size in CANDIDATES if size == CANDIDATES[0] or size < 2 * rows] if rows else []


def _timed(predict: Predict, size: int, clock: Callable[[], float]) -> float:
    random = np.random.default_rng(0)
    images = random.uniform(0, 3, (size, 5, 32, 32)).astype(np.float32)
    magnitudes = random.uniform(16, 20, (size, 5)).astype(np.float32)
    began = clock()
    predict(images, magnitudes)
    return clock() - began


def _rates(rows: int, best: Mapping[int, float]) -> Rates:
    tried = _worth_trying(rows)
    missing = {size: 0.0 if size in tried else np.inf for size in CANDIDATES}
    rates = missing | {size: size / took for size, took in best.items()}
    return np.array([rates[size] for size in CANDIDATES])


def allowance(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Bytes that a batch may take on this machine, and what limits them.

    MEMORY_SHARE of what is `available`, divided among the ranks here (LOCAL_WORLD_SIZE, as torchrun
    names it; `cosmic run` sets it).
    """
    least, name = available(root, environ)
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or 1)
    return int(least * MEMORY_SHARE / ranks), name


def available(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Bytes of memory that there are still to be had, and what limits them; 0: nobody knows.

    The least of what the machine has available, what its control groups leave, and what the Lambda
    function has.

    Args:
        root: where /proc and /sys are.
    """
    left = [(_field(root / "proc/meminfo", "MemAvailable", 1024) or 0, "machine")]
    left += [(bytes_left, "cgroup") for bytes_left in _cgroups(root)]
    with suppress(KeyError, ValueError):
        whole = int(environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]) << 20
        left.append((whole - (_field(root / "proc/self/status", "VmRSS", 1024) or 0), "lambda"))
    least, name = min(left)
    return max(0, least), name


def _cgroups(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process leaves."""
    names = {  # version: limit, use, what could be dropped of it
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for folder, version in groups("memory", root):
        limit, use, cache = names[version]
        whole, now = number(folder / limit), number(folder / use)
        if whole is not None and now is not None:
            yield whole - now + (_field(folder / "memory.stat", cache) or 0)


def _field(path: Path, name: str, unit: int = 1) -> int | None:
    with suppress(OSError):
        found = re.search(rf"^{name}:?\s+(\d+)", path.read_text(), re.MULTILINE)
        return int(found[1]) * unit if found else None
    return None
