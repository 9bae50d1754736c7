"""Passing on bytes between two ranks that cannot reach each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import structlog

from fmi_client.protocol.relay import RELAY_GO
from rendezvous_server.jobs import Job, RelayPair
from rendezvous_server.tickets import TICKET_SECONDS

log = structlog.get_logger()

BUFFER_BYTES = 128 * 1024
"""What one read takes, and all that waits where a receiver stalls: a pair costs twice this."""


class Traffic:
    """What is relayed, and what was since the start.

    Args:
        may_pass: told how many bytes of a job are to be passed on; whether they may be.
    """

    def __init__(self, may_pass: Callable[[Job, int], bool]) -> None:
        self.may_pass = may_pass
        self.legs: set[Leg] = set()
        self.pairs = 0
        self.bytes = 0

    def now(self) -> Iterator[tuple[RelayPair, int]]:
        """Pairs that have met here, each with the bytes passed on between them."""
        seen: set[RelayPair] = set()
        for leg in self.legs:
            if leg.meets and leg.pair not in seen:
                seen.add(leg.pair)
                yield leg.pair, leg.passed_between

    def cut(self, job: Job) -> None:
        """End all legs of a job."""
        for leg in list(self.legs):
            if leg.pair.job is job:
                leg.abort()

    def forget(self, job: Job) -> None:
        """A job is over: nobody will come any more to legs that wait alone."""
        for leg in list(self.legs):
            if leg.pair.job is job and leg.waiting:
                leg.abort()


class Leg(asyncio.BufferedProtocol):
    """One of the two connections of a relayed pair; takes over from `Connection`.

    Args:
        traffic: where it counts itself and its bytes.
    """

    def __init__(self, transport: asyncio.Transport, pair: RelayPair, traffic: Traffic) -> None:
        self._transport = transport
        self.pair = pair
        self._traffic = traffic
        traffic.legs.add(self)
        self._peer: Leg | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self.passed = 0
        loop = asyncio.get_running_loop()
        self._patience: asyncio.TimerHandle | None = loop.call_later(
            TICKET_SECONDS, transport.abort
        )
        # Bytes are written from where they were read: `pause_writing` must come as soon as any
        # of them has to wait, so that the next read does not overwrite it.
        transport.set_write_buffer_limits(high=0)
        transport.pause_reading()

    def begin(self) -> None:
        """Meet the other leg of the pair, or wait for it."""
        first = self.pair.first
        if isinstance(first, Leg) and first.waiting:
            self._meet(first)
        else:
            self.pair.first = self

    def _meet(self, first: Leg) -> None:
        for leg, peer in ((self, first), (first, self)):
            leg._peer = peer
            if leg._patience is not None:
                leg._patience.cancel()
            leg._transport.write(RELAY_GO)
            leg._transport.resume_reading()
        self._traffic.pairs += 1
        self.pair.job.relayed += 1
        log.info("relaying", job=self.pair.job.name, ranks=self.pair.ranks)

    @property
    def meets(self) -> bool:
        """Whether its peer is here, or was."""
        return self._peer is not None

    @property
    def passed_between(self) -> int:
        """Bytes passed on, both ways."""
        return self.passed + (self._peer.passed if self._peer is not None else 0)

    @property
    def waiting(self) -> bool:
        """Whether it is here, alone."""
        return self._peer is None and not self._transport.is_closing()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._peer is not None and self._traffic.may_pass(self.pair.job, nbytes):
            self.passed += nbytes
            self._traffic.bytes += nbytes
            self._peer._transport.write(self._buffer[:nbytes])

    def pause_writing(self) -> None:
        """This side does not keep up: stop reading from the other."""
        if self._peer is not None:
            self._peer._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._peer is not None and not self._peer._transport.is_closing():
            self._peer._transport.resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._traffic.legs.discard(self)
        self.pair.release()
        # Two legs refer to each other: what they hold would wait for the garbage collector, which
        # counts objects and not their bytes. What is still to be written has its own reference.
        self._buffer = memoryview(b"")
        if self._patience is not None:
            self._patience.cancel()
        if self._peer is None:
            return
        if not self._peer._transport.is_closing():
            log.info(
                "relay ended",
                job=self.pair.job.name,
                ranks=self.pair.ranks,
                bytes=self.passed_between,
            )
        self._peer._transport.close()  # after what is still to be written
