"""Hosts behind NATs, each in a Linux network namespace of its own.

A lab is described by its sites, and every packet stays inside its namespaces::

    with build(Site("preserving", hosts=2), Site("none")) as lab:
        lab.hosts       # three of them, in this order
        lab.server      # "203.0.113.2:10000", where a rendezvous server runs

The internet is one router ("core"), so that there is a hop between any two sites. A site
is a host with a public address (NAT kind "none") or a private network behind a router.
All private networks use the same addresses unless told otherwise, as they do in life.

Namespaces are named after the process that made them; what a crashed one left behind is
removed by the next.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from tests.support import wait_for

ROOT = Path(__file__).parents[2]

Nat = Literal["none", "preserving", "rst", "stack", "random", "double"]
"""How a site is connected.

none        a public address, nothing in between
preserving  masquerade that keeps the port; connections nobody asked for are dropped
rst         the same, but they are refused with a reset
stack       the same without a filter: the router's own TCP refuses them
random      masquerade with a random port for every connection: a symmetric NAT
double      two routers of the kind "preserving" behind each other
"""

KINDS: tuple[Nat, ...] = get_args(Nat)

PREFIX = "fmilab-"
SERVER_PORT, ADMIN_PORT = 10000, 10001
CLONE_NEWNET = 0x40000000

_RULES = """
table ip lab {{
  counter mapped {{ }}
  counter unasked {{ }}
  chain out {{
    type nat hook postrouting priority srcnat
    oifname "wan" counter name mapped masquerade {flags}
  }}
  chain in {{
    type filter hook input priority filter
    meta l4proto tcp ct state new counter name unasked {verdict}
  }}
}}
"""
# What the counters count: connections that got a mapping, and SYNs that had none.

_FORGET = """
table ip lab {
  counter forgotten { }
  chain pass {
    type filter hook forward priority filter
    ct state invalid counter name forgotten drop
  }
}
"""

_HOLE = """
table ip hole {{
  counter hole {{ }}
  chain pass {{
    type filter hook forward priority filter
    ip saddr {server} accept
    ip daddr {server} accept
    meta l4proto tcp counter name hole drop
  }}
}}
"""

_CUT = """
table ip cut {{ }}
delete table ip cut
table ip cut {{
  counter cut {{ }}
  chain pass {{
    type filter hook forward priority filter
    ip saddr {server} accept
    ip daddr {server} accept
    tcp flags & rst == rst accept
    ct bytes > {nbytes} limit rate 1/day burst 1 packets counter name cut reject with tcp reset
  }}
}}
"""

_FLAGS: dict[Nat, str] = {"random": "random,fully-random"}
_VERDICTS: dict[Nat, str] = {"rst": "reject with tcp reset", "stack": "accept"}

_libc = ctypes.CDLL(None, use_errno=True)
_serial = count()


@dataclass(frozen=True, slots=True)
class Site:
    """A network at the edge of the internet.

    Attributes:
        nat: how it is connected.
        hosts: how many hosts it has; a public site has one.
        lan: first three numbers of the private network's addresses.
        memory: seconds after which its router forgets a connection that is idle, and drops what
            still comes of it; None: days, as is the kernel's default.
    """

    nat: Nat
    hosts: int = 1
    lan: str = "10.0.0"
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Host:
    namespace: str
    address: str
    """The one it knows itself."""

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs `words` on this host, until we die."""
        dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
        return ["ip", "netns", "exec", self.namespace, *dies_with_us, *words]

    def socket(self) -> socket.socket:
        """Return a TCP socket of this host for the calling process to use."""
        with inside(self.namespace):
            sock = socket.socket()
        sock.settimeout(5)
        return sock


