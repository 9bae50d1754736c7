"""The drop-in against plain Python: every operation, type, function and world; and wrong arguments.

Ranks are threads here, each with a communicator of its own: nothing in these tests dies.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce as fold
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fmi_client.fmi as fmi
from fmi_client import values as reduced
from fmi_client.errors import FmiError

SIZES = [1, 2, 3, 5]
LENGTH = 3

FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], fmi.func]] = {
    "sum": (operator.add, fmi.func(fmi.op.sum)),
    "prod": (operator.mul, fmi.func(fmi.op.prod)),
    "max": (max, fmi.func(fmi.op.max)),
    "min": (min, fmi.func(fmi.op.min)),
}


def custom(function: Callable[[Any, Any], Any], commutative: bool, associative: bool) -> None:
    name = f"custom {commutative=} {associative=}"
    f = fmi.func(fmi.op.custom, function, commutative, associative)
    FUNCTIONS[name] = function, f


# Each is what its flags say and no more, so that a freedom that was not given shows.
custom(lambda a, b: a + b + a * b, True, True)
custom(lambda a, _: a, False, True)
custom(lambda a, b: abs(a - b), True, False)
custom(lambda a, b: 2 * a - b, False, False)


def number(kind: str, rank: int, place: int = 0) -> Any:
    """A number of few bits, so that sums and products are exact in every order."""
    whole = (-1) ** place * (rank + 2) + place
    return whole if kind.startswith("int") else whole + 0.5


def value(kind: str, rank: int, length: int = LENGTH) -> Any:
    if kind.endswith("list"):
        return [number(kind, rank, place) for place in range(length)]
    return number(kind, rank)


def type_of(kind: str, length: int = LENGTH) -> fmi.types:
    kinds = fmi.datatypes[kind]
    return fmi.types(kinds, length) if kind.endswith("list") else fmi.types(kinds)


def combined(function: Callable[[Any, Any], Any], values: list[Any]) -> Any:
    """What a reduction is: from left to right, lists element by element."""
    if isinstance(values[0], list):
        return [fold(function, column) for column in zip(*values, strict=True)]
    return fold(function, values)


def same(got: Any, expected: Any) -> bool:
    """Equal, and of Python's own types: 1 is not 1.0, nor a number of numpy's."""
    if isinstance(expected, list):
        return len(got) == len(expected) and type(got) is list and all(map(same, got, expected))
    return type(got) is type(expected) and got == expected


@pytest.fixture
def config(tmp_path: Path, address: str) -> Path:
    host, port = address.split(":")
    direct = {"enabled": True, "host": host, "port": int(port), "max_timeout": 5000}
    path = tmp_path / "fmi.json"
    path.write_text(json.dumps({"backends": {"Direct": direct}, "model": {}}))
    return path


def in_threads(config: Path, size: int, function: Callable[[fmi.Communicator, int], Any]) -> None:
    """Run `function(comm, rank)` as each rank; the first error is raised, after all have ended."""

    def be(rank: int) -> None:
        comm = fmi.Communicator(rank, size, config, "values")
        try:
            function(comm, rank)
        finally:
            comm.close()

    with ThreadPoolExecutor(size) as pool:
        for future in [pool.submit(be, rank) for rank in range(size)]:
            future.result(20)


KINDS = [kind.name for kind in fmi.datatypes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_reductions_are_plain_pythons(config: Path, size: int, kind: str) -> None:
    values, types = [value(kind, rank) for rank in range(size)], type_of(kind)

    def rank(comm: fmi.Communicator, r: int) -> None:
        for name, (function, f) in FUNCTIONS.items():
            total = combined(function, values)
            assert same(comm.allreduce(values[r], f, types), total), name
            prefix = combined(function, values[: r + 1])
            assert same(comm.scan(values[r], f, types), prefix), name
            for root in {0, size // 2, size - 1}:
                got = comm.reduce(values[r], root, f, types)
                assert same(got, total if r == root else None), name

    in_threads(config, size, rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_data_arrives_as_it_was_sent(config: Path, size: int, kind: str) -> None:
    values, types = [value(kind, rank) for rank in range(size)], type_of(kind)
    flat = [x for each in values for x in (each if types.is_list else [each])]

    def rank(comm: fmi.Communicator, r: int) -> None:
        for root in range(size):
            comm.barrier()
            assert same(comm.bcast(values[r], root, types), values[root])
            assert same(comm.gather(values[r], root, types), flat if r == root else [])
            if types.is_list:
                whole = value(kind, root, LENGTH * size) if r == root else None
                part = comm.scatter(whole, root, type_of(kind, LENGTH * size))
                assert same(part, value(kind, root, LENGTH * size)[LENGTH * r :][:LENGTH])
        # Twice around: what is sent first arrives first.
        for step in range(2 * (size > 1)):
            comm.send(value(kind, r + step), (r + 1) % size, types)
        for step in range(2 * (size > 1)):
            left = (r - 1) % size
            assert same(comm.recv(left, types), value(kind, left + step))

    in_threads(config, size, rank)


def test_a_list_needs_no_length_and_may_be_empty_or_an_array(config: Path) -> None:
    ints, doubles = fmi.types(fmi.datatypes.int_list), fmi.types(fmi.datatypes.double_list)

    def rank(comm: fmi.Communicator, r: int) -> None:
        assert same(comm.bcast((1, 2), 0, ints), [1, 2])
        assert same(comm.bcast(np.arange(3), 1, ints), [0, 1, 2])
        assert same(comm.bcast([1, 2.5], 1, doubles), [1.0, 2.5])
        assert same(comm.allreduce([], fmi.func(fmi.op.sum), ints), [])
        assert same(comm.gather([], 0, doubles), [])
        assert same(comm.scatter([1, 2], 0, ints), [r + 1])
        extremes = [-(2**63), 2**63 - 1]
        assert same(comm.bcast(extremes, 0, ints), extremes)
        assert math.isnan(comm.bcast([math.nan], 0, doubles)[0])

    in_threads(config, 2, rank)


def test_an_array_that_was_given_is_left_alone(config: Path) -> None:
    """It has the dtype that is sent: without a copy, a reduction could work in it."""
    types = fmi.types(fmi.datatypes.double_list, 3)

    def rank(comm: fmi.Communicator, r: int) -> None:
        mine = np.full(3, r + 1.0)
        for _, f in FUNCTIONS.values():
            comm.allreduce(mine, f, types)
            comm.reduce(mine, 0, f, types)
            comm.scan(mine, f, types)
        assert mine.tolist() == [r + 1.0] * 3
        assert not np.shares_memory(types.array(mine), mine)

    in_threads(config, 3, rank)


def test_what_is_returned_is_not_what_was_given(config: Path) -> None:
    types = fmi.types(fmi.datatypes.int_list, 1)

    def rank(comm: fmi.Communicator, r: int) -> None:
        mine = [7]
        for got in (
            comm.bcast(mine, 0, types),
            comm.gather(mine, 0, types),
            comm.scatter(mine, 0, types),
            comm.scan(mine, FUNCTIONS["sum"][1], types),
        ):
            got[0] += 1
        assert mine == [7]

    in_threads(config, 1, rank)


def test_a_custom_function_sees_only_what_was_sent(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Division would fail on a trial with zeros, as operations of numpy have it once."""
    monkeypatch.setattr(reduced, "_checked", set())
    f = fmi.func(fmi.op.custom, lambda a, b: a / b, False, False)
    halves = fmi.func(fmi.op.custom, lambda a, b: 1 / (1 / a + 1 / b), True, True)

    def rank(comm: fmi.Communicator, r: int) -> None:
        for types in (fmi.types(fmi.datatypes.double), fmi.types(fmi.datatypes.double_list, 1)):
            mine, want = ([2.0 + r], [2 / 3]) if types.is_list else (2.0 + r, 2 / 3)
            assert comm.allreduce(mine, f, types) == want
            mine, want = ([2.0], [1.0]) if types.is_list else (2.0, 1.0)
            assert comm.allreduce(mine, halves, types) == want

    in_threads(config, 2, rank)


