"""The lab itself: its NATs do what they are named after, and nothing stays behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.net import lab as laboratory
from tests.net.lab import KINDS, ROOT, Host, Nat, Site, build, counters

pytestmark = pytest.mark.full

PORT = 40000
NATS = [kind for kind in KINDS if kind != "none"]


def call(host: Host, address: tuple[str, int], seconds: float = 5) -> socket.socket:
    """Connect from PORT; the caller closes."""
    sock = host.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.settimeout(seconds)
    try:
        sock.bind(("", PORT))
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def observed(host: Host, at: Host) -> tuple[str, int]:
    """Return the address under which `host` is seen by another."""
    with at.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        with call(host, (at.address, listener.getsockname()[1])):
            sock, (address, port) = listener.accept()
            sock.close()
    return str(address), int(port)


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_is_seen_under_its_public_address(kind: Nat) -> None:
    with build(Site(kind), Site("none")) as lab:
        address, port = observed(lab.hosts[0], lab.hosts[1])
        assert address == lab.routers[0].address
        assert (port == PORT) is (kind != "random")


def test_a_random_nat_has_another_port_for_each_destination() -> None:
    with build(Site("random"), Site("none"), Site("none")) as lab:
        ports = {observed(lab.hosts[0], other)[1] for other in lab.hosts[1:]}
        assert len(ports) == 2


@pytest.mark.parametrize("kind", NATS)
def test_nobody_gets_in_unasked(kind: Nat) -> None:
    with build(Site(kind), Site("none")) as lab:
        refuses = kind in ("rst", "stack")
        expected = ConnectionRefusedError if refuses else TimeoutError
        with pytest.raises(expected):
            call(lab.hosts[1], (lab.routers[0].address, PORT), seconds=0.2)
        assert counters(lab.routers[0].namespace)["unasked"] == 1


@pytest.mark.parametrize("kind", NATS)
def test_no_hairpin(kind: Nat) -> None:
    """Hosts behind one router do not reach each other at its public address."""
    with build(Site(kind, hosts=2), Site("none")) as lab:
        inside, neighbour, outside = lab.hosts
        with inside.socket() as mapped, outside.socket() as server:
            server.bind(("", PORT))
            server.listen()
            mapped.bind(("", PORT))
            mapped.connect((outside.address, PORT))
            with pytest.raises((ConnectionRefusedError, TimeoutError)):
                call(neighbour, (lab.routers[0].address, PORT), seconds=0.2)


def test_hosts_of_one_site_meet_inside_and_sites_overlap() -> None:
    with build(Site("random", hosts=2), Site("double", hosts=2)) as lab:
        one, two, other, another = lab.hosts
        assert (one.address, two.address) == (other.address, another.address)
        assert observed(one, two) == (one.address, PORT)
        assert observed(other, another) == (other.address, PORT)


def test_packets_take_their_time() -> None:
    with build(Site("preserving"), Site("none"), delay=0.05) as lab:
        start = time.monotonic()
        assert observed(*lab.hosts)[0] == lab.routers[0].address
        assert time.monotonic() - start >= 0.1


def namespaces(pid: int) -> set[str]:
    """Return those of one process: another may have a lab of its own at the same time."""
    return {each.name for each in Path("/run/netns").glob(f"{laboratory.PREFIX}{pid}-*")}


def test_what_a_crash_left_behind_is_removed_with_who_runs_in_it() -> None:
    crash = """
import os, subprocess, sys
from tests.net.lab import Site, build
with build(Site("double", hosts=2)) as lab:
    words = ["ip", "netns", "exec", lab.hosts[0].namespace, "sleep", "600"]
    subprocess.Popen(words, stdout=subprocess.DEVNULL, pass_fds=[int(sys.argv[1])])
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), 9)
"""
    alive, held = os.pipe()
    command = [sys.executable, "-c", crash, str(held)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, pass_fds=[held])
    os.close(held)
    assert result.returncode == -signal.SIGKILL
    with build(Site("none")) as lab:
        assert not namespaces(int(result.stdout))
        assert set(lab.namespaces) == namespaces(os.getpid())
    assert not namespaces(os.getpid())
    assert select.select([alive], [], [], 5)[0], "it lives on"
    os.close(alive)


def test_a_lab_that_cannot_be_built_leaves_nothing() -> None:
    with (
        pytest.raises(laboratory.LabError, match=r"10\.0\.999"),
        build(Site("rst", lan="10.0.999")),
    ):
        pytest.fail("built")
    assert not namespaces(os.getpid())
