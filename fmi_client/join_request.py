"""What `connect` was asked for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Self

from fmi_client.endpoint import MAX_SECONDS
from fmi_client.errors import JoinTimeout
from fmi_client.hints import HINTS, Choice, settle
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.hello import MAX_JOB_NAME, MAX_SIZE, Hello
from fmi_client.protocol.notice import some_ranks
from fmi_client.protocol.tls import SCHEME
from fmi_client.transport.store import parse_store

NOWHERE = ("", 0)
"""The server of a job that has none."""

CHANNELS = ("auto", "direct", "relay", "object")


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What `connect` was asked for, checked."""

    server: Address
    job: str
    rank: int
    size: int
    epoch: int
    timeout: float
    key: bytes | None = field(repr=False)
    token: auth.Token | None = field(repr=False)
    channel: str = "auto"
    store: str = ""
    tls: bool = False
    """Whether everything is encrypted, to the server and between ranks."""

    @classmethod
    def make(
        cls,
        server: str | None,
        job: str,
        rank: int,
        size: int,
        key: bytes | str | None,
        token: str | None,
        epoch: int,
        timeout: float,
        channel: str | Choice = "auto",
        store: str | None = None,
    ) -> Self:
        """Check the arguments; key and token default to FMI_KEY and FMI_TOKEN.

        Raises:
            ValueError: the text names the argument.
        """
        _check_place(job, rank, size, epoch, timeout)
        channel, server, store = settle(channel, server, store, size)
        _check_channel(channel, server, store)
        key = key if key is not None else os.environ.get("FMI_KEY") or None
        token = token or os.environ.get("FMI_TOKEN") or None
        return cls(
            parse_endpoint(server) if server is not None else NOWHERE,
            job,
            int(rank),
            int(size),
            int(epoch),
            min(float(timeout), MAX_SECONDS),
            auth.parse_key(key),
            auth.Token.parse(token) if token else None,
            channel,
            store or "",
            server is not None and server.startswith(SCHEME),
        )

    def not_all_came(self, missing: list[int]) -> JoinTimeout:
        """Return what to raise when the time was not enough for `missing`; none: unknown ranks."""
        who = f": {some_ranks(missing)}" if missing else ""
        return JoinTimeout(
            f"job {self.job!r}: {len(missing) or 'some'} of {self.size} ranks "
            f"did not join within {self.timeout:.3g} s{who}",
            missing=missing,
            rank=self.rank,
            op="connect",
        )

    def hello(self, own: tuple[Address, ...]) -> Hello:
        """Return what the server is told, with a nonce made now: a snapshot has no old one."""
        expires = self.token.expires if self.token else 0
        return Hello(self.job, self.size, self.rank, self.epoch, expires, own, auth.nonce())


def _check_place(job: str, rank: int, size: int, epoch: int, timeout: float) -> None:
    if not 1 <= len(job) <= MAX_JOB_NAME:
        raise ValueError(f"job must be a name of 1 to {MAX_JOB_NAME} characters, not {len(job)}")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size}: a job has 1 to {MAX_SIZE} ranks")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} is not a rank of a job of {size}: 0 … {size - 1}")
    if not 0 <= epoch < 2**31:
        raise ValueError(f"epoch={epoch} is not from 0 to 2**31 - 1")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout={timeout} s: joining needs a positive, finite time")


def _check_channel(channel: str, server: str | None, store: str | None) -> None:
    if channel not in CHANNELS:
        raise ValueError(f"channel={channel!r} is none of {', '.join(CHANNELS + HINTS)}")
    if channel == "object":
        parse_store(store or "")
    elif store is not None:
        raise ValueError(f"store={store!r} is for channel='object' or a hint only")
    elif server is None:
        raise ValueError(f"channel={channel!r} needs a server")