@pytest.mark.parametrize("associative", [False, True])
def test_what_a_custom_function_returns_has_the_type(config: Path, associative: bool) -> None:
    f = fmi.func(fmi.op.custom, lambda a, b: (a + b) / 2, True, associative)

    def rank(comm: fmi.Communicator, r: int) -> None:
        # The other rank either finds the same, or is told.
        message = r"^\[rank \d, allreduce\] the function returned \[0\.5\].*integer"
        with pytest.raises((TypeError, FmiError)) as caught:
            comm.allreduce(r, f, fmi.types(fmi.datatypes.int))
        assert isinstance(caught.value, FmiError) or caught.match(message)

    in_threads(config, 2, rank)


# --------------------------------------------------------------------- wrong arguments
INT, DOUBLE = fmi.types(fmi.datatypes.int), fmi.types(fmi.datatypes.double)
INTS, DOUBLES = fmi.types(fmi.datatypes.int_list, 2), fmi.types(fmi.datatypes.double_list, 2)
SUM = fmi.func(fmi.op.sum)
HALF = fmi.func(fmi.op.custom, lambda a, b: a / b, False, False)

WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    ("send", (1.5, 1, INT), r"1.5 is not types\(int\): 'float'"),
    ("send", ("1", 1, INT), r"'1' is not types\(int\)"),
    ("send", (None, 1, INT), r"None is not types\(int\)"),
    ("send", ([1], 1, INT), r"\[1\] is not types\(int\)"),
    ("send", (2**63, 1, INT), r"9223372036854775808 is not types\(int\): .* too (large|big)"),
    ("send", (-(2**64), 1, INT), r"-18446744073709551616 is not types\(int\): .* too (large|big)"),
    ("send", ("1.5", 1, DOUBLE), r"'1.5' is not types\(double\)"),
    ("send", (10**400, 1, DOUBLE), r"is not types\(double\): .* too large"),
    ("send", (1j, 1, DOUBLE), r"1j is not types\(double\)"),
    ("send", ([1, 2.0], 1, INTS), r"\[1, 2.0\] is not types\(int_list, 2\)"),
    ("send", ([[1, 2], [3, 4]], 1, INTS), r"is not types\(int_list, 2\)"),
    ("send", ([2**63, -1], 1, INTS), r"is not types\(int_list, 2\): .* too (large|big)"),
    ("send", ("12", 1, INTS), r"'12' is not types\(int_list, 2\)"),
    ("send", ({1, 2}, 1, INTS), r"\{1, 2\} is not types\(int_list, 2\), a list"),
    ("send", (1, 1, INTS), r"1 is not types\(int_list, 2\), a list"),
    ("send", ([1], 1, INTS), r"a list of 1: that is not types\(int_list, 2\)"),
    ("send", (1, 2, INT), r"dst=2 is not a rank of 2: 0 … 1"),
    ("send", (1, "1", INT), r"'str' object"),
    ("recv", (-1, INT), r"src=-1 is not a rank of 2"),
    ("bcast", (1, 2, INT), r"root=2 is not a rank of 2"),
    ("bcast", ([1, 2, 3], 0, INTS), r"a list of 3: that is not"),
    ("gather", (1, -1, INT), r"root=-1 is not a rank of 2"),
    ("gather", (1.5, 0, INT), r"1.5 is not"),
    ("scatter", ([1, 2], 2, INTS), r"root=2 is not a rank of 2"),
    ("scatter", (1, 0, INT), r"scatter takes a list, not types\(int\)"),
    (
        "scatter",
        ([1, 2], 1, fmi.types(fmi.datatypes.int_list, 3)),
        "list of 3 has no 2 equal parts",
    ),
    ("scatter", ([1], 0, fmi.types(fmi.datatypes.int_list)), "list of 1 has no 2 equal parts"),
    ("reduce", (1, 5, SUM, INT), r"root=5 is not a rank of 2"),
    ("reduce", ([1], 0, SUM, DOUBLES), r"a list of 1: that is not types\(double_list, 2\)"),
    ("allreduce", (1.5, SUM, INT), r"1.5 is not"),
    ("scan", ([1, 2], SUM, DOUBLE), r"\[1, 2\] is not types\(double\)"),
    ("recv", (1, fmi.datatypes.int), r"fmi.types\(fmi.datatypes.…\) or fmi.func"),
    ("scan", (1, fmi.op.sum, INT), r"fmi.types\(fmi.datatypes.…\) or fmi.func"),
]