@dataclass(slots=True)
class Lab:
    hosts: list[Host] = field(default_factory=list)
    routers: list[Host] = field(default_factory=list)
    """The outermost router of each site (a public host itself), in order; address: its public."""
    server: str = ""
    log: Path = Path(os.devnull)
    """What the rendezvous server said."""
    namespaces: list[str] = field(default_factory=list)
    prefix: str = field(default_factory=lambda: f"{PREFIX}{os.getpid()}-{next(_serial)}-")
    _blocks: Iterator[int] = field(default_factory=count)
    _running: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        """Run the rendezvous server; ranks come back until it listens."""
        options = ["--allow-anonymous", "--port", str(SERVER_PORT), "--admin-port", str(ADMIN_PORT)]
        host = Host(self.prefix + "server", "")
        command = host.command(sys.executable, "-m", "rendezvous_server", *options)
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def kill_server(self) -> None:
        """End it without a word; harmless if it does not run."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def has_logged(self, word: str) -> None:
        """Wait until the server has said a word; a rank needs not, as it tries until it listens."""
        wait_for(lambda: word in self.log.read_text(), f"{word!r} in the server's log")

    def cut(self, nbytes: int) -> None:
        """Answer one packet with a reset, once a connection has carried so many bytes.

        Its sender believes that the connection has ended; the other side hears nothing.
        """
        core = self.prefix + "core"
        _write(core, "netfilter/nf_conntrack_acct", 1)
        rules = _CUT.format(server=self.server.split(":")[0], nbytes=nbytes)
        _run("ip", "netns", "exec", core, "nft", "-f", "-", text=rules)

    def black_hole(self) -> None:
        """From now on, drop what sites send to each other; the server hears and is heard."""
        rules = _HOLE.format(server=self.server.split(":")[0])
        _run("ip", "netns", "exec", self.prefix + "core", "nft", "-f", "-", text=rules)

    def namespace(self, name: str) -> str:
        full = self.prefix + name
        _run("ip", "netns", "add", full)
        self.namespaces.append(full)
        _run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def uplink(self, namespace: str, network: str = "198.51.100") -> Host:
        """Give a namespace a public address, two hops away from any other."""
        block = 4 * next(self._blocks)
        core, port = self.prefix + "core", f"port{block}"
        _cable(namespace, "wan", core, port)
        _address(core, port, f"{network}.{block + 1}/30")
        _address(namespace, "wan", f"{network}.{block + 2}/30")
        _default(namespace, f"{network}.{block + 1}")
        return Host(namespace, f"{network}.{block + 2}")

    def destroy(self) -> None:
        while self.namespaces:
            _destroy(self.namespaces.pop())


@contextmanager
def build(*sites: Site, delay: float = 0.0) -> Iterator[Lab]:
    """Build a lab of these sites with a rendezvous server, and tear it down.

    Args:
        delay: seconds that a packet takes from one site to another.
    """
    remove_leftovers()
    lab = Lab()
    with ExitStack() as stack:
        stack.callback(lab.destroy)
        _forward(lab.namespace("core"))
        for number, site in enumerate(sites):
            _build_site(lab, site, f"site{number}")
        server = lab.uplink(lab.namespace("server"), "203.0.113")
        lab.server = f"{server.address}:{SERVER_PORT}"
        log = stack.enter_context(tempfile.NamedTemporaryFile(prefix=lab.prefix))
        lab.log = Path(log.name)
        if delay:
            stack.enter_context(_slow_down(lab, delay))
        stack.callback(lab.kill_server)
        lab.start_server()
        yield lab


def _build_site(lab: Lab, site: Site, name: str) -> None:
    if site.nat == "none":
        host = lab.uplink(lab.namespace(name))
        lab.hosts.append(host)
        lab.routers.append(host)
        return
    router = lab.uplink(lab.namespace(name))
    lab.routers.append(router)
    inner = _set_up_router(lab, router.namespace, site, name)
    _build_lan(inner, site.lan)
    for number in range(site.hosts):
        host = Host(lab.namespace(f"{name}-host{number}"), f"{site.lan}.{number + 2}")
        _plug(host, inner, f"host{number}", site.lan)
        lab.hosts.append(host)


def _set_up_router(lab: Lab, outer: str, site: Site, name: str) -> str:
    """Make a router, or two; returns the one at the private network."""
    _masquerade(outer, site.nat)
    if site.memory is not None:
        _forget_after(outer, site.memory)
    if site.nat != "double":
        return outer
    inner = lab.namespace(f"{name}-inner")
    _cable(outer, "inside", inner, "wan")
    _address(outer, "inside", "100.64.0.1/30")
    _address(inner, "wan", "100.64.0.2/30")
    _default(inner, "100.64.0.1")
    _masquerade(inner, site.nat)
    return inner


def _masquerade(namespace: str, nat: Nat) -> None:
    _forward(namespace)
    rules = _RULES.format(flags=_FLAGS.get(nat, ""), verdict=_VERDICTS.get(nat, "drop"))
    _run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=rules)


def _forget_after(namespace: str, seconds: int) -> None:
    """What belongs to no known connection is not one's beginning, and is dropped."""
    _write(namespace, "netfilter/nf_conntrack_tcp_timeout_established", seconds)
    _write(namespace, "netfilter/nf_conntrack_tcp_loose", 0)
    _run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=_FORGET)


