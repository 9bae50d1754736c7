"""Which rows of which files a rank reads. Pure: file names and row counts in, ranges out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one file."""

    file: str
    start: int
    stop: int


def cut(files: Mapping[str, int], start: int, stop: int) -> list[Piece]:
    """Rows `start` to `stop` of all files laid end to end, as pieces; empty pieces left out.

    Args:
        files: rows of each file, in the order of the whole.
    """
    pieces, before = [], 0
    for file, rows in files.items():
        first, last = max(start - before, 0), min(stop - before, rows)
        if first < last:
            pieces.append(Piece(file, first, last))
        before += rows
    return pieces


def place(pieces: Sequence[Piece], row: int) -> tuple[str, int]:
    """The file, and the row of it, that is row `row` of all pieces laid end to end."""
    lengths = {str(i): piece.stop - piece.start for i, piece in enumerate(pieces)}
    index, start, _ = cut(lengths, row, row + 1)[0]
    piece = pieces[int(index)]
    return piece.file, piece.start + start


def balance(files: Mapping[str, int], ranks: int) -> list[list[Piece]]:
    """Every row exactly once, and no rank has more than one row above another.

    Args:
        files: rows of each file.
        ranks: how many shards to make; those without rows are empty lists.
    """
    total = sum(files.values())
    edges = [rank * total // ranks for rank in range(ranks + 1)]
    return [cut(files, first, last) for first, last in pairwise(edges)]


def assign(
    files: Mapping[str, int], world_size: int, data_map: Mapping[int, Sequence[str] | None]
) -> list[list[Piece]]:
    """One shard per rank, with files that `data_map` gives to ranks, and the rest balanced.

    Args:
        files: rows of each file, those of `data_map` among them.
        data_map: rank -> its files, or None for a rank that shares the files nobody is given;
            ranks that it does not name count as None. A file of several ranks is divided among
            them. Without a None the files that nobody is given are not read.
    """
    shards: list[list[Piece]] = [[] for _ in range(world_size)]
    owners: dict[str, list[int]] = {}
    for rank, names in data_map.items():
        for name in names or ():
            owners.setdefault(name, []).append(rank)
    for file, ranks in owners.items():
        for rank, pieces in zip(ranks, balance({file: files[file]}, len(ranks)), strict=True):
            shards[rank] += pieces
    rest = {file: rows for file, rows in files.items() if file not in owners}
    free = [rank for rank in range(world_size) if data_map.get(rank) is None]
    for rank, pieces in zip(free, balance(rest, len(free)) if free else (), strict=True):
        shards[rank] = pieces
    return shards
