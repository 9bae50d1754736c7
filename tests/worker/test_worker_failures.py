"""Who is to blame: what ranks leave when they fail, and what `blame` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fmi_client import errors
from lambda_worker import failures, handlers, storage
from lambda_worker.dataset import DatasetError
from lambda_worker.events import EventError, RankTask, parse, parse_rank, whereabouts
from lambda_worker.failures import Failure, Verdict, judge
from tests.worker.worker_data import MakePt

LOST = "rank 3 was lost: connection closed"


def noticed(rank: int, blamed: int | None = 3, kind: str = "RankFailed") -> Failure:
    return Failure(rank, 0, kind, LOST, blamed)


def own(rank: int, kind: str = "DatasetError", text: str = "1.pt: truncated") -> Failure:
    return Failure(rank, 0, kind, text)


# ---------------------------------------------------------------------------- the verdict
def test_the_own_error_of_one_rank_wins_over_what_all_others_noticed() -> None:
    crowd = [noticed(rank, 7, "Aborted") for rank in range(7)]
    verdict = judge([*crowd, own(7)], ())
    assert verdict == Verdict(
        "DatasetError", "rank 7 failed: DatasetError: 1.pt: truncated", 7, can_pass=False
    )


def test_an_error_that_can_pass() -> None:
    verdict = judge([own(1, "StorageError", "cannot read: too many requests")], ())
    assert (verdict.error, verdict.rank, verdict.can_pass) == ("StorageError", 1, True)


@pytest.mark.parametrize("kind", ["EventError", "DatasetError", "ModelError", "EngineError"])
def test_an_error_that_cannot_pass_decides(kind: str) -> None:
    verdict = judge([own(0, "StorageError"), own(5, kind)], ())
    assert (verdict.error, verdict.rank, verdict.can_pass) == (kind, 5, False)
    assert "1 other rank: an error of their own" in verdict.cause


def test_what_fails_on_all_ranks_alike() -> None:
    verdict = judge([own(0, "SecretError"), own(1, "SecretError"), own(2, "SecretError")], ())
    assert "2 other ranks: the same" in verdict.cause


def test_a_rank_that_died_is_named_and_not_those_who_noticed() -> None:
    verdict = judge([noticed(0), noticed(1), noticed(2, 1)], ())
    assert (verdict.error, verdict.rank, verdict.can_pass) == ("RankFailed", 3, True)
    assert verdict.cause.startswith("rank 3 left no word of its own: killed, out of memory")
    assert "noticed by 2 ranks: " + LOST in verdict.cause


def test_a_blamed_rank_with_a_word_of_its_own() -> None:
    last = Failure(3, 0, "CollectiveTimeout", "no answer from rank 1", None)
    verdict = judge([noticed(0), last], ())
    assert "rank 3 did not answer; its own last word: CollectiveTimeout: no answer" in verdict.cause


def test_ranks_that_never_left_a_word() -> None:
    nobody = noticed(0, None, "RendezvousError")
    verdict = judge([nobody], {2, 1}, "Step Functions says: X: y")
    assert verdict.rank == 1
    assert verdict.cause.startswith("rank 1, 2 left neither a result nor an error")
    assert verdict.cause.endswith("Step Functions says: X: y")


def test_nobody_is_to_blame_when_the_server_is_lost() -> None:
    verdict = judge(
        [replace(noticed(r, None, "RendezvousError"), message="lost") for r in (1, 0)], ()
    )
    assert verdict == Verdict(
        "RendezvousError", "rank 0: lost (1 other rank: the same, or like it)", 0
    )


def test_a_cause_is_one_short_line() -> None:
    verdict = judge([own(1, text="a\nb\t" + "c" * 5000)], ())
    assert verdict.cause.startswith("rank 1 failed: DatasetError: a b ccc")
    assert len(verdict.cause) == failures.LONGEST


def test_10000_ranks_are_judged_at_once() -> None:
    began = time.perf_counter()
    verdict = judge([noticed(rank, 9999) for rank in range(9999)], ())
    assert verdict.rank == 9999
    assert time.perf_counter() - began < 5


# ------------------------------------------------------------------- what a rank leaves
@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (errors.RankFailed("gone", rank=3), 3),
        (errors.Aborted(by=2, reason="why", rank=0), 2),
        (errors.CollectiveTimeout("late", missing=[5, 4], rank=0), 4),
        (errors.JoinTimeout("late", missing=[6], rank=0), 6),
        (errors.JoinTimeout("late", rank=0), None),
        (errors.PunchFailed("no way", peer=1, rank=0), 1),
        (errors.RendezvousError("lost", rank=0), None),
        (DatasetError("1.pt"), None),
    ],
)
def test_what_is_recorded(tmp_path: Path, error: Exception, blamed: int | None) -> None:
    task = {"rank": 0, "world_size": 8, "results": str(tmp_path), "init_id": "i"}
    with pytest.raises(type(error)), failures.recorded({"task": task, "epoch": 4}):
        raise error
    assert json.loads((tmp_path / "failed/4/0.json").read_text()) == {
        "rank": 0,
        "epoch": 4,
        "type": type(error).__name__,
        "message": str(error),
        "blamed": blamed,
        "init_id": "i",
        "waiting": False,
    }


def test_a_rank_whose_event_is_wrong_leaves_a_record(tmp_path: Path) -> None:
    with pytest.raises(EventError, match="colour"):
        handlers.infer({"task": {"RANK": "2", "results": str(tmp_path), "colour": 1}, "epoch": 1})
    assert json.loads((tmp_path / "failed/1/2.json").read_text())["type"] == "EventError"


@pytest.mark.parametrize("event", [None, [], {}, {"rank": 1}, {"task": 3}, {"results": "x"}])
def test_an_event_that_names_no_place(event: object) -> None:
    assert whereabouts(event) is None
    with pytest.raises(EventError):
        handlers.infer(event)


def test_a_record_that_cannot_be_written_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(failures, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(storage, "write", lambda *_: stuck.wait(30))
    task = {"rank": 0, "world_size": 1, "results": str(tmp_path), "shard": [["no.pt", 0, 1]]}
    began = time.monotonic()
    with pytest.raises(DatasetError, match="no such file"):
        handlers.infer(task)
    assert time.monotonic() - began < 20
    assert "no record of this rank's failure could be written: it takes longer" in caplog.text
    stuck.set()


def test_the_epoch_of_the_attempt_replaces_the_tasks() -> None:
    task = {"RANK": 0, "world_size": 1, "results": "r", "EPOCH": 1}
    assert parse_rank({"task": task, "epoch": "3"}) == parse(
        RankTask, {"rank": 0, "world_size": 1, "results": "r", "epoch": 3}
    )
    with pytest.raises(EventError, match="epoch: missing"):
        parse_rank({"task": task})
    with pytest.raises(EventError, match="task: got 5"):
        parse_rank({"task": 5, "epoch": 0})


# -------------------------------------------------------------------- init, infer, blame
@pytest.fixture
def payload(make_pt: MakePt, tmp_path: Path) -> dict[str, Any]:
    data = str(make_pt("data/1.pt", 12))
    return {"data": data, "results": str(tmp_path / "out"), "world_size": 3, "run": "r"}


def attempt(tasks: list[Any], epoch: int) -> list[BaseException | None]:
    """All ranks of an attempt, as a Map starts them: what each of them raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        events = [{"task": task, "epoch": epoch} for task in tasks]
        return [f.exception() for f in [pool.submit(handlers.infer, event) for event in events]]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.0)


