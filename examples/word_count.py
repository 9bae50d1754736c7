"""Count the words of many files: map and reduce, with an alltoall between them.

Map: each rank counts the words of its own files. Shuffle: every word has one rank that it belongs
to, and an alltoall brings all counts of a word there. Reduce: that rank adds them up.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from examples.ranks import main
from fmi_client import sync

FILES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TOP = 8


def work(comm: sync.Communicator) -> bool:
    """Return whether the counts are those of one process that reads all files."""
    # Map.
    mine = count(FILES[comm.rank :: comm.size])

    # Shuffle: item i of the list goes to rank i. Plain dicts travel as they are, without pickle.
    parts: list[dict[str, int]] = [{} for _ in range(comm.size)]
    for word, number in mine.items():
        parts[owner(word, comm.size)][word] = number
    received = comm.alltoall(parts)

    # Reduce: each word is complete here, so the most frequent of all are among each rank's own.
    own: Counter[str] = Counter()
    for part in received:
        own.update(part)
    tops = comm.gather(most_frequent(own.items()))
    words, occurrences = (comm.reduce(n) for n in (len(own), own.total()))

    right = True
    if tops is not None:  # at the root
        exact = count(FILES)
        top = most_frequent(pair for each in tops for pair in each)
        right = top == most_frequent(exact.items())
        right = right and (words, occurrences) == (len(exact), exact.total())
        print(", ".join(f"{word} {number}" for word, number in top))
        print(f"{len(FILES)} files, {words:,} different words, {occurrences:,} in all", end=" ")
        print(f"on {comm.size} rank(s): {'right' if right else 'WRONG'}")
    return right


def count(files: Iterable[Path]) -> Counter[str]:
    """Count the words of two letters or more in some files."""
    found: Counter[str] = Counter()
    for file in files:
        found.update(re.findall(r"[a-z]{2,}", file.read_text().lower()))
    return found


def most_frequent(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the `TOP` most frequent words; of equally frequent ones, the first of the alphabet."""
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:TOP]


def owner(word: str, size: int) -> int:
    """Return the rank that a word belongs to, the same in every process.

    Python's own hash() is not: it differs from process to process, lest it be guessed.
    """
    return zlib.crc32(word.encode()) % size


if __name__ == "__main__":
    main(work)