@pytest.mark.parametrize(("operation", "arguments", "message"), WRONG)
def test_wrong_arguments_are_told_before_joining(
    config: Path, operation: str, arguments: tuple[Any, ...], message: str
) -> None:
    """Nobody else is there: an operation that joined would wait for them."""
    comm = fmi.Communicator(0, 2, config, "never joined")
    with pytest.raises((TypeError, ValueError, OverflowError), match=message) as caught:
        getattr(comm, operation)(*arguments)
    assert str(caught.value).startswith(f"[rank 0, {operation}] ")


def test_there_is_no_such_rank(config: Path) -> None:
    for rank, size in [(2, 2), (-1, 2), (0, 0)]:
        with pytest.raises(ValueError, match=rf"peer_id={rank} is not a rank of {size}"):
            fmi.Communicator(rank, size, config, "job")


def test_functions_and_names_are_checked() -> None:
    with pytest.raises(TypeError, match=r"fmi.op.custom needs a function"):
        fmi.func(fmi.op.custom)
    with pytest.raises(ValueError, match="'average' is not a valid op"):
        fmi.func("average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'float' is not a valid datatypes"):
        fmi.types("float")  # type: ignore[arg-type]
    assert fmi.func(fmi.op.custom, max).in_order, "nothing is known of it"
    # The library ignores a function, and flags, beside another operation: so do we.
    assert not fmi.func(fmi.op.sum, max, False, False).in_order


