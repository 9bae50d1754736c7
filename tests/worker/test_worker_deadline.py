"""A rank that runs short of time says so to all before it is cut off; one that computes listens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmi_client import errors, sync
from lambda_worker import dataset, deadline, failures, handlers, storage, torch_engine
from lambda_worker.deadline import Deadline, DeadlineError, OutOfTime
from lambda_worker.engine import Predict
from lambda_worker.failures import Failure, judge
from tests.worker.worker_data import MakePt


class Context:
    """AWS Lambda's, with so many seconds left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(1000 * (self.end - time.monotonic()))


LONG = 1000.0  # seconds: tests ring the alarm themselves, when the rank is where they want it


def ring() -> None:
    os.kill(os.getpid(), signal.SIGALRM)


# ------------------------------------------------------------------------- the alarm itself
def test_work_is_stopped_a_margin_before_the_end() -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineError) as caught, Deadline(Context(2.0), 3).watched():
        time.sleep(50)
    assert 1.4 < time.monotonic() - began < 20
    assert str(caught.value).startswith("rank 3 has only 0.")
    assert "left of the 2.0 s that its function had, and is still at work (stage start)" in str(
        caught.value
    )
    assert "raise the function's timeout (AWS allows 900 s), or use more ranks" in str(caught.value)


@pytest.mark.parametrize(("seconds", "margin"), [(900, 5.0), (20, 5.0), (8, 2.0), (0.0, 0.0)])
def test_the_margin(seconds: float, margin: float) -> None:
    assert Deadline(Context(seconds), 0).margin == pytest.approx(margin, abs=0.01)


def test_no_time_at_all() -> None:
    with pytest.raises(DeadlineError), Deadline(Context(-3), 0).watched():
        time.sleep(50)


def test_an_alarm_is_not_held_up_by_a_library_that_catches_all_errors() -> None:
    def stubborn() -> None:
        for _ in range(1000):
            with suppress(Exception):
                time.sleep(0.05)

    with pytest.raises(DeadlineError), Deadline(Context(0.2), 0).watched():
        stubborn()


def test_an_alarm_is_not_held_up_by_a_cleanup_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "AGAIN_SECONDS", 0.2)
    began = time.monotonic()

    def tidy() -> None:
        try:
            time.sleep(50)
        finally:
            time.sleep(50)

    with pytest.raises(DeadlineError), Deadline(Context(0.2), 0).watched():
        tidy()
    assert time.monotonic() - began < 30


def test_what_stood_before_stands_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.5)  # pytest's own is put back below
    try:
        for _ in range(2):  # a warm function
            with Deadline(Context(LONG), 0).watched():
                time.sleep(0.3)  # the other alarm is due in the second round
        end = time.monotonic() + 20  # pytest's own alarm cannot help here
        while not heard and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert heard == [signal.SIGALRM]


def test_no_alarm_without_a_context() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for context in (None, object()):
        with Deadline(context, 0).watched():
            assert signal.getsignal(signal.SIGALRM) is handler


def test_a_thread_without_alarms_checks() -> None:
    def work() -> None:
        limit = Deadline(Context(0.2), 0)
        with limit.watched():
            while True:
                limit.check()

    with ThreadPoolExecutor(1) as pool, pytest.raises(DeadlineError):
        pool.submit(work).result(50)


# ------------------------------------------------------------------------------ of a rank
@pytest.fixture
def plan(make_pt: MakePt, tmp_path: Path, rendezvous: str) -> dict[str, Any]:
    event = {"data": str(make_pt("data/1.pt", 400)), "results": str(tmp_path / "out"), "run": "r"}
    options = {"world_size": 2, "rendezvous_endpoint": rendezvous, "timeout": 50, "batch_size": 1}
    return handlers.init({**event, **options})


