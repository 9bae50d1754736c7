"""FMI's hints: "fast" and "cheap" choose a job's channel by predicted time and price.

As in Copik, Böhringer, Calotoiu, Hoefler 2023, "FMI: Fast and Cheap Message Passing for Serverless
Functions", but once for a job, not for each operation. The choice depends on arguments only, which
are the same on all ranks, never on what a rank measures: all must choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from fmi_client.cost_model import Model

HINTS = ("fast", "cheap")


@dataclass(frozen=True, slots=True)
class Prices:
    """AWS's list prices in US dollars: us-east-1, x86, without free tier or savings plan.

    Those of workflow/prices.toml, which says when and where each was read: not from AWS, but from
    copies of its lists.
    """

    gb_second: float = 0.0000166667  # Lambda; "GB" are 1,024 MB
    put: float = 0.005 / 1000  # S3 Standard; LIST, too; DELETE is free
    get: float = 0.0004 / 1000
    vcpu_hour: float = 0.04048  # Fargate
    gb_hour: float = 0.004445  # Fargate
    ipv4_hour: float = 0.005  # a public address

    @property
    def message(self) -> float:
        """One message on the object channel: a PUT, and about three GET (measured)."""
        return self.put + 3 * self.get

    @property
    def server_hour(self) -> float:
        """A server in Fargate's smallest size, 0.25 vCPU and 0.5 GB, with a public address."""
        return 0.25 * self.vcpu_hour + 0.5 * self.gb_hour + self.ipv4_hour


PRICES = Prices()

MODELS: Mapping[str, Model] = MappingProxyType(
    {"auto": Model(0.00034, 400e6, 5e9), "object": Model(0.05, 50e6, 5e9)}
)
"""What is expected on Lambda; not measured there by us. "auto" is as FMI's authors configure their
direct channel (spcl/fmi, config/fmi_test.json), without a relay; "object" is their S3, whose 40 ms
are 50 with the wait for our next look. The reduction is a cautious guess."""

WORK = (("barrier", 0, 1), ("allreduce", 1024, 1), ("gather", 100_000, 1))
"""The operations of a job that infers: it starts together, adds up metrics, collects results."""

SECONDS = 60.0
"""How long such a job computes."""

MEMORY_MB = 1769
"""What Lambda gives one vCPU for."""


class Prediction(NamedTuple):
    """What the communication of a job takes on one channel, and costs in US dollars."""

    seconds: float
    dollars: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen channel and why; ``print`` shows it as a table. `connect` takes it as `channel=`."""

    hint: str
    size: int
    channel: str
    """One of `predictions`: "auto" (through the server) or "object"."""
    predictions: Mapping[str, Prediction]

    def __str__(self) -> str:
        lines = [f"{self.hint}, {self.size} ranks".ljust(20) + "   seconds  US dollars"]
        for name, (seconds, dollars) in self.predictions.items():
            mark = "  <- chosen" if name == self.channel else ""
            lines.append(f"{name:20}{seconds:10.4f}{dollars:12.6f}{mark}")
        return "\n".join(lines)


def choose(
    hint: str,
    *,
    size: int,
    work: Sequence[tuple[str, int, int]] = WORK,
    seconds: float = SECONDS,
    channels: Sequence[str] = tuple(MODELS),
    models: Mapping[str, Model] = MODELS,
    prices: Prices = PRICES,
    memory_mb: int = MEMORY_MB,
) -> Choice:
    """Choose the channel on which a job's communication is fastest, or cheapest.

    Give the same arguments on all ranks, so no model that a rank has measured alone (that of
    `calibrate` is the same everywhere).

    Args:
        hint: "fast" (fewest seconds) or "cheap" (fewest dollars); the first channel where equal.
        size: number of ranks.
        work: (operation, bytes, how often) as `Model.seconds` understands them.
        seconds: how long the job runs beside its communication; the server is paid meanwhile.
        channels: what there is: "auto" (a server), "object" (a store), or both.
        models: latency and bandwidth of each channel.
        prices: of ranks, requests and the server. ``Prices(vcpu_hour=0, gb_hour=0, ipv4_hour=0)``
            is a server that runs anyway.
        memory_mb: what each rank's function is given.

    Returns:
        the channel and the prediction for each. Dollars are those of the ranks' time in
        operations, of requests, and of the server; not of the computation, which costs the same.

    Raises:
        ValueError: an argument is wrong; the text names it.
    """
    if hint not in HINTS:
        raise ValueError(f"hint={hint!r} is none of {', '.join(HINTS)}")
    if size < 1 or not 0 <= seconds < math.inf:
        raise ValueError(f"size={size}, seconds={seconds}: 1 rank and 0 seconds are the least")
    if not channels or not models.keys() >= set(channels):
        raise ValueError(f"channels={channels!r}: one or more of {', '.join(models)}")
    rank_second = memory_mb / 1024 * prices.gb_second

    def predict(name: str) -> Prediction:
        model, message = models[name], prices.message if name == "object" else 0.0
        taken = sum(count * model.seconds(op, n, size) for op, n, count in work)
        dollars = sum(
            count * model.price(op, n, size, rank_second=rank_second, message=message)
            for op, n, count in work
        )
        server = 0.0 if name == "object" else (seconds + taken) / 3600 * prices.server_hour
        return Prediction(taken, dollars + server)

    found = {name: predict(name) for name in channels}
    least = min(found, key=lambda name: found[name][HINTS.index(hint)])
    return Choice(hint, size, least, MappingProxyType(found))


def settle(
    channel: str | Choice, server: str | None, store: str | None, size: int
) -> tuple[str, str | None, str | None]:
    """Return channel, server and store with a hint replaced by what it chooses.

    Raises:
        ValueError: there is nothing to choose from.
    """
    if isinstance(channel, str):
        if channel not in HINTS:
            return channel, server, store
        places = {"auto": server, "object": store}
        offered = [name for name, place in places.items() if place is not None]
        if not offered:
            raise ValueError(f"channel={channel!r} needs a server, a store, or both")
        channel = choose(channel, size=size, channels=offered)
    if channel.channel == "object":
        return "object", None, store
    return channel.channel, server, None
