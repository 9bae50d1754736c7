"""A job of 64 ranks behind eight NATs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.net.lab import ROOT, Lab, Nat, Site, build

pytestmark = pytest.mark.full

HOSTS = 8
KINDS: list[Nat] = [
    "preserving",
    "preserving",
    "double",
    "double",
    "rst",
    "stack",
    "random",
    "random",
]
SIZE = HOSTS * len(KINDS)


def crowd(lab: Lab) -> list[dict[str, Any]]:
    namespaces = [host.namespace for host in lab.hosts]
    command = [sys.executable, "-m", "tests.net.crowd", lab.server, *namespaces]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=50)
    assert result.returncode == 0, "a rank crashed; its traceback is above"
    return sorted(map(json.loads, result.stdout.splitlines()), key=lambda each: each["rank"])


def needed(rank: int) -> set[int]:
    """A dissemination barrier's peers; those of recursive doubling and binomial trees are among
    them."""
    return {(rank + sign * 2**k) % SIZE for k in range(SIZE.bit_length() - 1) for sign in (1, -1)}


def possible(one: int, other: int) -> set[str]:
    one, other = one // HOSTS, other // HOSTS
    if one == other:
        return {"direct"}
    if "random" in (KINDS[one], KINDS[other]):
        return {"relay"}
    refuse = {KINDS[one], KINDS[other]} & {"rst", "stack"}
    return {"direct", "relay"} if refuse else {"direct"}


def test_64_ranks_behind_8_nats_make_the_links_they_need() -> None:
    with build(*(Site(kind, hosts=HOSTS) for kind in KINDS)) as lab:
        ranks = crowd(lab)
    assert [each["rank"] for each in ranks] == list(range(SIZE))
    assert {each["total"] for each in ranks} == {sum(range(SIZE))}
    assert ranks[0]["parts"] == list(range(SIZE))
    for each in ranks:
        links = {int(peer): kind for peer, kind in each["links"].items()}
        assert set(links) == needed(each["rank"])
        assert all(kind in possible(each["rank"], peer) for peer, kind in links.items())
