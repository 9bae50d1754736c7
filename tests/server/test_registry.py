"""Jobs and ranks, without sockets; the connection handles are plain names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fmi_client.errors import (
    AuthenticationFailed,
    JobFull,
    ProtocolError,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol.frames import unpack_ranks
from fmi_client.protocol.hello import Hello
from rendezvous_server.jobs import Member
from rendezvous_server.registry import Outbox, Registry
from rendezvous_server.tickets import RelayFull

HELLO = Hello("job", 3, 0, 0, 0, (("10.0.0.1", 1000),), b"n" * 16)
NOW = 1000.0


def said(outbox: Outbox) -> list[tuple[Any, str]]:
    return [(member.connection, message["t"]) for member, message in outbox]


def join(registry: Registry, rank: int, **changes: Any) -> tuple[Member, Outbox]:
    hello = replace(HELLO, rank=rank, **changes)
    return registry.join(hello, (f"203.0.113.{rank}", 2000), f"{hello.job}/{rank}", NOW)


@pytest.fixture
def registry() -> Registry:
    return Registry(ttl=60, max_jobs=2, make_cookie=lambda: b"c" * 16)


@pytest.fixture
def members(registry: Registry) -> list[Member]:
    return [join(registry, rank)[0] for rank in range(3)]


def test_all_are_told_when_the_last_rank_is_there(registry: Registry) -> None:
    assert said(join(registry, 2)[1]) == []
    assert said(join(registry, 0)[1]) == []
    assert said(join(registry, 1)[1]) == [
        ("job/2", "ready"),
        ("job/0", "ready"),
        ("job/1", "ready"),
    ]


def test_who_is_missing(registry: Registry) -> None:
    member, _ = join(registry, 1)
    ((_, message),) = registry.request(member, {"t": "who"}, NOW)
    assert unpack_ranks(message["ranks"]) == [0, 2]


def test_a_lost_waiter_frees_its_place(registry: Registry) -> None:
    member, _ = join(registry, 0)
    join(registry, 1)
    assert registry.leave(member, clean=False, why="died", now=NOW) == []
    join(registry, 0)
    assert said(join(registry, 2)[1]) == [
        ("job/1", "ready"),
        ("job/0", "ready"),
        ("job/2", "ready"),
    ]


def test_a_taken_rank_another_size_and_a_running_job_are_refused(registry: Registry) -> None:
    join(registry, 0)
    with pytest.raises(RankTaken, match="rank 0 of job 'job'"):
        join(registry, 0)
    with pytest.raises(JobFull, match="has 3 ranks, not 4"):
        join(registry, 1, size=4)
    join(registry, 1)
    last, _ = join(registry, 2)
    registry.leave(last, clean=False, why="died", now=NOW)
    with pytest.raises(JobFull, match="runs already"):
        join(registry, 2)


def test_lost_and_left_ranks_of_a_running_job_are_announced(
    registry: Registry, members: list[Member]
) -> None:
    outbox = registry.leave(members[1], clean=False, why="reset", now=NOW)
    assert said(outbox) == [("job/0", "gone"), ("job/2", "gone")]
    assert outbox[0][1] == {"t": "gone", "rank": 1, "clean": False, "why": "reset"}
    assert registry.leave(members[2], clean=True, why="left", now=NOW)[0][1]["clean"] is True


def test_a_name_is_free_again_when_the_last_rank_left(
    registry: Registry, members: list[Member]
) -> None:
    for member in members:
        registry.leave(member, clean=True, why="left", now=NOW)
    assert registry.ranks == 0
    assert registry.jobs == {}
    join(registry, 0, size=1)


def test_a_rank_that_left_may_come_back_for_the_next_job_of_that_name(
    registry: Registry, members: list[Member]
) -> None:
    registry.leave(members[1], clean=True, why="left", now=NOW)
    again, outbox = join(registry, 1)
    assert outbox == []
    assert again.job is not members[0].job
    with pytest.raises(RankTaken):
        join(registry, 1)
    # The old job goes on, and ends without touching the new one.
    assert said(registry.request(members[0], {"t": "link", "peer": 2}, NOW)) == [("job/2", "want")]
    registry.leave(members[0], clean=True, why="left", now=NOW)
    registry.leave(members[2], clean=True, why="left", now=NOW)
    join(registry, 0)
    assert [text for _, text in said(join(registry, 2)[1])] == ["ready"] * 3


def test_both_sides_punch_when_both_asked(registry: Registry, members: list[Member]) -> None:
    assert said(registry.request(members[0], {"t": "link", "peer": 2}, NOW)) == [("job/2", "want")]
    outbox = registry.request(members[2], {"t": "link", "peer": 0}, NOW)
    assert said(outbox) == [("job/2", "punch"), ("job/0", "punch")]
    assert outbox[0][1]["peer"] == 0
    assert outbox[0][1]["at"] == [["203.0.113.0", 2000], ["10.0.0.1", 1000]]
    assert outbox[0][1]["cookie"] == outbox[1][1]["cookie"] == b"c" * 16
    assert outbox[0][1]["ticket"] != outbox[1][1]["ticket"]
    # Rank and server saw different ports: no punch gets through two such NATs.
    assert outbox[0][1]["hopeless"] is True
    # The pair may ask again, for instance when the punch failed.
    assert said(registry.request(members[2], {"t": "link", "peer": 0}, NOW)) == [("job/0", "want")]


@pytest.mark.parametrize(
    ("seen", "local", "public"),
    [
        (("203.0.113.2", 1000), ("10.0.0.1", 1000), False),
        (("10.0.0.1", 1000), ("10.0.0.1", 1000), False),
        (("203.0.113.2", 2000), ("10.0.0.1", 1000), True),
    ],
    ids=["a NAT that keeps the port", "public", "the other one is public"],
)
def test_where_there_is_hope_for_a_punch(
    registry: Registry, seen: Any, local: Any, public: bool
) -> None:
    other = ("198.51.100.7", 3000)
    hello = replace(HELLO, size=2, candidates=(local,))
    one, _ = registry.join(hello, seen, "one", NOW)
    at = other if public else ("203.0.113.9", 3000)
    two, _ = registry.join(replace(hello, rank=1, candidates=(other,)), at, "two", NOW)
    registry.request(one, {"t": "link", "peer": 1}, NOW)
    assert registry.request(two, {"t": "link", "peer": 0}, NOW)[0][1]["hopeless"] is False


IPV4, IPV6 = ("203.0.113.1", 1000), ("2001:db8::1", 1000)
OTHER_IPV4, OTHER_IPV6 = ("198.51.100.7", 3000), ("2001:db8:7::1", 3000)
INSIDE, SYMMETRIC = ("10.0.0.1", 1000), ("203.0.113.1", 2000)
UNIQUE_LOCAL = ("fd00::1", 1000)


@pytest.mark.parametrize(
    ("seen", "own", "other_seen", "other_own", "hope", "told"),
    [
        (IPV4, [INSIDE], OTHER_IPV6, [OTHER_IPV6], False, []),
        (IPV4, [INSIDE, IPV6], OTHER_IPV6, [OTHER_IPV6], True, [IPV6]),
        (IPV4, [INSIDE, IPV6], OTHER_IPV4, [("10.0.0.1", 3000)], True, [IPV4, INSIDE]),
        (SYMMETRIC, [INSIDE], OTHER_IPV4, [INSIDE, OTHER_IPV6], False, [SYMMETRIC, INSIDE]),
        (SYMMETRIC, [INSIDE, IPV6], SYMMETRIC, [INSIDE], True, [SYMMETRIC, INSIDE]),
        (
            SYMMETRIC,
            [INSIDE, IPV6],
            OTHER_IPV4,
            [INSIDE, OTHER_IPV6],
            True,
            [SYMMETRIC, INSIDE, IPV6],
        ),
        (IPV6, [IPV6, INSIDE], OTHER_IPV4, [INSIDE], False, [INSIDE]),
        (IPV6, [IPV6, INSIDE], OTHER_IPV4, [OTHER_IPV4], True, [INSIDE]),
        (IPV6, [IPV6, INSIDE], INSIDE, [UNIQUE_LOCAL], True, [IPV6]),
        (IPV4, [INSIDE, UNIQUE_LOCAL], OTHER_IPV6, [("fd00::2", 3000)], False, [UNIQUE_LOCAL]),
        (IPV4, [INSIDE, UNIQUE_LOCAL], OTHER_IPV6, [OTHER_IPV6], True, [UNIQUE_LOCAL]),
        (IPV4, [IPV6], OTHER_IPV4, [OTHER_IPV4], False, []),
        (IPV4, [IPV6], OTHER_IPV6, [OTHER_IPV6], True, [IPV6]),
    ],
    ids=[
        "nothing in common",
        "both and IPv6",
        "both and IPv4",
        "a symmetric NAT, IPv6 on one side only",
        "behind one symmetric NAT",
        "IPv6 on both sides makes up for a symmetric NAT",
        "what a NAT makes of an address that we never saw",
        "the same, but the other is public",
        "the same, over IPv6",
        "private addresses of IPv6",
        "the same, but the other is public",
        "a NAT64 is no address of a rank",
        "behind a NAT64, IPv6 is as good as ever",
    ],
)
def test_ranks_are_told_what_both_have(
    registry: Registry,
    seen: Any,
    own: Any,
    other_seen: Any,
    other_own: Any,
    hope: bool,
    told: Any,
) -> None:
    hello = replace(HELLO, size=2, candidates=tuple(own))
    one, _ = registry.join(hello, seen, "one", NOW)
    two, _ = registry.join(replace(hello, rank=1, candidates=tuple(other_own)), other_seen, "", NOW)
    registry.request(one, {"t": "link", "peer": 1}, NOW)
    outbox = registry.request(two, {"t": "link", "peer": 0}, NOW)
    (message,) = (message for member, message in outbox if member is two)
    assert message["hopeless"] is not hope
    assert message["at"] == [list(address) for address in told]


def test_tickets_are_good_once_and_not_for_ever(registry: Registry, members: list[Member]) -> None:
    registry.request(members[0], {"t": "link", "peer": 1}, NOW)
    tickets = [m["ticket"] for _, m in registry.request(members[1], {"t": "link", "peer": 0}, NOW)]
    pair = registry.tickets.claim(tickets[0], NOW)
    assert pair.ranks == (1, 0)
    for ticket, now in ((tickets[0], NOW), (tickets[1], NOW + 1000), (b"x" * 16, NOW)):
        with pytest.raises(AuthenticationFailed):
            registry.tickets.claim(ticket, now)
    silent = Registry(ttl=60, relay=False)
    one, two = (join(silent, rank, size=2)[0] for rank in range(2))
    silent.request(one, {"t": "link", "peer": 1}, NOW)
    assert "ticket" not in silent.request(two, {"t": "link", "peer": 0}, NOW)[0][1]


def test_a_link_with_who_has_gone_is_answered_with_that(
    registry: Registry, members: list[Member]
) -> None:
    registry.leave(members[1], clean=True, why="left", now=NOW)
    assert said(registry.request(members[0], {"t": "link", "peer": 1}, NOW)) == [("job/0", "gone")]


@pytest.mark.parametrize(
    "message",
    [
        {"t": "abort", "kind": "abort", "reason": "", "ranks": ["x"]},
        {"t": "link", "peer": 0},
        {"t": "link", "peer": 3},
        {"t": "link"},
        {"t": "x"},
        {"t": "abort"},
    ],
)
def test_senseless_requests_are_protocol_errors(
    registry: Registry, members: list[Member], message: Any
) -> None:
    with pytest.raises(ProtocolError):
        registry.request(members[0], message, NOW)


@pytest.mark.row(11)
def test_the_first_that_calls_the_roll_is_heard_by_all_and_hears_all(
    registry: Registry, members: list[Member]
) -> None:
    def say(rank: int, kind: str) -> list[tuple[Any, Any, Any]]:
        message = {"t": "abort", "kind": kind, "reason": "why", "ranks": [rank], "context": 7}
        outbox = registry.request(members[rank], message, NOW)
        assert all(each["context"] == 7 for _, each in outbox)
        return [(member.rank, each["kind"], each["by"]) for member, each in outbox]

    assert say(2, "here") == []
    assert say(1, "timeout") == [(rank, "timeout", 1) for rank in range(3)]
    assert say(2, "timeout") == [(1, "here", 2)]
    assert say(0, "here") == [(1, "here", 0)]
    assert say(2, "missing") == []  # it has lost patience; who called is still there
    assert say(1, "missing") == [(0, "missing", 1), (2, "missing", 1)]
    assert members[0].job.aborted is not None
    assert members[0].job.aborted.kind == "missing"
    registry.leave(members[1], clean=True, why="left", now=NOW)
    assert say(2, "here") == []
    assert say(2, "missing") == [(0, "missing", 2)]


def test_an_abort_reaches_all_others(registry: Registry, members: list[Member]) -> None:
    message = {"t": "abort", "kind": "abort", "reason": "why", "ranks": []}
    outbox = registry.request(members[1], message, NOW)
    assert said(outbox) == [("job/0", "aborted"), ("job/2", "aborted")]
    assert (outbox[0][1]["by"], outbox[0][1]["reason"]) == (1, "why")


def test_a_new_epoch_ends_the_old_one_and_refuses_its_stragglers(
    registry: Registry, members: list[Member]
) -> None:
    member, outbox = join(registry, 0, epoch=1)
    assert said(outbox) == [(f"job/{rank}", "aborted") for rank in range(3)]
    assert "epoch 1" in outbox[0][1]["reason"]
    assert registry.ranks == 1
    with pytest.raises(RendezvousError, match="is at epoch 1"):
        join(registry, 1, epoch=0)
    # The old connections end afterwards, and touch nothing of the new job.
    assert registry.leave(members[0], clean=False, why="", now=NOW) == []
    assert member.job.members == {0: member}


def test_jobs_expire(registry: Registry, members: list[Member]) -> None:
    assert registry.expire(NOW + 59.9) == []
    outbox = registry.expire(NOW + 60)
    assert said(outbox) == [(f"job/{rank}", "aborted") for rank in range(3)]
    assert registry.jobs == {}
    assert registry.ranks == 0


def test_a_draining_server_sends_waiters_away_and_lets_jobs_run(
    registry: Registry, members: list[Member]
) -> None:
    join(registry, 0, job="waiting")
    assert said(registry.drain(NOW))[-1] == ("waiting/0", "error")
    assert said(registry.drain(NOW))[:3] == [(f"job/{rank}", "draining") for rank in range(3)]
    with pytest.raises(ServerDraining):
        join(registry, 1, job="waiting")


def test_the_number_of_jobs_is_bounded(registry: Registry) -> None:
    join(registry, 0, job="a")
    join(registry, 0, job="b")
    with pytest.raises(RendezvousError, match="holds 2 jobs"):
        join(registry, 0, job="c")
    small = Registry(ttl=60, max_ranks=1)
    join(small, 0)
    with pytest.raises(RendezvousError, match="holds 1 ranks"):
        join(small, 1)


def tickets(registry: Registry, one: Member, other: Member) -> list[bytes]:
    registry.request(one, {"t": "link", "peer": other.rank}, NOW)
    outbox = registry.request(other, {"t": "link", "peer": one.rank}, NOW)
    return [message["ticket"] for _, message in outbox]


def test_a_job_relays_so_many_pairs_at_once() -> None:
    registry = Registry(ttl=60, relay_pairs=1)
    zero, one, two = (join(registry, rank)[0] for rank in range(3))
    here = [registry.tickets.claim(ticket, NOW) for ticket in tickets(registry, zero, one)]
    refused, too_late = tickets(registry, zero, two)
    with pytest.raises(RelayFull, match=r"'job' relays 1 pairs already \(--relay-pairs\)"):
        registry.tickets.claim(refused, NOW)
    here[0].release()
    waiting, _ = tickets(registry, one, two)
    with pytest.raises(RelayFull):  # the other leg still holds the place
        registry.tickets.claim(waiting, NOW)
    here[1].release()
    with pytest.raises(RelayFull):  # its peer was sent away: nobody would come
        registry.tickets.claim(too_late, NOW)
    registry.tickets.claim(tickets(registry, zero, one)[0], NOW)
    others = [join(registry, rank, job="another", size=2)[0] for rank in range(2)]
    registry.tickets.claim(tickets(registry, *others)[0], NOW)


def test_a_job_relays_so_many_bytes() -> None:
    registry = Registry(ttl=60, relay_bytes=1000)
    zero, one, two = (join(registry, rank)[0] for rank in range(3))
    assert registry.may_relay(zero.job, 600)
    assert registry.may_relay(zero.job, 400)
    assert not registry.may_relay(zero.job, 1)
    ticket, _ = tickets(registry, zero, one)
    outbox = registry.end_relayed(zero.job, NOW)
    assert [member for member, _ in outbox] == [zero, one, two]
    assert "limit of 1000 bytes" in outbox[0][1]["reason"]
    assert not registry.jobs
    with pytest.raises(AuthenticationFailed):
        registry.tickets.claim(ticket, NOW)