def test_a_closed_communicator_says_so(config: Path) -> None:
    comm = fmi.Communicator(0, 2, config, "never joined")
    comm.close()
    comm.close()
    with pytest.raises(ValueError, match=r"^\[rank 0, barrier\] .* closed: make another"):
        comm.barrier()


def test_who_names_another_type_than_the_sender_is_told(config: Path) -> None:
    def rank(comm: fmi.Communicator, r: int) -> None:
        if r == 0:
            for _ in range(2):
                comm.send([1.5, 2.5], 1, DOUBLES)
            comm.send([1, 2], 1, INTS)
            comm.send(3, 1, INT)
            return
        for types, kind in [
            (INTS, TypeError),
            (DOUBLE, TypeError),
            (fmi.types(fmi.datatypes.int_list, 3), ValueError),
            (DOUBLE, TypeError),
        ]:
            with pytest.raises(kind, match=r"^\[rank 1, recv\] rank 0 sent .* that is not types"):
                comm.recv(0, types)

    in_threads(config, 2, rank)


def test_a_part_of_another_length_is_told(config: Path) -> None:
    def rank(comm: fmi.Communicator, r: int) -> None:
        if r == 0:
            assert comm.scatter([1, 2], 0, INTS) == [1]
            return
        with pytest.raises(ValueError, match=r"\[rank 1, scatter\] rank 0 sent a list of 1: that"):
            comm.scatter(None, 0, fmi.types(fmi.datatypes.int_list, 4))

    in_threads(config, 2, rank)


def test_lists_of_different_lengths_are_told(config: Path) -> None:
    ints = fmi.types(fmi.datatypes.int_list)

    def rank(comm: fmi.Communicator, r: int) -> None:
        with pytest.raises(ValueError, match=r"\[rank \d, allreduce\] .* lengths: \[1, 2\]"):
            comm.allreduce([0] * (r + 1), HALF, ints)
        if r == 0:
            with pytest.raises(ValueError, match=r"\[rank 0, gather\] .* lengths: \[1, 2\]"):
                comm.gather([0] * (r + 1), 0, ints)
        else:
            assert comm.gather([0] * (r + 1), 0, ints) == []
        with pytest.raises(FmiError, match=r"allreduce"):
            comm.allreduce([0] * (r + 1), SUM, ints)

    in_threads(config, 2, rank)
