"""The torch.distributed backend: messages, groups, waiting, and what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import DistBackendError, ReduceOp

from fmi_client import torch_join, torch_work
from fmi_client.background import Background
from fmi_client.errors import Aborted, CollectiveMismatch, CollectiveTimeout, RankFailed
from fmi_client.torch_backend import create
from fmi_client.torch_work import Work
from tests.fmi.torch_ranks import (
    SIZE,
    Group,
    everywhere,
    folded,
    group_of,
    joined,
    options,
    strided,
    values,
)
from tests.support import wait_for


# -------------------------------------------------------------------------- point to point
def test_send_and_receive(groups: list[Group]) -> None:
    first, second = torch.zeros(2, 3), strided(torch.zeros(2, 3))
    sends = [groups[0].send([torch.ones(2, 3) * tag], 1, tag) for tag in (1, 2)]
    receives = [groups[1].recv([second], 0, 2), groups[1].recv([first], 0, 1)]
    for work in sends + receives:
        work.wait()
    assert first.unique().tolist() == [1]
    assert second.unique().tolist() == [2]
    assert receives[0].source_rank() == 0


def test_receive_from_any_source(groups: list[Group]) -> None:
    places = [torch.zeros(3) for _ in range(4)]
    receives = [groups[0].recv_anysource([place], 5) for place in places]
    for rank in (2, 1, 2, 1):
        groups[rank].send([torch.full((3,), float(rank))], 0, 5).wait()
    sources = [work.source_rank() for work in receives]
    assert sorted(sources) == [1, 1, 2, 2]
    assert [place.unique().tolist() for place in places] == [[source] for source in sources]


def test_large_messages_to_a_receive_from_any_source(groups: list[Group]) -> None:
    """Both come in pieces, at the same time; each is whole and ends in one receive."""
    count = 1_000_000
    places = [torch.zeros(count) for _ in range(2)]
    receives = [groups[0].recv_anysource([place], 6) for place in places]
    sends = [groups[rank].send([torch.full((count,), float(rank))], 0, 6) for rank in (1, 2)]
    assert sorted(work.source_rank() for work in receives) == [1, 2]
    for work, place in zip(receives, places, strict=True):
        assert place.unique().tolist() == [work.source_rank()]
    assert all(work.wait() for work in sends)


def test_a_receive_from_any_source_that_ends_in_vain_names_the_rank_in_the_job(
    members: list[Background],
) -> None:
    alone = group_of(members[2], [2, 0], context=54)
    alone.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(DistBackendError, match=r"rank 2, recv from any source.* within 0\.1 s"):
        alone.recv_anysource([torch.zeros(2)]).wait()


def test_a_receive_of_another_size_says_so(groups: list[Group]) -> None:
    groups[1].send([torch.zeros(3)], 0).wait()
    with pytest.raises(ValueError, match=r"rank 0, recv.*shape \(2,\)"):
        groups[0].recv([torch.zeros(2)], 1).wait()
    groups[1].send([torch.zeros(3)], 0).wait()
    with pytest.raises(ValueError, match=r"any source.*expected 2 elements .*, got 3"):
        groups[0].recv_anysource([torch.zeros(2)]).wait()


# ------------------------------------------------------------------------------- groups
def test_groups_do_not_meet(members: list[Background]) -> None:
    whole = [group_of(member, context=51) for member in members]
    pair = [group_of(members[rank], [2, 0], context=52) for rank in (2, 0)]
    assert [(group.rank(), group.size()) for group in pair] == [(0, 2), (1, 2)]
    tensors = [torch.tensor(float(rank)) for rank in range(SIZE)]
    others = [torch.tensor(10.0), torch.tensor(20.0)]
    # In another order on each rank.
    works = [pair[0].allreduce([others[0]]), whole[2].allreduce([tensors[2]])]
    works += [whole[0].allreduce([tensors[0]]), pair[1].allreduce([others[1]])]
    works += [whole[1].allreduce([tensors[1]])]
    for work in works:
        work.wait()
    assert [tensor.item() for tensor in tensors + others] == [3, 3, 3, 30, 30]


def test_names(groups: list[Group]) -> None:
    group = groups[0]
    group._set_group_name("mine")
    group._set_group_desc("for a test")
    assert (group.name(), group.group_name, group.group_desc) == ("fmi", "mine", "for a test")
    assert group._get_backend(torch.device("cpu")) is group
    with pytest.raises(RuntimeError, match="CPU only, not of cuda"):
        group._get_backend(torch.device("cuda"))


def test_groups_that_torch_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_join.joined, "background", None)
    part = SimpleNamespace(group_rank=0, group_size=2, global_ranks_in_group=[0, 1])
    with pytest.raises(ValueError, match="takes no pg_options"):
        create(part, dist.ProcessGroup.BackendType.CUSTOM)
    with pytest.raises(ValueError, match="needs a default group of that backend"):
        create(part)


# -------------------------------------------------------------------------------- waiting
def test_callbacks_are_called_though_no_thread_can_be_had(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the interpreter's end."""

    class NoThread:
        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch_work, "Thread", NoThread)
    works = [group.allreduce([torch.ones(2)]) for group in groups]
    doubled = [work.get_future().then(lambda f: f.value()[0] * 2) for work in works]
    wait_for(lambda: all(future.done() for future in doubled), "the callbacks")
    assert [future.value().tolist() for future in doubled] == [[6, 6]] * SIZE


