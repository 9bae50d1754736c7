"""Snapshots of a registry: they agree with it, and stay small however much there is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmi_client.errors import ProtocolError, RendezvousError
from fmi_client.protocol.frames import pack_ranks
from rendezvous_server import page, status
from rendezvous_server.jobs import LOST_KEPT, Member
from rendezvous_server.registry import ENDED_KEPT, Registry
from rendezvous_server.status import Query, Refusals, take
from tests.server.test_registry import HELLO

FACTS: dict[str, Any] = {
    **{"version": "1", "started": 0.0, "connections_now": 0, "connections": 0, "joins": 0},
    **{"lost": 0, "jobs_started": 0, "refused": 0, "links": 0, "relay": True, "legacy": False},
    **{"relay_pairs_now": 0, "relay_pairs": 0, "relay_bytes": 0, "relay_bytes_limit": 10**12},
}


def join(registry: Registry, job: str, rank: int, size: int, now: float = 0.0) -> Member:
    hello = replace(HELLO, job=job, rank=rank, size=size)
    return registry.join(hello, ("203.0.113.1", 2000), (job, rank), now)[0]


def look(registry: Registry, now: float = 0.0, query: Query = Query()) -> Any:  # noqa: B008
    return take(registry, FACTS, Refusals(), now, query)


def read(text: str) -> set[int]:
    """The ranks that "3, 17-19" names."""
    ranks: set[int] = set()
    for part in filter(None, text.split(", ")):
        first, _, last = part.partition("-")
        ranks |= set(range(int(first), int(last or first) + 1))
    return ranks


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "lose", "expire"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(STEPS)
def test_a_snapshot_agrees_with_the_registry_whatever_happened(
    steps: list[tuple[str, str, int]],
) -> None:
    registry, now, here = Registry(ttl=30), 0.0, dict[tuple[str, int], Member]()
    came: dict[Any, set[int]] = {}
    for what, name, rank in steps:
        now += 1
        member = here.get((name, rank))
        if what == "expire":
            registry.expire(now)
        elif what == "join":
            try:
                member = here[name, rank] = join(registry, name, rank, 4, now)
            except RendezvousError:
                continue
            came.setdefault(member.job, set()).add(rank)
        elif member is not None:
            registry.leave(member, clean=what == "leave", why=what, now=now)
        check(registry, look(registry, now, Query(name)), name, came)


def check(registry: Registry, snapshot: Any, name: str, came: dict[Any, set[int]]) -> None:
    json.dumps(snapshot)
    page.to_html(page.main(snapshot), snapshot["now"])
    jobs = {job.began: job for job in registry.jobs if job.name == name}
    assert snapshot["matching"] == len(snapshot["jobs"]) == len(jobs)
    assert snapshot["counts"]["ranks"] == sum(len(job.members) for job in registry.jobs)
    for shown in snapshot["jobs"]:
        job = jobs[shown["began"]]
        assert shown["here"] == len(job.members)
        assert shown["state"] == ("RUNNING" if job.running else "WAITING")
        if job.running:
            assert shown["missing"] == ""
            assert shown["here"] + shown["left"] + shown["lost_count"] == job.size
        else:
            assert shown["left"] == shown["lost_count"] == 0
            assert read(shown["missing"]) == set(range(4)) - job.members.keys()
        assert not {each["rank"] for each in shown["lost"]} & job.members.keys()
    for shown in snapshot["ended"]:
        (job,) = (j for j in came if j.name == name and j.began == shown["began"])
        assert job not in registry.jobs
        assert shown["came"] == len(came[job])
        assert read(shown["never_came"]) == set(range(4)) - came[job]


def test_many_ranks_of_one_job_are_few_words() -> None:
    registry = Registry(ttl=60)
    members = [join(registry, "big", rank, 10_000) for rank in range(0, 9_999, 2)]
    snapshot = look(registry, query=Query("big", exact=True))
    (job,) = snapshot["jobs"]
    assert job["missing"].startswith("1, 3, 5, ")
    assert job["missing"].endswith("39 and 4,980 more")
    assert len(job["ranks"]) == status.RANKS_SHOWN
    assert len(json.dumps(page.main(snapshot))) < 100_000
    for member in members:
        registry.leave(member, clean=False, why="x" * 10_000, now=1.0)
    (ended,) = look(registry, 2.0)["ended"]
    assert (ended["came"], len(ended["lost"])) == (5_000, LOST_KEPT)
    assert len(json.dumps(ended)) < 10_000


def test_the_jobs_in_trouble_for_longest_come_first_and_all_are_counted() -> None:
    registry = Registry(ttl=1e6, max_jobs=20_000)
    for number in range(10_000):
        join(registry, f"job-{number}", 0, 1 if number % 2 else 2, now=float(number))
    hurt = [join(registry, "hurt", rank, 2, now=500.0) for rank in (0, 1)]
    registry.leave(hurt[1], clean=False, why="died", now=5.0)
    snapshot = look(registry, 10_000.0)
    names = [job["name"] for job in snapshot["jobs"]]
    assert names[:5] == ["job-0", "job-2", "job-4", "hurt", "job-6"]
    assert len(names) == status.JOBS_SHOWN
    counts = snapshot["counts"]
    assert (counts["waiting"], counts["running"], counts["troubled"]) == (5_000, 5_001, 1)
    assert len(json.dumps(snapshot)) < 50_000
    assert look(registry, query=Query("9999"))["matching"] == 1


def test_a_job_that_died_outlives_many_that_ended_well() -> None:
    registry = Registry(ttl=60)
    registry.leave(join(registry, "dead", 1, 2), clean=False, why="died", now=1.0)
    for number in range(3 * ENDED_KEPT):
        member = join(registry, f"well-{number}", 0, 1)
        registry.leave(member, clean=True, why="left", now=2.0)
    assert look(registry, query=Query("dead"))["ended"][0]["never_came"] == "0"
    assert len(registry.ended_well) == len(registry.ended_badly) + ENDED_KEPT - 1 == ENDED_KEPT


def test_what_is_kept_of_an_ended_job_is_small() -> None:
    registry = Registry(ttl=60)
    members = [join(registry, "job", rank, 100) for rank in range(100)]
    for member in members:
        registry.leave(member, clean=True, why="left", now=1.0)
    (job,) = registry.ended_well
    assert (job.members, job.gone, job.wanted, job.lost) == ({}, {}, {}, {})
    assert job.left == 100


def test_what_a_rank_says_takes_little_room() -> None:
    registry = Registry(ttl=60)
    member = join(registry, "job", 0, 1)
    said = {"t": "abort", "kind": "k", "reason": "r", "ranks": [], "op": "x" * 60_000}
    registry.request(member, said, 1.0)
    assert member.job.aborted is not None
    assert len(member.job.aborted.op or "") < 100
    with pytest.raises(ProtocolError):
        registry.request(member, said | {"reason": "x" * 60_000}, 1.0)


def test_a_rank_that_comes_back_is_not_lost() -> None:
    registry = Registry(ttl=60)
    join(registry, "job", 0, 3)
    registry.leave(join(registry, "job", 1, 3), clean=False, why="reset", now=1.0)
    (job,) = look(registry, 2.0)["jobs"]
    assert [(each["rank"], each["why"]) for each in job["lost"]] == [(1, "reset")]
    join(registry, "job", 1, 3)
    (job,) = look(registry, 2.0)["jobs"]
    assert (job["lost"], job["lost_count"], job["missing"]) == ([], 0, "2")


def test_jobs_that_the_server_ended_say_so() -> None:
    registry = Registry(ttl=60)
    join(registry, "slow", 0, 2)
    registry.expire(60.0)
    (ended,) = look(registry, 61.0)["ended"]
    assert (ended["said"]["by"], ended["said"]["kind"]) == (None, "expired")
    said = json.dumps(page.main(look(registry, 61.0)))
    assert "1 of 2 ranks came, rank 1 never did" in said
    assert "the server ended it: job 'slow' was ended by the server after 60 s" in said


@given(st.integers(1, 70), st.sets(st.integers(0, 69)))
def test_ranks_are_told_as_ranges(size: int, some: set[int]) -> None:
    """The ways to find them agree; the first ranges say how many are left out."""
    here = sorted(rank for rank in some if rank < size)
    absent = sorted(set(range(size)) - set(here))
    ways = (
        list(status._gaps(here, size)),
        list(status._absent(pack_ranks(here, size), size)),
        list(status._ranges(absent)),
    )
    assert ways[0] == ways[1] == ways[2]
    text, _, more = status._text(iter(ways[0]), len(absent)).partition(" and ")
    assert read(text) == set(absent[: len(read(text))])
    assert len(read(text)) + int(more.removesuffix(" more") or 0) == len(absent)


def test_refusals_are_bounded_and_forgotten() -> None:
    refusals = Refusals()
    refusals.add(0.0, ("198.51.100.1", 1), "JobFull", "old")
    assert not refusals.overflows(0.0)
    for number in range(1000):
        refusals.add(1000.0 + number / 1000, ("::1", number), "RankTaken", "y" * 10_000)
    (latest,) = refusals.lately(1001.0)
    assert (latest["kind"], latest["count"]) == ("RankTaken", status.REFUSALS_KEPT)
    assert (latest["address"], len(latest["why"])) == ("[::1]:999", status.TEXT_SHOWN)
    assert refusals.overflows(1001.0)
    assert refusals.lately(1001.0 + status.LATELY_SECONDS) == []
    assert not refusals.overflows(1001.0 + status.LATELY_SECONDS)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-5, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (192, "3 min 12 s")),
        *((3599, "59 min 59 s"), (21_360, "5 h 56 min"), (86_400, "1 d 0 h"), (1e6, "11 d 13 h")),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text
