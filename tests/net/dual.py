"""The lab with IPv6: hosts with addresses of one version or of both.

::

    with build_dual((Site("preserving"), "both"), (Site("none"), "v6")) as lab:
        lab.hosts       # the second has no IPv4
        lab.server      # "rendezvous:10000", a name with an address of each version

IPv6 is routed, not translated. A router that is a NAT for IPv4 is a firewall for IPv6: what
nobody asked for is dropped, or refused where the NAT refuses.

``python -m tests.net.dual [TRIES]`` measures pairs of hosts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.net.lab import SERVER_PORT, Host, Lab, Nat, Site, _run, build
from tests.net.matrix import HEADER, row
from tests.net.play import Summary, play

Family = Literal["v4", "v6", "both"]

NAME = "rendezvous"
SERVER = "2001:db8:ffff:0"

_RULES = """
table ip6 lab {{
  counter unasked6 {{ }}
  chain in {{
    type filter hook forward priority filter
    iifname "wan" meta l4proto tcp ct state new counter name unasked6 {verdict}
  }}
}}
"""
_VERDICTS: dict[Nat, str] = {
    "rst": "reject with tcp reset",
    "stack": "reject with icmpv6 type admin-prohibited",
}

# Addresses of links that are up already would wait a second for a duplicate.
_ENABLE = """
cd /proc/sys/net/ipv6/conf
for each in *; do echo 0 > $each/accept_dad; done
echo 1 > all/disable_ipv6; echo 0 > all/disable_ipv6; echo 1 > all/forwarding
"""


@dataclass(frozen=True, slots=True)
class NamedHost(Host):
    """A host that knows the server by name."""

    names: Path

    def command(self, *words: str) -> list[str]:
        # The mount is seen by this command only: "ip netns exec" gives it a table of its own.
        script = f'mount --bind {self.names} /etc/hosts && exec "$@"'
        return Host.command(self, "sh", "-c", script, "sh", *words)


@contextmanager
def build_dual(*sites: tuple[Site, Family], delay: float = 0.0) -> Iterator[Lab]:
    """Build a lab of these sites; each has IPv4, IPv6 or both."""
    plain = build(*(site for site, _ in sites), delay=delay)
    with plain as lab, tempfile.NamedTemporaryFile("w") as names:
        address = lab.server.rpartition(":")[0]
        names.write(f"127.0.0.1 localhost\n{address} {NAME}\n{SERVER}::2 {NAME}\n")
        names.flush()
        lab.server = f"{NAME}:{SERVER_PORT}"
        _enable(lab.prefix + "core")
        if delay:
            _slow_down(lab.prefix + "core")
        _connect(lab, Host(lab.prefix + "server", address), SERVER)
        hosts = iter(list(lab.hosts))
        lab.hosts.clear()
        for number, (site, family) in enumerate(sites):
            ours = [next(hosts) for _ in range(1 if site.nat == "none" else site.hosts)]
            if family != "v4":
                _add_site(lab, lab.routers[number], ours, site.nat, f"2001:db8:{number + 1:x}")
            if family == "v6":
                for host in ours:
                    _run("ip", "-4", "-n", host.namespace, "address", "flush", "scope", "global")
            lab.hosts += [
                NamedHost(each.namespace, each.address, Path(names.name)) for each in ours
            ]
        yield lab


def _add_site(lab: Lab, router: Host, hosts: list[Host], nat: Nat, prefix: str) -> None:
    _connect(lab, router, f"{prefix}:0")
    if nat == "none":
        return
    rules = _RULES.format(verdict=_VERDICTS.get(nat, "drop"))
    _run("ip", "netns", "exec", router.namespace, "nft", "-f", "-", text=rules)
    lan = f"{prefix}:1"
    _configure(router.namespace, f"address add {lan}::1/64 dev lan nodad")
    _configure(lab.prefix + "core", f"route add {lan}::/64 via {prefix}:0::2")
    for number, host in enumerate(hosts):
        _enable(host.namespace)
        at = f"{lan}::{number + 2:x}"
        _configure(
            host.namespace, f"address add {at}/64 dev eth0 nodad", f"route add default via {lan}::1"
        )


def _connect(lab: Lab, host: Host, prefix: str) -> None:
    """Give a host with a public IPv4 address one of IPv6."""
    core = lab.prefix + "core"
    (route,) = json.loads(_run("ip", "-n", core, "-j", "route", "get", host.address))
    _configure(core, f"address add {prefix}::1/64 dev {route['dev']} nodad")
    _enable(host.namespace)
    _configure(
        host.namespace,
        f"address add {prefix}::2/64 dev wan nodad",
        f"route add default via {prefix}::1",
    )


def _slow_down(core: str) -> None:
    """Send IPv6 through the process that holds IPv4 back; here what the core says, too."""
    _configure(core, "route add default dev slow table 100")
    _configure(core, "rule add pref 10 iif slow lookup main", "rule add pref 11 lookup 100")


def _enable(namespace: str) -> None:
    _run("ip", "netns", "exec", namespace, "sh", "-c", _ENABLE)


def _configure(namespace: str, *commands: str) -> None:
    _run("ip", "-6", "-n", namespace, "-batch", "-", text="\n".join(commands) + "\n")


# ------------------------------------------------------------------------- measurements
PAIRS: tuple[tuple[Family, Family], ...] = (
    ("v4", "v6"),
    ("both", "v4"),
    ("both", "v6"),
    ("both", "both"),
    ("v6", "v6"),
)


def main(tries: int) -> None:
    """Print a Markdown table, as `tests.net.matrix` does for IPv4."""
    print(HEADER, flush=True)
    for nat in ("preserving", "rst", "random"):
        for one, other in PAIRS:
            with build_dual((Site(nat), one), (Site(nat), other)) as lab:
                summary = Summary(play(lab, tries, timeout=30 + 5 * tries))
            print(row(f"{nat}: {one} and {other}", summary), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
