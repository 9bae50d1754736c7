"""Two jobs, and two epochs of one of them, at once: none ever hears of another."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

import fmi_client
from fmi_client.errors import FmiError
from fmi_client.transport import punch
from rendezvous_server.jobs import Member
from rendezvous_server.registry import Outbox, Registry
from tests.reliability.conftest import Measured
from tests.reliability.interleavings import play
from tests.support import KEY, serving

OFTEN = {
    *("payloads", "PunchNow", "Want", "Gone", "Notice", "Missing", "rejoined", "crashes"),
    *("strangers", "early callers", "relayed", "refused: RankTaken", "refused: JobFull"),
}
"""What happens in a hundred courses of events, or they prove little."""


@pytest.mark.no_cover  # which other tests measure, and which would make this one thrice as slow
@pytest.mark.row(20)
@pytest.mark.parametrize("first", [0, pytest.param(1000, marks=pytest.mark.nightly)])
def test_no_rank_hears_of_another_job_or_epoch(first: int, measured: Measured) -> None:
    count = 10_000 if first else 1000
    seen = sum((play(seed) for seed in range(first, first + count)), Counter[str]())
    measured("interleavings in which no frame went astray", count, "", ">= 1,000")
    measured("... payloads between ranks in these", seen["payloads"], "", "")
    measured("... strangers refused", seen["strangers"], "", "")
    assert all(seen[what] > count / 100 for what in OFTEN), seen


ROUNDS = 20
JOBS = {("A", 0): 2, ("A", 1): 2, ("B", 0): 3}


async def _be_rank(address: str, job: str, epoch: int, rank: int, moment: int) -> Any:
    """Return what the ranks of this job say of themselves, or why there is no job."""
    for _ in range(moment):
        await asyncio.sleep(0)
    # Of an older epoch, one may be refused for whom the other waits.
    timeout = 0.5 if (job, epoch) == ("A", 0) else 10.0
    arguments: dict[str, Any] = {
        "job": job,
        "epoch": epoch,
        "rank": rank,
        "size": JOBS[job, epoch],
        "key": KEY,
        "timeout": timeout,
    }
    try:
        async with fmi_client.connect(address, **arguments) as comm:
            return await comm.allgather((job, epoch, rank))
    except FmiError as error:
        return error


def _lead_astray(monkeypatch: pytest.MonkeyPatch, draw: random.Random) -> None:
    """Let ranks look for their peers where others are, and often nowhere else: then only a relay
    leads to them, and meanwhile all meet all others."""
    monkeypatch.setattr(punch, "RELAY_AFTER", 0.05)
    introduce = Registry._introduce

    def wrong(self: Registry, one: Member, other: Member, now: float) -> Outbox:
        outbox = introduce(self, one, other, now)
        everybody = [member for job in self.jobs for member in job.members.values()]
        for member, message in outbox:
            strangers = [list(each.address) for each in everybody if each.job is not member.job]
            right = message["at"] if draw.random() < 0.3 else []
            message["at"] = strangers[-6:] + right
        return outbox

    monkeypatch.setattr(Registry, "_introduce", wrong)


@pytest.mark.row(20)
async def test_nor_over_sockets(monkeypatch: pytest.MonkeyPatch, measured: Measured) -> None:
    draw = random.Random(20)
    _lead_astray(monkeypatch, draw)
    async with serving() as (_, address):
        for _ in range(ROUNDS):
            ranks = [(*job, rank) for job, size in JOBS.items() for rank in range(size)]
            draw.shuffle(ranks)
            said = await asyncio.gather(
                *(_be_rank(address, *rank, draw.randrange(60)) for rank in ranks)
            )
            for (job, epoch, _), heard in zip(ranks, said, strict=True):
                whole = [(job, epoch, rank) for rank in range(JOBS[job, epoch])]
                # Only an older epoch may find that there is no place for it any more.
                assert heard == whole or (epoch, job) == (0, "A"), heard
                assert heard == whole or isinstance(heard, FmiError), heard
    measured("rounds of three jobs at once over sockets", ROUNDS, "", "")
