"""A check behind real NATs: it tells which they are, and what becomes of links."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest

from tests.net.lab import ROOT, Host, Lab, Nat, Site, build
from tests.net.play import sites_of

pytestmark = pytest.mark.full

Report = dict[str, Any]


def start(host: Host, server: str, *words: str) -> subprocess.Popen[str]:
    cosmic = (sys.executable, "-m", "workflow")
    command = host.command(*cosmic, "check", server, "--json", *words)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def checked(lab: Lab, *words: str) -> list[Report]:
    """Run a check on each host; with more than one, as the ranks of a job."""
    lab.has_logged("listening")  # ranks come back until it does, but a check tells what it finds
    size = len(lab.hosts)
    job = ["--job", "try", "--size", str(size)] if size > 1 else []
    with ExitStack() as stack:
        running = []
        for rank, host in enumerate(lab.hosts):
            place = ["--rank", str(rank)] if job else []
            process = stack.enter_context(start(host, lab.server, *job, *place, *words))
            stack.callback(process.kill)
            running.append(process)
        return [json.loads(each.communicate(timeout=40)[0]) for each in running]


@pytest.mark.parametrize(
    ("kind", "nat"),
    [
        ("none", "none"),
        ("preserving", "preserving"),
        ("rst", "preserving"),
        ("double", "preserving"),
        ("random", "symmetric"),
    ],
)
def test_which_nat(kind: Nat, nat: str) -> None:
    with build(Site(kind)) as lab:
        (report,) = checked(lab)
        assert report["ok"], report
        assert report["nat"] == nat
        assert report["observed"][0] == lab.routers[0].address
        assert report["local"][0] == lab.hosts[0].address


def test_one_server_port_cannot_tell_what_kind_of_change() -> None:
    with build(Site("random")) as lab:
        (report,) = checked(lab, "--admin-port", "9")
    assert report["ok"]
    assert report["nat"] == "changed"


@pytest.mark.parametrize(("kind", "link"), [("preserving", "direct"), ("random", "relay")])
def test_what_becomes_of_links(kind: Nat, link: str) -> None:
    with build(*sites_of(kind, kind), delay=0.01) as lab:
        reports = checked(lab)
    for report in reports:
        assert report["ok"], report
        (found,) = report["links"]
        assert found["kind"] == link
        # Ten milliseconds to the server and ten to the peer; by way of the server, both.
        assert found["round_trip_seconds"] > (0.04 if link == "relay" else 0.02)
        assert found["send_bytes_per_second"] > 1e5
