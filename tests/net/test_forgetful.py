"""NATs that forget idle connections: the kernel's keepalive holds them, down to some seconds."""

from __future__ import annotations

import time

import pytest

from fmi_client.protocol.rendezvous import KEEPALIVE
from tests.net.lab import Site, build, counters
from tests.net.play import ranks

pytestmark = pytest.mark.full


def test_idle_links_and_lines_to_the_server_are_held() -> None:
    """The link across the NATs is used again; new ones inside need the server's word."""
    memory = KEEPALIVE["TCP_KEEPIDLE"] + 1
    sites = [Site("preserving", hosts=2, memory=memory) for _ in range(2)]
    with build(*sites) as lab, ranks(lab, "linked") as all_ranks:
        for rank in all_ranks:
            rank.comes_to("linked")
        time.sleep(memory + 1)  # they compute; nothing but time can show that this is harmless
        for rank in all_ranks:
            rank.go()
        for rank in all_ranks:
            result = rank.ends()
            assert result.get("total") == 10, result
        for router in lab.routers:
            assert counters(router.namespace)["forgotten"] == 0


def test_a_link_that_was_forgotten_is_an_error_in_time() -> None:
    memory = 3
    sites = [Site("preserving", memory=memory) for _ in range(2)]
    with build(*sites) as lab, ranks(lab, "linked") as both:
        for rank in both:
            rank.comes_to("linked")
        time.sleep(memory + 1)
        for rank in both:
            rank.go("1.5")
        for number, rank in enumerate(both):
            result = rank.ends()
            assert result["error"] == "CollectiveTimeout", result
            assert f"no answer from rank {1 - number} within 1.5 s" in result["why"]
            assert result["took"] < 3
        assert counters(lab.routers[0].namespace)["forgotten"] > 0
