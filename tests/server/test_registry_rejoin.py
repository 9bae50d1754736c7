"""Jobs whose server is gone, without sockets: what the next server makes of their ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fmi_client.errors import JobFull, ProtocolError, RankTaken, RendezvousError, ServerDraining
from fmi_client.protocol.frames import Message
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import REJOIN_SECONDS, error_message, read_error
from rendezvous_server.awaited import Awaited
from rendezvous_server.jobs import Member
from rendezvous_server.registry import MAX_RUNS, Outbox, Registry

HELLO = Hello("job", 3, 0, 0, 0, (("10.0.0.1", 1000),), b"n" * 16)
RUN, OTHER_RUN = b"r" * 16, b"o" * 16
NOW = 1000.0
LATER = NOW + REJOIN_SECONDS


def join(registry: Registry, rank: int, now: float = NOW, **changes: Any) -> tuple[Member, Outbox]:
    who = bytes([rank]) * 16
    hello = replace(HELLO, **({"rank": rank, "identity": who} | changes))
    return registry.join(hello, (f"203.0.113.{rank}", 2000), f"{hello.job}/{rank}", now)


def rejoin(registry: Registry, rank: int, **changes: Any) -> tuple[Member, Outbox]:
    return join(registry, rank, **({"run": RUN, "began": True} | changes))


def link(registry: Registry, member: Member, peer: int, now: float = NOW) -> list[tuple[Any, str]]:
    return said(registry.request(member, {"t": "link", "peer": peer}, now))


def said(outbox: Outbox) -> list[tuple[Any, str]]:
    return [(member.rank, message["t"]) for member, message in outbox]


def messages(outbox: Outbox) -> list[Message]:
    return [message for _, message in outbox]


@pytest.fixture
def registry() -> Registry:
    return Registry(ttl=600)


def test_the_first_rank_that_comes_back_finds_its_job_running(registry: Registry) -> None:
    member, outbox = rejoin(registry, 1)
    assert said(outbox) == [(1, "ready")]
    assert (member.job.running, member.job.run) == (True, RUN)
    assert said(rejoin(registry, 2)[1]) == [(2, "ready")]
    assert registry.ranks == 2


def test_a_link_with_who_is_not_back_yet_is_made_when_it_is(registry: Registry) -> None:
    zero, _ = rejoin(registry, 0)
    assert link(registry, zero, 1) == []
    one, outbox = rejoin(registry, 1)
    assert said(outbox) == [(1, "ready"), (1, "want")]
    assert outbox[1][1]["peer"] == 0
    assert link(registry, one, 0) == [(1, "punch"), (0, "punch")]


def test_who_wants_a_link_is_told_when_nobody_comes(registry: Registry) -> None:
    zero, _ = rejoin(registry, 0)
    two, _ = rejoin(registry, 2)
    assert link(registry, zero, 1) == link(registry, two, 1) == []
    assert registry.overdue(LATER - 0.1) == []
    outbox = registry.overdue(LATER)
    assert sorted(said(outbox)) == [(0, "gone"), (2, "gone")]
    message = outbox[0][1]
    assert (message["rank"], message["clean"]) == (1, True)
    assert message["why"] == "did not come back after the server's restart"
    assert registry.overdue(LATER + 1) == []
    assert link(registry, zero, 1, LATER) == [(0, "gone")]


def test_links_with_ranks_that_are_not_back_are_bounded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry._awaited = Awaited(room=5)
    monkeypatch.setattr("rendezvous_server.registry.OVERDUE_SLICE", 2)
    zero, _ = rejoin(registry, 0, size=9)
    one, _ = rejoin(registry, 0, size=9, run=OTHER_RUN)
    for peer in (1, 2, 3, 3):
        assert link(registry, zero, peer) == []
    for peer in (1, 2):
        assert link(registry, one, peer) == []
    for member, peer in ((zero, 4), (one, 3)):
        with pytest.raises(ProtocolError, match="not back"):
            link(registry, member, peer)
    assert said(rejoin(registry, 2, size=9)[1]) == [(2, "ready"), (2, "want")]
    assert link(registry, one, 3) == []
    rejoin(registry, 0, size=9, run=OTHER_RUN)  # another line of it: it asks anew
    again, _ = rejoin(registry, 0, size=9)
    assert len(registry._awaited) == 0
    assert not any(registry._awaited._of.values())
    for peer in (1, 3, 4, 5, 6):
        assert link(registry, again, peer) == []
    told = [registry.overdue(LATER) for _ in range(4)]
    assert [len(outbox) for outbox in told] == [2, 2, 1, 0]  # never all at once
    assert {message["rank"] for outbox in told for message in messages(outbox)} == {1, 3, 4, 5, 6}
    assert len(registry._awaited) == 0


def test_who_computes_for_long_may_still_come_back(registry: Registry) -> None:
    zero, _ = rejoin(registry, 0)
    assert registry.overdue(LATER) == []
    one, outbox = rejoin(registry, 1, now=LATER + 100)
    assert said(outbox) == [(1, "ready")]
    assert link(registry, zero, 1, LATER + 100) == [(1, "want")]
    assert link(registry, one, 0, LATER + 100) == [(1, "punch"), (0, "punch")]


def test_who_comes_back_late_hears_what_happened(registry: Registry) -> None:
    zero, _ = rejoin(registry, 0)
    one, _ = rejoin(registry, 1)
    registry.leave(one, clean=False, why="reset", now=NOW)
    said_by_zero = {"t": "abort", "kind": "lost", "reason": "rank 1", "ranks": [1]}
    registry.request(zero, said_by_zero, NOW)
    assert said(rejoin(registry, 2)[1]) == [(2, "ready"), (2, "gone"), (2, "aborted")]


def test_ranks_that_had_not_heard_ready_are_taken_along(registry: Registry) -> None:
    """Their server died while it said so: some had heard it, others not."""
    assert said(join(registry, 0, run=RUN)[1]) == []
    assert said(rejoin(registry, 1)[1]) == [(0, "ready"), (1, "ready")]
    assert said(join(registry, 2, run=RUN)[1]) == [(2, "ready")]


def test_ranks_that_waited_wait_again_with_new_ones(registry: Registry) -> None:
    zero, _ = join(registry, 0, run=RUN)
    assert not zero.job.running
    join(registry, 1)
    assert said(join(registry, 2, run=OTHER_RUN)[1]) == [(0, "ready"), (1, "ready"), (2, "ready")]
    assert zero.job.back_until is None


def test_a_server_that_lived_refuses_a_rank_that_it_lost(registry: Registry) -> None:
    members = [join(registry, rank)[0] for rank in range(3)]
    run = members[0].job.run
    registry.leave(members[1], clean=False, why="reset", now=NOW)
    with pytest.raises(RendezvousError, match="job 'job' goes on without rank 1"):
        rejoin(registry, 1, run=run)


def test_a_dead_line_is_replaced_by_the_same_rank_only(registry: Registry) -> None:
    members = [join(registry, rank)[0] for rank in range(3)]
    run = members[0].job.run
    link(registry, members[0], 1)
    link(registry, members[1], 2)
    for changes in ({"identity": b"x" * 16}, {"identity": b""}):
        with pytest.raises(RankTaken):
            rejoin(registry, 1, run=run, **changes)
    again, outbox = rejoin(registry, 1, run=run)
    # The old line is to be closed; what 1 was asked for is repeated; what it asked is forgotten.
    assert outbox[0][0] is members[1]
    assert said(outbox) == [(1, "error"), (1, "ready"), (1, "want")]
    assert link(registry, members[2], 1) == [(1, "want")]
    assert registry.leave(members[1], clean=False, why="reset", now=NOW) == []
    assert (again.job.members[1], registry.ranks) == (again, 3)


def test_a_waiter_whose_line_is_dead_is_replaced_too(registry: Registry) -> None:
    old, _ = join(registry, 0)
    new, outbox = join(registry, 0, run=old.job.run)
    assert said(outbox) == [(0, "error")]
    assert (new.job, registry.ranks) == (old.job, 1)
    nobody, _ = join(registry, 1, identity=b"")
    with pytest.raises(RankTaken):
        join(registry, 1, identity=b"")
    assert nobody.job.members[1] is nobody


def test_the_next_run_of_that_name_does_not_meet_the_last_one(registry: Registry) -> None:
    """A rank that left while there was no server begins the next run; others are still coming."""
    next_zero, _ = join(registry, 0)
    one, outbox = rejoin(registry, 1)
    assert said(outbox) == [(1, "ready")]
    assert one.job is not next_zero.job
    next_two, _ = join(registry, 2)
    assert next_two.job is next_zero.job
    registry.leave(one, clean=True, why="left", now=NOW)
    assert said(join(registry, 1)[1]) == [(0, "ready"), (2, "ready"), (1, "ready")]


def test_who_is_done_with_a_run_that_others_came_back_to_begins_the_next(
    registry: Registry,
) -> None:
    one, _ = rejoin(registry, 1)
    zero, outbox = join(registry, 0)
    assert (zero.job is one.job, outbox) == (False, [])
    assert said(rejoin(registry, 0)[1]) == [(0, "ready")]  # nobody took its place
    with pytest.raises(RankTaken):
        rejoin(registry, 1, identity=b"x" * 16)


@pytest.mark.parametrize("began", [True, False])
def test_other_sizes_epochs_and_names_stay_apart(registry: Registry, began: bool) -> None:
    one, _ = rejoin(registry, 1, epoch=1)
    with pytest.raises(JobFull, match="has 3 ranks, not 4"):
        rejoin(registry, 2, epoch=1, size=4, began=began)
    with pytest.raises(RendezvousError, match="is at epoch 1"):
        rejoin(registry, 2, epoch=0, began=began)
    assert rejoin(registry, 2, job="other", began=began)[0].job is not one.job
    _, outbox = join(registry, 0, epoch=2)
    assert said(outbox) == [(1, "aborted")]
    with pytest.raises(RendezvousError, match="is at epoch 2"):
        rejoin(registry, 1, epoch=1, began=began)


def test_a_new_epoch_ends_all_runs_of_the_name(registry: Registry) -> None:
    join(registry, 0)
    rejoin(registry, 1)
    _, outbox = join(registry, 0, epoch=1)
    assert sorted(said(outbox)) == [(0, "aborted"), (1, "aborted")]
    assert registry.ranks == 1


def test_a_run_that_lost_its_name_is_of_the_names_epoch(registry: Registry) -> None:
    old, _ = rejoin(registry, 0)
    next_one, _ = join(registry, 1)
    assert next_one.job is not old.job
    rejoin(registry, 2, run=OTHER_RUN)
    for each in (next_one, *[m for m in registry._by_run["job", OTHER_RUN].members.values()]):
        registry.leave(each, clean=True, why="left", now=NOW)
    assert list(registry.jobs) == [old.job]
    with pytest.raises(RendezvousError, match="is at epoch 0"):
        join(registry, 1, epoch=-1)
    _, outbox = join(registry, 0, epoch=1)
    assert said(outbox) == [(0, "aborted")]
    for began, run in ((True, RUN), (True, OTHER_RUN), (False, b"")):
        with pytest.raises(RendezvousError, match="is at epoch 1"):
            join(registry, 1, run=run, began=began)
    same_run, outbox = rejoin(registry, 1, run=registry._by_name["job"].run, epoch=2)
    assert (same_run.job.epoch, said(outbox)) == (2, [(0, "aborted"), (1, "ready")])


def test_made_up_runs_of_a_job_are_few(registry: Registry) -> None:
    members = [rejoin(registry, 1, run=bytes([n]) * 16)[0] for n in range(MAX_RUNS)]
    with pytest.raises(RendezvousError, match="runs of job 'job' are here"):
        rejoin(registry, 1)
    rejoin(registry, 2, run=members[3].job.run)
    rejoin(registry, 1, job="other")
    registry.leave(members[5], clean=True, why="left", now=NOW)
    rejoin(registry, 1)


def test_runs_that_one_rank_each_does_not_leave_are_few(registry: Registry) -> None:
    for _ in range(MAX_RUNS):
        done, _ = join(registry, 1, size=2)
        assert said(join(registry, 0, size=2)[1]) == [(1, "ready"), (0, "ready")]
        registry.leave(done, clean=True, why="left", now=NOW)
    with pytest.raises(RendezvousError, match="runs of job 'job' are here"):
        join(registry, 1, size=2)


def test_nothing_is_left_of_a_job_that_came_back_and_ended(registry: Registry) -> None:
    one, _ = rejoin(registry, 1)
    link(registry, one, 0)
    registry.leave(one, clean=True, why="left", now=NOW)
    assert registry.overdue(LATER) == []
    for left in (registry.jobs, registry._by_name, registry._by_run, registry._runs):
        assert not left
    assert not registry._awaiting
    assert (len(registry._awaited), registry._awaited._of) == (0, {})


def test_who_is_sent_away_is_told_for_how_long(registry: Registry) -> None:
    join(registry, 0)
    ((_, message),) = registry.drain(NOW)
    with pytest.raises(ServerDraining) as caught:
        join(registry, 1)
    for told in (message, error_message(caught.value)):
        error = read_error(told)
        assert isinstance(error, ServerDraining)
        assert error.retry_after == 1.0
    told_in_vain = ((float("nan"), 1.0), ("x", 1.0))
    for odd, seconds in ((7, 7.0), (0, 0.1), (-1, 0.1), (1e9, 60.0), *told_in_vain):
        error = read_error(message | {"after": odd})
        assert isinstance(error, ServerDraining)
        assert error.retry_after == seconds


def test_the_hello_carries_what_rejoining_needs() -> None:
    plain = HELLO.encode()
    assert plain.keys().isdisjoint({"self", "run", "began"})
    assert Hello.decode(plain) == HELLO
    full = replace(HELLO, identity=b"i" * 16, run=RUN, began=True)
    assert Hello.decode(full.encode()) == full