def test_futures_and_their_callbacks(groups: list[Group]) -> None:
    tensors = [torch.ones(2) for _ in range(SIZE)]
    works = [group.allreduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)]
    doubled = [work.get_future().then(lambda f: f.value()[0] * 2) for work in works]
    assert [future.wait().tolist() for future in doubled] == [[6, 6]] * SIZE
    assert all(work.is_completed() and work.is_success() for work in works)
    assert all(work.exception() is None for work in works)
    assert works[0].result()[0] is tensors[0]


def test_a_callback_may_wait_for_an_operation(groups: list[Group]) -> None:
    """As PowerSGD's hook does."""

    def more(group: Group) -> Callable[[Any], Tensor]:
        def callback(future: Any) -> Tensor:
            tensor: Tensor = future.value()[0]
            return group.allreduce([tensor]).get_future().wait()[0]

        return callback

    futures = [group.allreduce([torch.ones(1)]).get_future().then(more(group)) for group in groups]
    assert [future.wait().item() for future in futures] == [9] * SIZE


def test_many_callbacks_may_wait_at_once(groups: list[Group]) -> None:
    """As in a model of many buckets: each callback is done when another one's future is."""
    count = 100
    entered = threading.Barrier(count * SIZE, timeout=50)

    def more(group: Group) -> Callable[[Any], Tensor]:
        def callback(_: Any) -> Tensor:
            entered.wait()
            reduced: Tensor = group.allreduce([torch.ones(1)]).get_future().wait()[0]
            return reduced

        return callback

    def begin(group: Group) -> Any:
        return group.allreduce([torch.ones(1)]).get_future().then(more(group))

    *others, last = groups
    futures = [begin(group) for _ in range(count) for group in others]
    # These may be done before `then` is called, which runs the callback where it is called.
    with ThreadPoolExecutor(count) as pool:
        futures += pool.map(begin, [last] * count)
    assert [future.wait().item() for future in futures] == [SIZE] * len(futures)


def test_coalesced_calls_end_as_one(groups: list[Group]) -> None:
    tensors = [[torch.ones(1), torch.ones(2)] for _ in groups]
    works = []
    for group, pair in zip(groups, tensors, strict=True):
        group._start_coalescing(torch.device("cpu"))
        for tensor in pair:
            group.allreduce([tensor])
        works.append(group._end_coalescing(torch.device("cpu")))
    for work in works:
        work.wait()
    assert all(a.tolist() == [3] and b.tolist() == [3, 3] for a, b in tensors)


def test_a_wait_with_a_limit_of_its_own(groups: list[Group]) -> None:
    work = groups[0].recv([torch.zeros(1)], 1)
    with pytest.raises(DistBackendError, match=r"rank 0, recv\] no end within the 0.01 s of wait"):
        work.wait(timedelta(milliseconds=10))
    assert not work.is_completed()
    groups[1].send([torch.ones(1)], 0).wait()
    assert work.wait()


def test_monitored_barrier(groups: list[Group]) -> None:
    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(Group.monitored_barrier, groups))
        limit = timedelta(milliseconds=100)

        def late(wait_all_ranks: bool) -> list[str]:
            def enter(group: Group) -> None:
                with pytest.raises(DistBackendError) as raised:
                    group.monitored_barrier(limit, wait_all_ranks)
                assert isinstance(raised.value.__cause__, CollectiveTimeout)
                texts.append(str(raised.value))

            texts: list[str] = []
            enter(groups[0])
            return texts

        assert "Rank 1 failed to pass monitoredBarrier in 100 ms" in late(False)[0]
        assert "Ranks 1, 2 failed to pass" in late(True)[0]


def test_a_monitored_barrier_does_not_take_messages(groups: list[Group]) -> None:
    groups[1].send([torch.ones(1)], 0, 1).wait()  # under the tag that the first barrier has
    with pytest.raises(DistBackendError, match="Rank 1"):
        groups[0].monitored_barrier(timedelta(milliseconds=50))
    got = torch.zeros(1)
    groups[0].recv([got], 1, 1).wait()
    assert got.item() == 1


