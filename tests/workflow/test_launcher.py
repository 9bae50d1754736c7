"""The launcher, around fake workers and a fake server that fail on demand."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from launched import alive, pids, recorded, until

from workflow import calls, local, serving
from workflow.local import RunFailed, run_job
from workflow.plan import Event, RankProgress, RunPlan, Span, Step
from workflow.processes import ProcessFamily

pytestmark = pytest.mark.alone

Plan = Callable[..., RunPlan]


async def failure(plan: RunPlan) -> RunFailed:
    with pytest.raises(RunFailed) as caught:
        await run_job(plan, lambda event: None)
    return caught.value


def assert_nothing_left(folder: Path, processes: int) -> None:
    assert len(pids(folder)) == processes
    assert not [pid for pid in pids(folder) if alive(pid)]
    assert not list(Path(folder, "tmp").iterdir())


async def test_success_tells_every_step_and_rank(plan: Plan, tmp_path: Path) -> None:
    events: list[Event] = []
    result = await run_job(plan(), events.append)
    assert [e.name for e in events if isinstance(e, Step)] == ["init", "infer", "summarize"]
    ranks = [e for e in events if isinstance(e, RankProgress)]
    assert {e.rank for e in ranks if e.rows == 10} == {0, 1, 2, 3}
    # The worker said "0 of 0" while it joined; init had told how many rows there are.
    assert {e.of for e in ranks} == {10}
    assert [record["rank"] for record in result.records] == [0, 1, 2, 3]
    assert recorded(tmp_path, "fake-run/combined_data.json") == result.records
    assert result.run == "fake-run"
    assert_nothing_left(tmp_path, processes=4)


async def test_the_result_has_a_span_of_every_step_and_of_every_rank(plan: Plan) -> None:
    before = time.time()
    result = await run_job(plan(world_size=2), lambda event: None)
    own = [span for span in result.spans if span.rank is None]
    assert [span.name for span in own] == ["init", "infer", "summarize"]
    assert before - 0.05 < own[0].start
    for span, after in pairwise(own):
        assert span.seconds > 0
        assert span.start + span.seconds == pytest.approx(after.start, abs=1e-6)
    assert sum(span.seconds for span in own) == pytest.approx(result.seconds, abs=0.2)
    assert [span for span in result.spans if span.rank is not None] == [
        Span(rank, "infer", 1.8e9, 0.5) for rank in range(2)
    ]


async def test_init_gets_the_plan(plan: Plan, tmp_path: Path) -> None:
    asked = plan(world_size=1, batch_size=7, model="m.safetensors", precision="bf16")
    await run_job(asked, lambda event: None)
    event = recorded(tmp_path, "fake-run/init.json")
    assert event["batch_size"] == 7
    assert (event["engine"], event["precision"]) == ("torch", "bf16")
    assert event["model"] == "m.safetensors"
    assert event["fmi_enabled"] is False
    assert event["timeout"] == 30
    assert event["threads"] == local.cores()
    assert "rendezvous_endpoint" not in event


async def test_threads_are_shared_out(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    result = await run_job(plan(world_size=3), lambda event: None)
    environment = result.records[0]["environment"]
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["MALLOC_ARENA_MAX"] == "1"
    assert environment["LOCAL_WORLD_SIZE"] == str(len(result.records))


async def test_more_ranks_than_the_memory_has_room_for(plan: Plan, tmp_path: Path) -> None:
    error = await failure(plan(world_size=10_000_000))
    assert str(error).startswith("the run needs 1,500,000.0 GB of memory or more for 10,000,000 ")
    assert str(error).endswith("GB are free: take a smaller --world-size, or --on aws")
    assert_nothing_left(tmp_path, processes=0)


async def test_the_failed_ranks_own_error_is_shown_at_once(plan: Plan, tmp_path: Path) -> None:
    began = time.monotonic()
    error = await failure(plan({"infer 2": "error", "infer 0": "hang", "infer 1": "hang"}))
    assert str(error) == "rank 2 failed: DatasetError: bad.pt: truncated"
    assert error.rank == 2
    assert time.monotonic() - began < 2
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


async def test_ranks_that_only_noticed_do_not_hide_the_culprit(plan: Plan, tmp_path: Path) -> None:
    notice = {f"infer {rank}": "notice" for rank in (0, 1, 3)}
    error = await failure(plan({"infer 2": "error, last", **notice}))
    assert str(error) == "rank 2 failed: DatasetError: bad.pt: truncated"
    assert_nothing_left(tmp_path, processes=4)


async def test_without_a_culprit_the_first_notice_is_shown(plan: Plan) -> None:
    began = time.monotonic()
    error = await failure(plan({"infer 0": "notice", "infer 2": "hang"}))
    assert str(error) == "rank 0 failed: RankFailed: rank 2 is gone"
    assert time.monotonic() - began < 2.5


async def test_a_killed_rank_is_named_with_the_signal(plan: Plan, tmp_path: Path) -> None:
    hang = {f"infer {rank}": "hang" for rank in (0, 1, 3)}
    error = await failure(plan({"infer 2": "kill", **hang}))
    assert str(error) == "rank 2 was killed by SIGKILL (out of memory?)"
    assert_nothing_left(tmp_path, processes=4)


async def test_timeout_says_who_was_at_work(plan: Plan, tmp_path: Path) -> None:
    work = asyncio.create_task(failure(plan({"infer 1": "hang for good"}, timeout=2)))
    error = await work
    assert str(error).startswith("the run took longer than 2 s (--timeout); still running: rank")
    assert "rank 1 (infer, 10 of 10 rows)" in str(error)
    # Rank 1 ignores SIGTERM and has a child: both are gone.
    assert_nothing_left(tmp_path, processes=5)


async def test_timeout_outside_the_ranks_names_the_step(plan: Plan) -> None:
    error = await failure(plan({"summarize": "hang"}, timeout=1, world_size=1))
    assert str(error) == "the run took longer than 1 s (--timeout); it was at step summarize"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("talk", "rank 1 wrote on stdout what is no message of a worker: Loading the model..."),
        ("odd progress", 'rank 1 wrote on stdout what is no message of a worker: {"progress"'),
        ("shout", "rank 1 wrote a line of over 16,777,216 bytes on stdout"),
        ("crash", "rank 1 exited with code 1; its last words:\n  Traceback: no module named torch"),
        ("leave", "rank 1 ended without a result"),
    ],
)
async def test_a_worker_that_breaks_the_protocol(plan: Plan, what: str, text: str) -> None:
    error = await failure(plan({"infer 1": what}))
    assert str(error).startswith(text)


async def test_a_worker_that_cannot_be_started(plan: Plan) -> None:
    error = await failure(plan(worker=("/nowhere/python",)))
    assert str(error) == "init cannot be started: /nowhere/python: No such file or directory"


async def test_cancelling_ends_all_processes(plan: Plan, tmp_path: Path) -> None:
    hang = {f"infer {rank}": "hang" for rank in range(4)}
    work = asyncio.create_task(run_job(plan(hang, fmi=True), lambda event: None))
    while len(pids(tmp_path)) < 5:
        assert not work.done()
        await asyncio.sleep(0.005)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert_nothing_left(tmp_path, processes=5)


# -- the rendezvous server ----------------------------------------------------------------------


async def test_server_gets_a_private_secret_and_workers_fresh_credentials(
    plan: Plan, tmp_path: Path
) -> None:
    seen, on_disk = [], []

    def look(event: Event) -> None:
        if event[0] != "server":  # from here on it listens
            on_disk.extend(tmp_path.rglob("secret"))

    for _ in range(2):
        result = await run_job(plan(fmi=True), look)
        server = recorded(tmp_path, "server.json")
        assert server["mode"] == "0o600"
        assert server["options"][:6] == ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
        environments = [record["environment"] for record in result.records]
        assert environments.count(environments[0]) == 4
        seen += [server["secret"], environments[0]["FMI_KEY"], environments[0]["FMI_TOKEN"]]
    assert len(set(seen)) == 6
    assert not on_disk
    assert bytes.fromhex(seen[1])
    event = recorded(tmp_path, "fake-run/init.json")
    assert event["rendezvous_endpoint"] == "127.0.0.1:4321"
    assert_nothing_left(tmp_path, processes=5)


async def test_somebody_elses_server_is_used(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMI_TOKEN", "mine")
    async with await asyncio.start_server(
        lambda reader, writer: writer.close(), "localhost", 0
    ) as server:
        endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run_job(plan(fmi=True, rendezvous=endpoint), lambda event: None)
    event = recorded(tmp_path, "fake-run/init.json")
    assert event["rendezvous_endpoint"] == endpoint
    assert result.records[0]["environment"]["FMI_TOKEN"] == "mine"
    assert len(result.records[0]["environment"]["FMI_KEY"]) == 64
    assert recorded(tmp_path, "server.json") is None


@pytest.mark.usefixtures("ipv6")
async def test_somebody_elses_server_may_be_at_an_address_of_ipv6(plan: Plan) -> None:
    async with await asyncio.start_server(
        lambda reader, writer: writer.close(), "::1", 0
    ) as server:
        endpoint = f"[::1]:{server.sockets[0].getsockname()[1]}"
        await run_job(plan(fmi=True, rendezvous=endpoint), lambda event: None)


async def test_nobody_listens_at_the_given_endpoint(plan: Plan, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
    error = await failure(plan(fmi=True, rendezvous=endpoint))
    assert str(error).startswith(
        f"the rendezvous server at {endpoint} cannot be reached (Connection refused"
    )
    assert "leave out --rendezvous" in str(error)
    assert_nothing_left(tmp_path, processes=0)


async def test_a_server_that_refuses_to_start(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "refuse")
    error = await failure(plan(fmi=True))
    assert str(error).startswith("the rendezvous server exited with code 2; its last words:")
    assert "config.invalid" in str(error)
    assert_nothing_left(tmp_path, processes=1)


async def test_a_server_that_never_listens(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "mute")
    monkeypatch.setattr(serving, "_START_SECONDS", 0.5)
    error = await failure(plan(fmi=True))
    assert str(error).startswith("the rendezvous server did not listen within 0.5 s")


async def test_a_server_that_dies_during_the_run(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "die")
    hang = {f"infer {rank}": "hang" for rank in range(4)}
    error = await failure(plan(hang, fmi=True))
    text = "the rendezvous server was killed by SIGKILL (out of memory?) during the run"
    assert str(error) == text
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


async def test_a_timeout_of_many_ranks_names_a_few(plan: Plan) -> None:
    async with ProcessFamily() as family:
        job = local._Job(plan(), lambda event: None, family)
        job.at_work = {rank: RankProgress(rank, "join", 0, 5) for rank in range(20)}
    assert "rank 7 (join, 0 of 5 rows) and 12 more" in job.whereabouts()


# -- pieces ------------------------------------------------------------------------------------


def test_every_error_of_the_communicator_counts_as_noticed() -> None:
    kinds = ("RankFailed", "Aborted", "CollectiveTimeout", "JoinTimeout")
    assert all(RunFailed("rank 0", "x", kind=kind).only_noticed for kind in kinds)
    assert not any(RunFailed("rank 0", "x", kind=k).only_noticed for k in ("ModelError", None))


def test_a_failure_as_json() -> None:
    error = RunFailed("rank 3", "no such file", kind="DatasetError", rank=3)
    fields = {"who": "rank 3", "type": "DatasetError", "message": "no such file", "rank": 3}
    assert error.as_json() == fields


def test_last_words_are_the_last_five_lines() -> None:
    log = "\n".join(str(n) for n in range(9))
    assert calls.with_log("ended", log) == "ended; its last words:\n  4\n  5\n  6\n  7\n  8"
    assert calls.with_log("ended", "") == "ended"


def test_alive_knows_the_dead() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    until(lambda: not alive(child))
    os.waitpid(child, 0)
    assert alive(os.getpid())
