"""Figures that tests measure, told at the end of the run: docs/reliability.md quotes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import pytest

from tests.processes import serve_rendezvous


class Figure(NamedTuple):
    """What was measured for a row of the table."""

    row: int
    what: str
    value: float
    unit: str
    limit: str


class Measured(Protocol):
    """Take down a figure before it is compared with its limit: a miss is worth reading, too."""

    def __call__(self, what: str, value: float, unit: str, limit: str) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server in a process of its own."""
    with serve_rendezvous() as address:
        yield address


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """``measured("p99 of a join", 12.3, "ms", "< 50")``, for the row that the test's mark names."""
    mark = request.node.get_closest_marker("row")
    assert mark is not None, "which row of docs/reliability.md is it?"
    told = request.node.user_properties  # goes with the test's report, also to another process
    return lambda what, value, unit, limit: told.append(
        ("measured", (mark.args[0], what, float(value), unit, limit))
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = (report for group in terminalreporter.stats.values() for report in group)
    properties = (each for report in ended for each in getattr(report, "user_properties", ()))
    told = dict.fromkeys(Figure(*each) for name, each in properties if name == "measured")
    figures = sorted(told, key=lambda figure: figure.row)
    if not figures:
        return
    terminalreporter.section("measured, beside the limits of docs/reliability.md")
    for row, what, value, unit, limit in figures:
        terminalreporter.write_line(f"{row:>3}  {what:<66} {value:>10.4g} {unit:<8} {limit}")