def _build_lan(router: str, lan: str) -> None:
    bridge = ("ip", "-n", router, "link", "add", "lan", "type", "bridge", "forward_delay", "0")
    _run(*bridge)
    _address(router, "lan", f"{lan}.1/24")


def _plug(host: Host, router: str, port: str, lan: str) -> None:
    _cable(host.namespace, "eth0", router, port)
    _run("ip", "-n", router, "link", "set", port, "master", "lan", "up")
    _address(host.namespace, "eth0", f"{host.address}/24")
    _default(host.namespace, f"{lan}.1")


@contextmanager
def _slow_down(lab: Lab, seconds: float) -> Iterator[None]:
    """Send what crosses the core through a process that holds it back."""
    core = lab.prefix + "core"
    _run("ip", "-n", core, "tuntap", "add", "dev", "slow", "mode", "tun")
    _run("ip", "-n", core, "link", "set", "slow", "up")
    _run("ip", "-n", core, "route", "add", "default", "dev", "slow", "table", "100")
    rules = ("iif lo lookup main", "iif slow lookup main", "from all lookup 100")
    for preference, rule in enumerate(rules, 10):
        _run("ip", "-n", core, "rule", "add", "pref", str(preference), *rule.split())
    _write(core, "ipv4/conf/all/rp_filter", 0)
    _write(core, "ipv4/conf/slow/rp_filter", 0)
    command = Host(core, "").command(sys.executable, "-m", "tests.net.delay", "slow", str(seconds))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise LabError("the delay process did not start")
            yield
        finally:
            process.kill()


def counters(namespace: str) -> dict[str, int]:
    """Return how many packets each named counter of a router saw."""
    listing = _run("ip", "netns", "exec", namespace, "nft", "-j", "list", "counters")
    found = (entry.get("counter") for entry in json.loads(listing)["nftables"])
    return {each["name"]: each["packets"] for each in found if each}


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let this thread open sockets in another namespace; they stay there."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(home.fileno())


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


# ------------------------------------------------------------------------ leftovers
def remove_leftovers() -> None:
    """Remove the namespaces of processes that are no more."""
    for namespace in leftovers():
        _destroy(namespace)


def leftovers() -> list[str]:
    """Return the namespaces whose maker is dead."""
    path = Path("/run/netns")
    ours = [each.name for each in path.glob(f"{PREFIX}*")] if path.exists() else []
    return [name for name in ours if not _is_alive(int(name.split("-")[1]))]


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _destroy(namespace: str) -> None:
    """Remove a namespace and whoever still runs in it; it may be gone already."""
    with suppress(LabError):
        for pid in _run("ip", "netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", namespace)


# --------------------------------------------------------------------------- tools
class LabError(Exception):
    """A command that builds the lab failed."""


@cache
def why_not() -> str | None:
    """Return why no lab can be built here, or None."""
    if os.geteuid() != 0:
        return "the network lab needs root"
    absent = [tool for tool in ("ip", "nft", "setpriv") if shutil.which(tool) is None]
    if absent:
        packages = "iproute2 nftables util-linux"
        return f"the network lab needs {', '.join(absent)}: apt-get install -y {packages}"
    probe = f"{PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
    except LabError as error:
        return f"the network lab needs network namespaces: {error}"
    try:
        _masquerade(probe, "random")
    except (LabError, OSError) as error:
        return f"the network lab needs nftables in the kernel: {error}"
    finally:
        _destroy(probe)
    return None


def _run(*words: str, text: str | None = None) -> str:
    result = subprocess.run(words, input=text, capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"{' '.join(words)}: {result.stderr.strip()}")
    return result.stdout


def _cable(one: str, port: str, other: str, other_port: str) -> None:
    ends = ["type", "veth", "peer", "name", other_port, "netns", other]
    _run("ip", "link", "add", port, "netns", one, *ends)


def _address(namespace: str, port: str, address: str) -> None:
    _run("ip", "-n", namespace, "address", "add", address, "dev", port)
    _run("ip", "-n", namespace, "link", "set", port, "up")


def _default(namespace: str, gateway: str) -> None:
    _run("ip", "-n", namespace, "route", "add", "default", "via", gateway)


def _forward(namespace: str) -> None:
    _write(namespace, "ipv4/ip_forward", 1)


def _write(namespace: str, name: str, value: int) -> None:
    setting = f"echo {value} > /proc/sys/net/{name}"
    _run("ip", "netns", "exec", namespace, "sh", "-c", setting)
