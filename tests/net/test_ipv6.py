"""Ranks with IPv4, IPv6 or both: who links to whom, how, and how soon."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.net.dual import Family, build_dual
from tests.net.lab import Host, Nat, Site, counters
from tests.net.play import Try, play
from tests.net.test_nat import TRIES, soon

pytestmark = pytest.mark.full


def tried(*sites: tuple[Site, Family], delay: float = 0.0) -> list[Try]:
    with build_dual(*sites, delay=delay) as lab:
        done = play(lab, TRIES)
    assert len(done) == TRIES
    return done


def call(host: Host, address: str) -> str:
    """Try to connect to a port where nobody listens; returns the error's name."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], 40000), 0.3)"
    command = host.command(sys.executable, "-c", code, address)
    result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return result.stderr.splitlines()[-1].partition(":")[0]


@pytest.mark.parametrize(
    ("nat", "answer"),
    [
        ("none", "ConnectionRefusedError"),
        ("preserving", "TimeoutError"),
        ("rst", "ConnectionRefusedError"),
        ("stack", "PermissionError"),
    ],
)
def test_the_lab_has_what_it_says(nat: Nat, answer: str) -> None:
    sites: list[tuple[Site, Family]] = [
        (Site(nat), "v6"),
        (Site("none"), "v6"),
        (Site("none"), "v4"),
    ]
    # Without a delay a report comes while the kernel still sends, and is not taken for final.
    with build_dual(*sites, delay=0.005) as lab:
        inside, outside, other = lab.hosts
        at = "2001:db8:1:0::2" if nat == "none" else "2001:db8:1:1::2"
        assert call(outside, at) == answer
        if nat != "none":
            assert counters(lab.routers[0].namespace)["unasked6"] > 0
        assert call(inside, "2001:db8:2:0::2") == "ConnectionRefusedError"  # it gets out
        assert call(inside, other.address) == "OSError"  # no route
        assert call(other, "2001:db8:2:0::2") == "OSError"


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        ("v4", "v6", "relay"),
        ("both", "v6", "direct"),
        ("both", "v4", "direct"),
        ("both", "both", "direct"),
        ("v6", "v6", "direct"),
    ],
)
@pytest.mark.parametrize("nat", ["none", "preserving"])
def test_ranks_meet_over_what_both_have(nat: Nat, one: Family, other: Family, kind: str) -> None:
    done = tried((Site(nat), one), (Site(nat), other))
    assert {each.kind for each in done} == {kind}, done
    assert soon(done), done


@pytest.mark.parametrize("nat", ["rst", "stack"])
@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_firewalls_that_refuse(nat: Nat, delay: float) -> None:
    """With a reset, or with "administratively prohibited"."""
    done = tried((Site(nat), "v6"), (Site(nat), "v6"), delay=delay)
    # As for IPv4, the relay is there first now and then.
    assert [each.kind for each in done].count("direct") >= TRIES - 1, done
    assert soon(done), done


def test_ipv6_makes_up_for_symmetric_nats() -> None:
    done = tried((Site("random"), "both"), (Site("random"), "both"))
    assert {each.kind for each in done} == {"direct"}, done
    assert soon(done), done


def test_one_job_of_all_three() -> None:
    """Each rank has another kind of link with each of the others."""
    sites: list[tuple[Site, Family]] = [
        (Site("preserving"), "v4"),
        (Site("preserving"), "both"),
        (Site("preserving"), "v6"),
    ]
    done = tried(*sites)
    assert soon(done), done
    for each in done:
        family = {str(record["rank"]): sites[seat][1] for seat, record in enumerate(each.records)}
        kinds = {
            (family[str(record["rank"])], family[peer]): kind
            for record in each.records
            for peer, kind in record["kinds"].items()
        }
        assert len(kinds) == 6
        relayed = {pair for pair, kind in kinds.items() if kind == "relay"}
        assert relayed == {("v4", "v6"), ("v6", "v4")}
