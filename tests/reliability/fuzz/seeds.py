"""Writes the corpus: one good input of each kind, some bad ones, and what once was a bug.

``python -m tests.reliability.fuzz.seeds``; the same bytes each time.
"""

from __future__ import annotations

from tests.reliability.fuzz import file_seeds, peer_seeds, wire_seeds
from tests.reliability.fuzz.target import CORPUS, Entries


def corpus() -> dict[str, Entries]:
    """All entries, by target and name."""
    return {**wire_seeds.corpus(), **peer_seeds.corpus(), **file_seeds.corpus()}


def main() -> None:
    for name, entries in corpus().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for entry, data in entries.items():
            (folder / entry).write_bytes(data)


if __name__ == "__main__":
    main()
