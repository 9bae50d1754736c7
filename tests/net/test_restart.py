"""The server is killed in the middle, and comes back without a memory of anybody."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from tests.net.lab import Lab, Nat, build
from tests.net.play import ranks, sites_of, start_rank
from tests.net.steps import REJOIN_SECONDS

pytestmark = pytest.mark.full

SOON = 3.0


def restart(lab: Lab) -> None:
    lab.kill_server()
    lab.start_server()


def lost(result: dict[str, Any]) -> None:
    """It waited for a server in vain, and says so."""
    assert result["error"] == "RendezvousError", result
    assert "connection to the server lost" in result["why"], result
    assert result["took"] < REJOIN_SECONDS + SOON


def fine(result: dict[str, Any], kind: str) -> bool:
    return result.get("total") == 3.0 and result["kinds"] == [kind]


@pytest.mark.parametrize(("one", "other"), [("preserving", "rst"), ("random", "random")])
def test_ranks_that_wait_join_again(one: Nat, other: Nat) -> None:
    with build(*sites_of(one, other)) as lab, closing(start_rank(lab, 0)) as first:
        lab.has_logged("joined")
        restart(lab)
        with closing(start_rank(lab, 1)) as second:
            kind = "direct" if one == "preserving" else "relay"
            for each in (first, second):
                result = each.ends()
                assert fine(result, kind), result


def _well_after_a_restart(one: Nat, other: Nat, stage: str, kind: str) -> None:
    with build(*sites_of(one, other)) as lab, ranks(lab, stage) as both:
        for rank in both:
            rank.comes_to(stage)
        restart(lab)
        for rank in both:
            rank.go()
        for rank in both:
            result = rank.ends()
            assert fine(result, kind), result


@pytest.mark.parametrize(
    ("one", "other", "kind"), [("preserving", "double", "direct"), ("random", "random", "relay")]
)
def test_ranks_that_have_no_links_yet_make_them_at_the_next_server(
    one: Nat, other: Nat, kind: str
) -> None:
    _well_after_a_restart(one, other, "joined", kind)


def _lost_without_a_server(one: Nat, other: Nat, stage: str) -> None:
    with build(*sites_of(one, other)) as lab, ranks(lab, stage) as both:
        for rank in both:
            rank.comes_to(stage)
        lab.kill_server()
        for rank in both:
            rank.go()
        for rank in both:
            lost(rank.ends())


def test_ranks_that_have_no_links_yet_wait_so_long_for_a_server() -> None:
    _lost_without_a_server("preserving", "double", "joined")


def test_a_punch_that_was_told_comes_about_without_the_server() -> None:
    with build(*sites_of("preserving", "double")) as lab, ranks(lab, "told") as both:
        for rank in both:
            rank.comes_to("told")
        lab.kill_server()
        for rank in both:
            rank.go()
        for rank in both:
            result = rank.ends()
            assert fine(result, "direct"), result
            assert result["took"] < SOON


@pytest.mark.parametrize("back", [True, False])
def test_a_pair_that_needs_the_relay_waits_for_the_next_server(back: bool) -> None:
    with build(*sites_of("random", "random")) as lab, ranks(lab, "told") as both:
        for rank in both:
            rank.comes_to("told")
        lab.kill_server()
        if back:
            lab.start_server()
        for rank in both:
            rank.go()
        if back:
            # They are told a second time, by the next server.
            for rank in both:
                rank.comes_to("told")
                rank.go()
        for rank in both:
            result = rank.ends()
            if back:
                assert fine(result, "relay"), result
            else:
                lost(result)


def test_a_rank_that_was_not_told_any_more_asks_the_next_server() -> None:
    with build(*sites_of("preserving", "preserving")) as lab, ranks(lab, "told") as both:
        for rank in both:
            rank.comes_to("told")
        lab.kill_server()
        both[0].go()
        both[1].go("deaf")
        lab.start_server()
        for rank in both:
            rank.comes_to("told")
            rank.go()
        for rank in both:
            result = rank.ends()
            # The pauses of this test, one rank after the other, are long enough for the relay.
            assert any(fine(result, kind) for kind in ("direct", "relay")), result


def test_direct_links_live_on() -> None:
    _well_after_a_restart("preserving", "rst", "linked", "direct")


def test_relayed_links_on_which_nothing_was_lost_are_made_anew() -> None:
    _well_after_a_restart("random", "random", "linked", "relay")


def test_relayed_links_end_when_no_server_comes_and_no_rank_is_blamed() -> None:
    _lost_without_a_server("random", "random", "linked")