def test_ranks_in_a_file(payload: dict[str, Any], tmp_path: Path) -> None:
    plan = handlers.init({**payload, "ranks_file": "true", "attempts": "3", "epoch": 4})
    assert "ranks" not in plan
    assert plan["ranks_file"] == {"path": str(tmp_path / "out/r/ranks.json")}
    assert (plan["epoch"], plan["max_epochs"]) == (4, 7)
    ranks = json.loads((tmp_path / "out/r/ranks.json").read_text())
    assert [task["rank"] for task in ranks] == [0, 1, 2]
    asked = json.loads((tmp_path / "out/r/payload.json").read_text())
    assert asked == {**payload, "ranks_file": True, "attempts": 3, "epoch": 4}
    assert attempt(ranks, 4) == [None] * 3
    assert handlers.summarize(plan)["summary"]["rows"] == 12


def test_ranks_in_an_object(payload: dict[str, Any], bucket: Path) -> None:
    plan = handlers.init({**payload, "ranks_file": True, "results": "s3://bucket/results"})
    assert plan["ranks_file"] == {"bucket": "bucket", "key": "results/r/ranks.json"}
    assert len(json.loads((bucket / "results/r/ranks.json").read_text())) == 3


def test_ten_thousand_ranks_leave_a_small_answer(payload: dict[str, Any]) -> None:
    plan = handlers.init({**payload, "ranks_file": True, "world_size": 10_000})
    assert len(json.dumps(plan)) < 4096


def test_a_failed_attempt_is_blamed_on_its_rank_and_the_next_one_goes_well(
    payload: dict[str, Any], rendezvous: str
) -> None:
    plan = handlers.init({**payload, "rendezvous_endpoint": rendezvous, "timeout": 30})
    broken = [dict(task) for task in plan["ranks"]]
    broken[1]["shard"] = [["gone.pt", 0, 1]]
    outcome = attempt(broken, 0)
    assert [type(error) for error in outcome] == [errors.Aborted, DatasetError, errors.Aborted]
    verdict = handlers.blame({**plan, "error": {"Error": "States.TaskFailed", "Cause": "?"}})
    assert (verdict["error"], verdict["rank"], verdict["retry"]) == ("DatasetError", 1, False)
    assert verdict["cause"].startswith("rank 1 failed: DatasetError: ")
    assert verdict["epoch"] == 1
    assert attempt(plan["ranks"], verdict["epoch"]) == [None] * 3
    assert handlers.summarize({**plan, "epoch": 1})["summary"]["rows"] == 12


DYING = """
import json, os, sys
from lambda_worker import handlers
def progress(stage, rows, of):
    if stage == "infer":
        os._exit(9)
handlers.infer(json.load(sys.stdin), None, progress)
"""


