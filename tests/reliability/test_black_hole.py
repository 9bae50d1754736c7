"""A link that swallows everything is noticed within 15 s, whatever its ranks are doing."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from tests.net.lab import Lab, Site, build, counters, why_not
from tests.net.play import Rank
from tests.reliability.conftest import Measured

pytestmark = [pytest.mark.full, pytest.mark.row(9)]

LIMIT = 15.0
"""Seconds, of which a second is for the server's word on who died."""

CASES = {
    "both wait": ("receive", "receive"),
    "both send and wait": ("exchange", "exchange"),
    "one sends much, the other waits": ("send", "receive"),
    "one waits, the other computes": ("receive", "compute"),
    "one sends much, the other computes": ("send", "compute"),
    "one has filled the window of the other, which computes": ("filled", "compute"),
    "one computes with data on its way": ("told", "receive"),
}


def swallow(lab: Lab, cases: list[tuple[str, tuple[str, str]]]) -> list[dict[str, Any]]:
    """Let a pair of hosts do each of these, open the hole, return how all ranks ended."""
    with ExitStack() as stack:
        ranks = []
        for pair, (driver, whats) in enumerate(cases):
            for number, what in enumerate(whats):
                words = (lab.server, f"pair{pair}", str(number), what, driver)
                host = lab.hosts[2 * pair + number]
                ranks.append(Rank(host, "tests.reliability.hole", *words))
                stack.callback(ranks[-1].close)
        for rank in ranks:
            rank.comes_to("linked", 60)
        lab.black_hole()
        for rank in ranks:
            rank.go()
        return [rank.ends(60) for rank in ranks]


def test_a_black_hole_is_noticed(measured: Measured) -> None:
    """All at once, for they take as long as one: each pair is a job of its own."""
    if why := why_not():
        pytest.skip(why)
    cases = [(driver, name) for driver in ("blocking", "awaited") for name in CASES]
    sites = [Site("none") for _ in range(2 * len(cases))]
    with build(*sites) as lab:
        ends = swallow(lab, [(driver, CASES[name]) for driver, name in cases])
        assert counters(lab.prefix + "core")["hole"] > 0
    for number, (driver, name) in enumerate(cases):
        for what, end in zip(CASES[name], ends[2 * number : 2 * number + 2], strict=True):
            measured(f"{name} ({driver}): {what} ends", end["took"], "s", f"< {LIMIT:g}")
            assert end["error"] == "RankFailed", end
            assert end["took"] < LIMIT