def other(plan: dict[str, Any], then: Callable[[sync.Communicator], Any]) -> Any:
    """Rank 1, of which only the communicator is there; what it raised."""
    server = plan["ranks"][1]["rendezvous_endpoint"]
    try:
        with sync.connect(server, job=plan["run"], rank=1, size=2, timeout=50) as comm:
            return then(comm)
    except errors.FmiError as error:
        return error


@contextmanager
def other_rank(
    plan: dict[str, Any], then: Callable[[sync.Communicator], Any]
) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(other, plan, then)


def never(comm: sync.Communicator) -> None:
    comm.recv(0)


def expect_deadline(plan: dict[str, Any], theirs: Any, stage: str) -> DeadlineError:
    """Run rank 0 until its alarm; everybody must be told of it."""
    with pytest.raises(DeadlineError) as caught:
        handlers.infer({"task": plan["ranks"][0], "epoch": 0}, Context(LONG))
    told = theirs.result(50)
    assert isinstance(told, errors.Aborted)
    assert told.by == 0
    assert "rank 0 has only 99" in told.reason
    assert f"(stage {stage})" in str(caught.value)
    record = json.loads(Path(plan["results"], "failed/0/0.json").read_text())
    assert (record["type"], record["waiting"]) == ("DeadlineError", caught.value.waiting)
    return caught.value


