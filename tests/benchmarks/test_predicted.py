"""The comparison of the model with what is measured, and what the documents show of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks.predicted import SIZES, be_rank, table
from benchmarks.start import run_ranks, serve
from fmi_client.cost_model import OPERATIONS, Model


def shape(printed: str) -> list[str]:
    """Return the lines with x for every number but bytes and ranks."""
    return [re.sub(r"\d[\d,]*\.\d+|\d[\d,]* (?=[µM])", "x ", line) for line in printed.splitlines()]


def test_the_documents_show_what_is_printed() -> None:
    model = Model(latency=1e-4, bandwidth=1e9, reduction=1e10)
    cases = [(op, n) for op in OPERATIONS for n in ((0,) if op == "barrier" else SIZES)]
    expected = shape(table([(model, dict.fromkeys(cases, 0.25))] * 4))
    page = Path(__file__).parents[2] / "docs" / "channels.md"
    lines = shape(page.read_text())
    starts = [i for i, line in enumerate(lines) if line.startswith("4 ranks: latency")]
    assert [lines[i : i + len(expected)] for i in starts] == [expected] * 2


def test_a_line_compares_the_model_with_the_slowest_rank() -> None:
    model = Model(latency=1e-3, bandwidth=1e6, reduction=1e9)
    found = [(model, {("barrier", 0): seconds}) for seconds in (0.001, 0.004, 0.002, 0.001)]
    assert "\n| barrier | 0 | 2.00 | 4.00 | 2.00 |\n" in table(found)


def test_ranks_measure_every_operation() -> None:
    with serve() as address:
        (model, times), other = run_ranks(2, be_rank, {"server": address}, (64,))
    assert other[0] == model
    assert [op for op, _ in times] == list(OPERATIONS)
    assert all(1e-7 < seconds < 1 for seconds in times.values())


def die(rank: int, size: int) -> None:
    os._exit(1)


def test_a_rank_that_dies_ends_the_benchmark() -> None:
    with pytest.raises(EOFError):
        run_ranks(2, die)
