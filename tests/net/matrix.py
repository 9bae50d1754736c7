"""Measure every pair of NAT kinds: ``python -m tests.net.matrix [--tries N] [KIND ...]``.

Prints a Markdown table. Times are from "both ranks are there" to the end of the first
barrier on the slower rank, over the tries that made a link.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement

from tests.net.lab import KINDS, Nat, build, why_not
from tests.net.play import Summary, play, sites_of

FIRST_TRIES = 3
"""A pair that fails so often in a row is not tried further."""

HEADER = """\
| ranks behind | tries | direct | relay | failed | median ms | p99 ms | max ms |
|---|---|---|---|---|---|---|---|"""

Pair = tuple[Nat, Nat, bool]
"""Two kinds, and whether both ranks are behind one router."""


def pairs(kinds: Iterable[Nat]) -> Iterator[Pair]:
    kinds = list(kinds)
    for one, other in combinations_with_replacement(kinds, 2):
        yield one, other, False
    for kind in kinds:
        if kind != "none":
            yield kind, kind, True


def measure(one: Nat, other: Nat, together: bool, tries: int, delay: float) -> Summary:
    with build(*sites_of(one, other, together=together), delay=delay) as lab:
        done = play(lab, min(tries, FIRST_TRIES))
        if tries > FIRST_TRIES and not all(each.errors for each in done):
            done += play(lab, tries - FIRST_TRIES, timeout=30 + 5 * tries)
    return Summary(done)


def row(name: str, summary: Summary) -> str:
    counts = [len(summary.tries), *map(summary.count, ("direct", "relay", "failed"))]
    times = summary.milliseconds
    took = [summary.median, summary.p99, times[-1]] if times else []
    return f"| {' | '.join([name, *map(str, counts), *(f'{each:.1f}' for each in took)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--delay", type=float, default=0.0, help="one way, in milliseconds")
    arguments = parser.parse_args()
    if set(arguments.kinds) - set(KINDS):
        parser.error(f"the kinds are {', '.join(KINDS)}")
    if (reason := why_not()) is not None:
        sys.exit(reason)
    print(HEADER, flush=True)
    for one, other, together in pairs(arguments.kinds or KINDS):
        name = f"the same {one}" if together else f"{one} and {other}"
        summary = measure(one, other, together, arguments.tries, arguments.delay / 1e3)
        print(row(name, summary), flush=True)


if __name__ == "__main__":
    main()
