"""Edits of inputs, for where no fuzzer guides them: hypothesis shrinks them, chance makes many."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

NUMBERS = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\1")


class Edit(NamedTuple):
    """Put `new` in place of `cut` bytes; `at` counts from the start, round and round."""

    at: int
    cut: int
    new: bytes


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    for at, cut, new in edits:
        start = at % (len(data) + 1)
        data = data[:start] + new + data[start + cut :]
    return data


def chance(random: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with up to four edits: bits, numbers, cuts, and parts of other seeds."""
    return edited(random.choice(seeds), [_edit(random, seeds) for _ in range(random.randint(1, 4))])


def _edit(random: random.Random, seeds: Sequence[bytes]) -> Edit:
    at = random.randrange(1 << 20)
    match random.randrange(4):
        case 0:
            return Edit(at, 1, random.randbytes(1))
        case 1:
            new = random.choice(NUMBERS)
            return Edit(at, len(new), new)
        case 2:
            return Edit(at, random.randint(0, 30), b"")
        case _:
            other = random.choice(seeds)
            start = random.randrange(len(other) + 1)
            return Edit(at, random.randint(0, 8), other[start : start + random.randint(1, 40)])
