"""What the object channel asks of its store, and when; stores that hang or fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fmi_client
from fmi_client import sync
from fmi_client.communicator import Communicator
from fmi_client.errors import Aborted, CollectiveTimeout, RendezvousError
from fmi_client.protocol.peer import Buffer
from fmi_client.transport import store as stores
from fmi_client.transport.store import FolderStore
from tests.fmi.test_failures import outcome
from tests.fmi.test_object_channel import files, join, run
from tests.support import until


class Recording(FolderStore):
    """Counts requests, and may hold up those for certain names."""

    def __init__(self, root: Path, hold: str = "") -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()
        self._hold = hold
        self.released = threading.Event()

    def _count(self, method: str, name: str) -> None:
        self.calls[method] += 1
        if self._hold and self._hold in name:
            self.released.wait(20)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._count("put", name)
        super().put(name, parts)

    def get(self, name: str, limit: int) -> bytes | None:
        self._count("get", name)
        return super().get(name, limit)

    def names(self, folder: str) -> list[str]:
        self._count("list", folder)
        return super().names(folder)


def recording(monkeypatch: pytest.MonkeyPatch, root: Path, hold: str = "") -> list[Recording]:
    made: list[Recording] = []

    def opened(url: str) -> Recording:
        made.append(Recording(root, hold))
        return made[-1]

    monkeypatch.setattr(stores, "open_store", opened)
    return made


async def test_an_abort_is_written_before_the_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_client.communicator.LEAVE_SECONDS", 5)
    made = recording(monkeypatch, tmp_path, hold="events/1-1")

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            comm.abort("enough")
            for each in made:
                asyncio.get_running_loop().call_later(0.7, each.released.set)
            return None
        return await outcome(comm.barrier())

    error, _ = await run(tmp_path, 2, rank)
    assert isinstance(error, Aborted)
    assert files(tmp_path) == []


async def test_nothing_is_asked_of_the_store_while_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recording(monkeypatch, tmp_path)
    ranks = await asyncio.gather(*(join(tmp_path, rank, 2) for rank in range(2)))
    await asyncio.gather(*(comm.allreduce(1) for comm in ranks))
    await until(lambda: all(comm._endpoint._depot.pending == 0 for comm in ranks))  # type: ignore[attr-defined]
    before = [Counter(store.calls) for store in made]
    await asyncio.sleep(0.6)  # no event tells that nothing happened
    assert [store.calls for store in made] == before
    for comm in ranks:
        await comm.close()


async def test_a_wait_asks_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recording(monkeypatch, tmp_path)
    ranks = await asyncio.gather(*(join(tmp_path, rank, 2) for rank in range(2)))
    before = sum(store.calls["get"] for store in made)
    with pytest.raises(CollectiveTimeout):
        await ranks[0].recv(1, timeout=1.5)
    asked = sum(store.calls["get"] for store in made) - before
    # 12 pauses grow to 0.2 s within 0.4 s, then 5 a second; and 4 a second whether all is over.
    assert 10 <= asked <= 30
    for comm in ranks:
        await comm.close()


async def test_a_store_that_hangs_stops_neither_the_loop_nor_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recording(monkeypatch, tmp_path, hold="0-1/")
    ranks = await asyncio.gather(*(join(tmp_path, rank, 2) for rank in range(2)))
    start = time.monotonic()
    waiting = asyncio.create_task(outcome(ranks[0].barrier(timeout=0.3)))
    ticks = 0
    while not waiting.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert isinstance(waiting.result(), CollectiveTimeout)
    assert time.monotonic() - start < 2
    assert ticks > 10
    for each in made:
        each.released.set()
    for comm in ranks:
        await comm.close()


def test_the_same_of_a_blocking_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recording(monkeypatch, tmp_path, hold="job")
    start = time.monotonic()
    with pytest.raises(RendezvousError, match=r"the store .* did not answer within 0\.2 s"):
        sync.connect(
            None, job="job", rank=0, size=2, timeout=0.2, channel="object", store=str(tmp_path)
        )
    assert time.monotonic() - start < 2
    made[0].released.set()


async def test_a_store_that_fails_is_named_with_the_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RendezvousError, match="Not a directory") as caught:
        await join(tmp_path / "file", 0, 2)
    assert (caught.value.rank, caught.value.op) == (0, "connect")
    get = FolderStore.get

    def fails(self: FolderStore, name: str, limit: int) -> bytes | None:
        if name.endswith("1-0/1"):
            raise RendezvousError(f"cannot read {name}: Input/output error")
        return get(self, name, limit)

    monkeypatch.setattr(FolderStore, "get", fails)

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        return await outcome(comm.barrier()) or await outcome(comm.barrier())

    error, told = await run(tmp_path, 2, rank)
    assert isinstance(error, RendezvousError)
    assert (error.rank, error.peer, error.op, error.seq) == (0, 1, "barrier", 1)
    assert isinstance(told, Aborted)
    assert "Input/output error" in told.reason


def test_wrong_arguments_are_refused_before_anything_happens(tmp_path: Path) -> None:
    def connect(server: str | None, **options: Any) -> None:
        fmi_client.connect(server, job="a", rank=0, size=1, **options)

    for server, options, text in [
        ("host", {"channel": "post"}, "none of auto, direct, relay, object, fast, cheap"),
        (None, {}, "channel='auto' needs a server"),
        (None, {"channel": "cheap"}, "channel='cheap' needs a server, a store, or both"),
        (None, {"channel": "fast", "store": ""}, "is not s3://bucket/prefix, nor a folder"),
        ("host:x", {"channel": "fast"}, "host:x"),
        (None, {"channel": "object"}, "is not s3://bucket/prefix, nor a folder"),
        ("host", {"store": "/tmp"}, "for channel='object' or a hint only"),
    ]:
        with pytest.raises(ValueError, match=text):
            connect(server, **options)  # type: ignore[arg-type]
