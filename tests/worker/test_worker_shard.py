"""Sharding: every row exactly once, balanced, whatever the files and the world size."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lambda_worker.shard import Piece, assign, balance, cut

FILES = st.lists(st.integers(0, 50), max_size=8).map(
    lambda lengths: {f"{i}.pt": rows for i, rows in enumerate(lengths)}
)


def rows_of(pieces: list[Piece]) -> list[tuple[str, int]]:
    return [(piece.file, row) for piece in pieces for row in range(piece.start, piece.stop)]


def all_rows(files: dict[str, int]) -> list[tuple[str, int]]:
    return [(file, row) for file, rows in files.items() for row in range(rows)]


@given(FILES, st.integers(1, 20))
def test_balanced_shards_in_order_cover_every_row_once(files: dict[str, int], ranks: int) -> None:
    shards = balance(files, ranks)
    assert [row for pieces in shards for row in rows_of(pieces)] == all_rows(files)
    lengths = [len(rows_of(pieces)) for pieces in shards]
    assert len(lengths) == ranks
    assert max(lengths) - min(lengths) <= 1


@given(FILES, st.integers(0, 400), st.integers(0, 400))
def test_cut_is_a_slice_of_all_rows(files: dict[str, int], start: int, stop: int) -> None:
    pieces = cut(files, start, stop)
    assert rows_of(pieces) == all_rows(files)[start:stop]
    assert all(piece.start < piece.stop for piece in pieces)


@given(FILES, st.integers(1, 6), st.data())
def test_data_map_covers_every_row_once(
    files: dict[str, int], ranks: int, data: st.DataObject
) -> None:
    names = st.lists(st.sampled_from(sorted(files)), unique=True) if files else st.just([])
    data_map = {rank: data.draw(st.none() | names) for rank in range(ranks)}
    shards = assign(files, ranks, data_map)
    named = {file for given in data_map.values() for file in given or ()}
    read = named if None not in data_map.values() else set(files)
    expected = Counter(all_rows({file: files[file] for file in read}))
    assert Counter(row for pieces in shards for row in rows_of(pieces)) == expected


def test_fixed_files_and_the_rest() -> None:
    files = {"a": 4, "b": 3, "c": 3}
    shards = assign(files, 4, {0: ["a"], 1: None, 2: None, 3: []})
    assert shards == [
        [Piece("a", 0, 4)],
        [Piece("b", 0, 3)],
        [Piece("c", 0, 3)],
        [],
    ]


def test_a_file_of_two_ranks_is_divided_between_them() -> None:
    assert assign({"a": 5}, 2, {0: ["a"], 1: ["a"]}) == [[Piece("a", 0, 2)], [Piece("a", 2, 5)]]


def test_more_ranks_than_rows_leaves_some_without() -> None:
    assert [len(rows_of(p)) for p in balance({"a": 2}, 4)] == [0, 1, 0, 1]