def test_while_it_waits_for_others(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = sync.Communicator.barrier

    def waiting(comm: sync.Communicator) -> None:
        threading.Timer(0.1, ring).start()
        barrier(comm)

    monkeypatch.setattr(sync.Communicator, "barrier", waiting)
    with other_rank(plan, never) as theirs:
        error = expect_deadline(plan, theirs, "barrier")
    assert error.waiting
    assert "still waiting for the other ranks" in str(error)


def meet_and_wait(comm: sync.Communicator) -> None:
    comm.barrier()
    never(comm)


def test_while_it_computes(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def open_torch(*_: Any) -> Predict:
        def predict(images: Any, magnitudes: Any) -> Any:
            threading.Timer(0.1, ring).start()
            while True:
                time.sleep(0.01)

        return predict

    monkeypatch.setattr(torch_engine, "open_torch", open_torch)
    with other_rank(plan, meet_and_wait) as theirs:
        assert not expect_deadline(plan, theirs, "infer").waiting


def test_while_rows_do_not_come(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, asked = threading.Event(), threading.Event()

    def fill(*_: Any) -> None:
        if not asked.is_set():
            asked.set()
            threading.Timer(0.1, ring).start()
        stuck.wait(50)

    monkeypatch.setattr(dataset._ByRange, "fill", fill)
    began = time.monotonic()
    with other_rank(plan, meet_and_wait) as theirs:
        expect_deadline(plan, theirs, "infer")
    assert time.monotonic() - began < 30  # and not when the read gives up
    stuck.set()


@contextmanager
def slow_s3(on_request: Callable[[], None]) -> Iterator[str]:
    """An S3 server that begins an answer of a megabyte, and never gets on with it."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            client, _ = server.accept()
            with client, suppress(OSError):
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                on_request()
                while not over.wait(0.05):
                    client.sendall(b".")

        serving = pool.submit(serve)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        over.set()
        serving.result(50)


def test_while_it_downloads(
    bucket: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan["ranks"][0]["model"] = "s3://bucket/model.safetensors"
    with slow_s3(lambda: threading.Timer(0.1, ring).start()) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with other_rank(plan, never) as theirs:
            expect_deadline(plan, theirs, "load")


def test_while_it_joins(plan: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match="waiting for the other ranks to join"):
        handlers.infer(plan["ranks"][0], Context(2.0))
    assert (tmp_path / "out/r/failed/0/0.json").is_file()


def test_a_rank_in_a_thread_stops_after_a_batch(
    plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    monkeypatch.setattr(torch_engine, "open_torch", slow(batches))
    late = Context(LONG)

    def progress(stage: str, rows: int, of: int) -> None:
        if rows == 2:
            monkeypatch.setattr(deadline, "MARGIN_SECONDS", 2 * LONG)
            monkeypatch.setattr(deadline, "MARGIN_SHARE", 2.0)

    with other_rank(plan, meet_and_wait) as theirs, ThreadPoolExecutor(1) as pool:
        working = pool.submit(handlers.infer, plan["ranks"][0], late, progress)
        assert isinstance(working.exception(50), DeadlineError)
        assert isinstance(theirs.result(50), errors.Aborted)
    assert len(batches) == 2


def test_a_rank_with_time_is_left_alone(plan: dict[str, Any]) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(handlers.infer, plan["ranks"][1], Context(LONG))
        assert handlers.infer(plan["ranks"][0], Context(LONG))["rows"] == 200
        assert theirs.result()["rows"] == 200
    assert signal.getsignal(signal.SIGALRM) is handler


def test_who_waited_is_not_to_blame_for_the_time() -> None:
    waited = Failure(0, 0, "DeadlineError", "waiting", waiting=True)
    worked = Failure(2, 0, "DeadlineError", "at work")
    assert judge([waited, worked], ()).rank == 2
    assert judge([waited], ()).rank == 0


def test_who_waited_is_not_blamed_before_the_other_has_spoken(plan: dict[str, Any]) -> None:
    def leave(rank: int, waiting: bool) -> None:
        text = json.dumps(
            {"rank": rank, "epoch": 0, "type": "DeadlineError", "message": "m"}
            | {"init_id": plan["init_id"], "waiting": waiting}
        )
        storage.write(f"{plan['results']}/failed/0/{rank}.json", text.encode())

    big = {**plan, "world_size": 8}
    leave(0, True)
    late = threading.Timer(0.3, leave, (5, False))
    late.start()
    assert handlers.blame(big)["rank"] == 5
    late.join()
    assert failures.SETTLE_SECONDS > 0.3


# --------------------------------------------------------------- another rank's failure
DYING = """
import os, sys, fmi_client
comm = fmi_client.sync.connect(sys.argv[1], job="r", rank=1, size=2, timeout=50)
comm.barrier()
os._exit(9)
"""


def slow(seen: list[int]) -> Callable[..., Predict]:
    def open_torch(*_: Any) -> Predict:
        def predict(images: Any, magnitudes: Any) -> Any:
            seen.append(len(images))
            time.sleep(0.05)
            return magnitudes[:, 0]

        return predict

    return open_torch


def test_a_rank_that_computes_hears_of_a_death_between_batches(
    plan: dict[str, Any], rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    monkeypatch.setattr(torch_engine, "open_torch", slow(batches))
    with subprocess.Popen([sys.executable, "-c", DYING, rendezvous]) as dying:
        with pytest.raises(errors.RankFailed) as caught:
            handlers.infer(plan["ranks"][0])
        assert dying.wait(50) == 9
    assert (caught.value.rank, caught.value.op) == (1, "poll")
    assert 0 < len(batches) < 150  # of 200


def test_a_rank_that_tries_batch_sizes_hears_of_an_abort(
    plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trying = threading.Event()

    def endless(predict: Predict, rows: int) -> Any:
        trying.set()
        for _ in range(400):
            predict(np.zeros((1, 5, 32, 32), np.float32), np.zeros((1, 5), np.float32))
        raise AssertionError("nothing was heard")

    def give_up(comm: sync.Communicator) -> None:
        assert trying.wait(50)
        comm.abort("why")

    monkeypatch.setattr(torch_engine, "open_torch", slow([]))
    monkeypatch.setattr("lambda_worker.batching.calibrate", endless)
    with other_rank(plan, give_up) as theirs:
        with pytest.raises(errors.Aborted) as caught:
            handlers.infer({**plan["ranks"][0], "batch_size": "auto"})
        theirs.result()
    assert caught.value.op == "poll"


def test_out_of_time_is_no_exception() -> None:
    assert not issubclass(OutOfTime, Exception)
    assert issubclass(DeadlineError, Exception)
