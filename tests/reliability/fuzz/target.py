"""What a fuzz target is, and what every input must satisfy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

Entries = Mapping[str, bytes]
"""Inputs of one target, by name."""

MB = 1 << 20


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: parses the input, in pieces of so many bytes if it is a stream; returns all that can
            be observed. A documented error is part of that; any other comes out.
        stream: whether pieces must give what the whole gives.
        memory: bytes that an input may cost at once, whatever it says.
        seconds: that it may take on a machine that does other things, too.
    """

    name: str
    run: Callable[[bytes, int], object]
    stream: bool = False
    memory: int = 4 * MB
    seconds: float = 5.0


TARGETS: dict[str, Target] = {}


def add(target: Target) -> None:
    TARGETS[target.name] = target


def entries(target: Target) -> Iterator[Path]:
    """The files of a target's corpus; each is named for what it is."""
    yield from sorted((CORPUS / target.name).iterdir())


def check(target: Target, data: bytes) -> object:
    """Parse whole and byte by byte.

    Returns:
        What came out.

    Raises:
        AssertionError: the two differ. Anything else: it is not documented.
    """
    whole = target.run(data, max(len(data), 1))
    if target.stream:
        single = target.run(data, 1)
        assert single == whole, f"{target.name}: byte by byte {single!r}, whole {whole!r}"
    return whole


def peak(target: Target, data: bytes) -> int:
    """Bytes that are in use at once while the input is parsed whole, beyond those before."""
    tracemalloc.start()
    try:
        target.run(data, max(len(data), 1))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