def test_a_rank_that_is_killed_is_named(payload: dict[str, Any], rendezvous: str) -> None:
    plan = handlers.init({**payload, "rendezvous_endpoint": rendezvous, "timeout": 50})
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(handlers.infer, plan["ranks"][rank]) for rank in (0, 1)]
        event = json.dumps(plan["ranks"][2])
        done = subprocess.run([sys.executable, "-c", DYING], input=event, text=True, timeout=50)
        assert done.returncode == 9
        found = {type(other.exception()) for other in others}
    assert found == {errors.RankFailed}
    verdict = handlers.blame(plan)
    assert (verdict["error"], verdict["rank"], verdict["retry"]) == ("RankFailed", 2, True)
    assert verdict["cause"].startswith("rank 2 left no word of its own")


def leave(plan: dict[str, Any], failure: Failure) -> None:
    record = {**asdict(failure), "init_id": failure.init_id or plan["init_id"]}
    url = f"{plan['results']}/failed/{failure.epoch}/{failure.rank}.json"
    storage.write(url, json.dumps(record).encode())


def test_the_culprits_word_is_awaited_for_a_moment(payload: dict[str, Any]) -> None:
    plan = handlers.init(payload)
    leave(plan, noticed(0, 2, "Aborted"))
    late = threading.Timer(0.3, leave, (plan, own(2)))
    late.start()
    assert handlers.blame(plan)["error"] == "DatasetError"
    late.join()


@pytest.mark.parametrize(("epoch", "retry"), [(0, True), (1, True), (2, False)])
def test_attempts_end(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch, epoch: int, retry: bool
) -> None:
    quick(monkeypatch)
    plan = {**handlers.init({**payload, "attempts": 3}), "epoch": epoch}
    leave(plan, replace(noticed(0), epoch=epoch))
    verdict = handlers.blame(plan)
    assert (verdict["retry"], verdict["epoch"]) == (retry, epoch + 1)


def test_records_of_other_attempts_and_runs_do_not_count(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    plan = handlers.init({**payload, "epoch": 1})
    leave(plan, own(0))  # of the first attempt
    leave(plan, replace(own(1), epoch=1, init_id="an earlier run of this name"))
    storage.write(f"{plan['results']}/failed/1/2.json", b"{")
    storage.write(f"{plan['results']}/failed/1/notes.txt", b"-")
    leave(plan, replace(noticed(0, 2), epoch=1))
    assert handlers.blame(plan)["rank"] == 2


def test_ranks_that_finished_are_not_blamed(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    plan = handlers.init(payload)
    handlers.infer(plan["ranks"][0])
    leave(plan, noticed(1, None, "RendezvousError"))
    verdict = handlers.blame({**plan, "error": {"Error": "Lambda.Unknown", "Cause": "exit 137"}})
    assert verdict["rank"] == 2
    assert verdict["cause"].endswith("Step Functions says: Lambda.Unknown: exit 137")


def test_no_rank_left_a_word(payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    verdict = handlers.blame({**handlers.init(payload), "error": "?"})
    assert verdict["cause"].startswith("rank 0, 1, 2 left neither a result nor an error")
    assert verdict["retry"] is True


@pytest.fixture
def crowded(payload: dict[str, Any]) -> dict[str, Any]:
    """Of 700 ranks all but the last have noticed that it died."""
    plan = handlers.init({**payload, "world_size": 700, "ranks_file": True})
    for rank in range(699):
        leave(plan, noticed(rank, 699))
    return plan


def test_many_records_are_read_side_by_side_and_in_bounded_time(
    crowded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, stuck, active, most = storage.read, threading.Event(), [0], [0]
    lock = threading.Lock()

    def slow(url: str) -> bytes:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        if "/7.json" in url:
            stuck.wait(50)  # one that hangs costs one reader
        time.sleep(0.002)
        with lock:
            active[0] -= 1
        return read(url)

    monkeypatch.setattr(storage, "read", slow)
    monkeypatch.setattr(failures, "READ_SECONDS", 3.0)
    began = time.monotonic()
    assert handlers.blame(crowded)["rank"] == 699
    assert time.monotonic() - began < 30
    assert 2 < most[0] <= failures.READERS
    stuck.set()


def test_of_many_records_the_telling_one_is_found_among_the_first(
    crowded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(crowded, own(699))
    read, asked = storage.read, list[str]()

    def counted(url: str) -> bytes:
        asked.append(url)
        return read(url)

    monkeypatch.setattr(storage, "read", counted)
    verdict = handlers.blame(crowded)
    assert (verdict["error"], verdict["rank"]) == ("DatasetError", 699)
    assert len(asked) == 2 * failures.WAVE


def test_all_records_are_read_where_the_first_name_nobody(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    plan = handlers.init({**payload, "world_size": 600, "ranks_file": True})
    for rank in range(599):
        leave(plan, noticed(rank, None, "RendezvousError"))
    leave(plan, own(599))  # names are read in their order: not among the first 256
    assert handlers.blame(plan)["rank"] == 599