def test_the_group_lives_on_after_a_monitored_barrier_that_failed(groups: list[Group]) -> None:
    with pytest.raises(DistBackendError, match="Rank 1"):
        groups[0].monitored_barrier(timedelta(milliseconds=10))
    tensors = values()
    want = folded(tensors, ReduceOp.SUM)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]]))
    assert torch.equal(tensors[0], want)


# -------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda g: g.allreduce([torch.ones(1), torch.ones(1)]), "one item, got 2"),
        (lambda g: g.all_gather_single(torch.ones(5), torch.ones(2)), "5 elements"),
        (lambda g: g.all_gather_single(torch.ones(6), torch.ones(2).int()), "torch.int32"),
        (lambda g: g.reduce_scatter_single(torch.ones(2), torch.ones(7)), "7 elements"),
        (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(4), [], []), "axis of 4"),
        (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(3), [], [1, 1, 2]), "add up to 3"),
    ],
)
def test_wrong_sizes_are_told_before_anything_is_sent(
    groups: list[Group], call: Callable[[Group], Work], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        call(groups[0])
    everywhere(groups, lambda group, _: group.barrier())


def test_what_has_no_sum(groups: list[Group]) -> None:
    opts = options(dist.AllreduceOptions, reduceOp=ReduceOp.BAND)
    with pytest.raises(TypeError, match="rank 0, allreduce"):
        groups[0].allreduce([torch.ones(1)], opts).wait()


def test_ranks_that_differ_hear_so_together(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        works = [one.allreduce([torch.ones(2)]), two.allreduce([torch.ones(3)])]
        for work in works:
            with pytest.raises(DistBackendError, match=r"float32 \[2\]") as raised:
                work.wait()
            assert "float32 [3]" in str(raised.value)
            assert isinstance(raised.value.__cause__, CollectiveMismatch)
            with pytest.raises(RuntimeError, match=r"float32"):
                work.get_future().wait()


def test_who_is_late_is_named(address: str) -> None:
    with joined(address, 3) as members:
        groups = [group_of(member) for member in members]
        opts = options(dist.AllreduceOptions, timeout=timedelta(seconds=0.2))
        works = [group.allreduce([torch.ones(1)], opts) for group in groups[:2]]
        for work in works:
            with pytest.raises(DistBackendError, match="rank 2"):
                work.wait()
            assert isinstance(work.done.exception(), CollectiveTimeout)


def test_abort_ends_what_waits_on_all_ranks(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        waiting = one.allreduce([torch.ones(1)])
        two.abort()
        with pytest.raises(DistBackendError, match="abort"):
            waiting.wait()
        assert isinstance(waiting.done.exception(), Aborted)


def test_who_left_is_named_and_may_not_call(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        members[1].close()
        with pytest.raises(DistBackendError, match="left the job"):
            two.allreduce([torch.ones(1)]).wait()
        work = one.allreduce([torch.ones(1)])
        with pytest.raises(DistBackendError, match=r"rank 1|peer 1"):
            work.wait()
        assert isinstance(work.done.exception(), RankFailed)


def test_who_has_left_does_not_keep_others_from_sending(address: str) -> None:
    """Also where the first rank that is asked has left before."""
    with joined(address, 3) as members:
        groups = [group_of(member) for member in members]
        everywhere(groups, lambda group, _: group.barrier())
        members[0].close()
        with pytest.raises(DistBackendError, match="rank 0"):
            groups[2].recv([torch.zeros(1)], 0).wait()
        place = torch.zeros(1)
        receive = groups[2].recv_anysource([place])
        groups[1].send([torch.ones(1)], 2).wait()
        assert receive.wait(timedelta(seconds=10))
        assert (receive.source_rank(), place.item()) == (1, 1)

        members[1].close()
        with pytest.raises(DistBackendError, match=r"rank [01] has left"):
            groups[2].recv_anysource([place]).wait(timedelta(seconds=10))


def test_a_handler_of_a_signal_may_leave(address: str) -> None:
    """Also while the thread that it interrupts is beginning an operation."""
    with joined(address, 1) as (member,), member._lock:
        member.close()
        with pytest.raises(Aborted, match="left the job"):
            member.submit(member.comm.barrier).result(1)


def test_leaving_gives_up_what_is_under_way(address: str) -> None:
    with joined(address, 2) as members:
        work = group_of(members[0]).recv([torch.ones(1)], 1)
        begun = time.monotonic()
        members[0].close()
        with pytest.raises(DistBackendError, match="left the job"):
            work.wait()
        assert time.monotonic() - begun < 5
