"""Punch a thousand times and lose nothing: ``python -m tests.net.proof [--punches N]``.

Each punch is a job of its own with a new socket and a new port, over which 1 MiB goes each
way in pieces; all that arrives is compared with what was sent. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from tests.net.lab import Nat, build, why_not
from tests.net.matrix import HEADER, row
from tests.net.play import Summary, Try, play, sites_of

SHARES: dict[tuple[Nat, Nat], float] = {
    ("preserving", "preserving"): 0.4,
    ("preserving", "double"): 0.15,
    ("double", "double"): 0.15,
    ("none", "preserving"): 0.06,
    ("preserving", "rst"): 0.06,
    ("rst", "rst"): 0.06,
    ("stack", "stack"): 0.06,
    ("double", "stack"): 0.06,
}


def prove(punches: int) -> Iterator[tuple[str, list[Try]]]:
    """Punch about so many times in all; gives the tries of each pair of kinds."""
    for (one, other), share in SHARES.items():
        tries = round(punches * share)
        with build(*sites_of(one, other)) as lab:
            yield f"{one} and {other}", play(lab, tries, timeout=30 + 5 * tries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--punches", type=int, default=1000)
    punches = parser.parse_args().punches
    if (reason := why_not()) is not None:
        sys.exit(reason)
    print(HEADER, flush=True)
    done: list[Try] = []
    for name, tries in prove(punches):
        print(row(name, Summary(tries)), flush=True)
        done += tries
    print(row("all", Summary(done)))
    if failed := [each for each in done if each.errors]:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
