"""Where ranks may be reached, and which pairs may hope for a direct connection. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fmi_client.protocol.addresses import Address, Version, is_global, version


@dataclass(frozen=True, slots=True)
class Reach:
    """How a rank may be reached over one version of IP."""

    seen: Address | None
    """As we see it; None where it came to us over the other version."""
    own: tuple[Address, ...]
    """As it sees itself."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(dict.fromkeys((self.seen, *self.own) if self.seen else self.own))

    @property
    def public(self) -> bool:
        """Whether no NAT is between it and others."""
        return len(self.addresses) == 1 and (self.seen is not None or is_global(self.own[0]))

    @property
    def hidden(self) -> bool:
        """Whether nobody knows from which port its next connection comes.

        Its NAT changes ports, or we have never seen what it makes of them.
        """
        if self.seen is None:
            return not self.public
        return len({port for _, port in self.addresses}) > 1


def sort_addresses(observed: Address, own: Iterable[Address]) -> dict[Version, Reach]:
    """Sort a rank's addresses.

    What translates IPv6 for it, a NAT64 or a load balancer, is seen by us, but leads nowhere: the
    versions that it has are those of its own addresses.
    """
    by_version: dict[Version, list[Address]] = {}
    for address in own:
        by_version.setdefault(version(address), []).append(address)
    return {
        each: Reach(observed if version(observed) == each else None, tuple(addresses))
        for each, addresses in by_version.items()
    }


def can_punch(one: Reach, other: Reach) -> bool:
    """Whether there is hope for a direct connection over their version of IP."""
    if one.public or other.public or not (one.hidden or other.hidden):
        return True
    # Two behind one NAT can still meet on its inside.
    return one.seen is not None and other.seen is not None and one.seen[0] == other.seen[0]
