"""How good a link is: round trip and rate, measured by both of its ranks together."""

from __future__ import annotations

import os
import statistics
import time

from fmi_client.findings import LinkFound
from fmi_client.sync import Communicator

PINGS = 50
PING_SECONDS = 1.0
"""A link with a long round trip gets fewer pings."""

FIRST_BYTES, MOST_BYTES = 64 * 1024, 16 * 1024 * 1024
ENOUGH_SECONDS = 0.15
"""A transfer that took so long says what the link can do; shorter ones are repeated with four
times the bytes, so that a direction takes a second at most unless the link is very slow."""

_END = b""


def measure(comm: Communicator, peer: int) -> LinkFound:
    """Measure the link with `peer`, who must call this at the same time.

    Returns:
        What both ranks found; each sees its own side of it.

    Raises:
        FmiError: the link, or the job, broke.
    """
    first = comm.rank < peer
    round_trip = _round_trip(comm, peer, first)
    rates = [_rate(comm, peer, lead, round_trip) for lead in (first, not first)]
    kind = str(comm.stats()["links"][peer]["kind"])
    out, back = rates if first else reversed(rates)
    return LinkFound(peer, kind, round_trip, out, back)


def _round_trip(comm: Communicator, peer: int, lead: bool) -> float:
    if not lead:
        while comm.recv(peer) != _END:
            comm.send(bytes(8), peer)
        return float(comm.recv(peer))
    times: list[float] = []
    end = time.perf_counter() + PING_SECONDS
    while not times or (len(times) < PINGS and time.perf_counter() < end):
        times.append(_timed(comm, peer, bytes(8)))
    return _told(comm, peer, statistics.median(times))


def _rate(comm: Communicator, peer: int, lead: bool, round_trip: float) -> float:
    """Return the rate from the rank that leads to the other, in bytes per second."""
    if not lead:
        while comm.recv(peer) != _END:
            comm.send(bytes(8), peer)
        return float(comm.recv(peer))
    # Not zeros: what compresses on its way (a VPN) should not gain by it.
    block = os.urandom(FIRST_BYTES) * (MOST_BYTES // FIRST_BYTES)
    nbytes, took = FIRST_BYTES, _timed(comm, peer, block[:FIRST_BYTES])
    while took < ENOUGH_SECONDS and nbytes < MOST_BYTES:
        nbytes *= 4
        took = _timed(comm, peer, block[:nbytes])
    # The answer's way back is no part of the transfer.
    return _told(comm, peer, nbytes / max(took - round_trip / 2, took / 2))


def _timed(comm: Communicator, peer: int, data: bytes) -> float:
    start = time.perf_counter()
    comm.send(data, peer)
    comm.recv(peer)
    return time.perf_counter() - start


def _told(comm: Communicator, peer: int, found: float) -> float:
    comm.send(_END, peer)
    comm.send(found, peer)
    return found
