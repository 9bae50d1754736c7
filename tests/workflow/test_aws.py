"""A run on AWS, as the launcher sees and steers it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from fake_aws import MACHINE, FakeAws, Frame, ranks, succeeded
from launched import until

from lambda_worker import storage
from workflow import aws as launcher
from workflow.aws import Target, run_on_aws
from workflow.aws_calls import AwsError
from workflow.calls import RunFailed
from workflow.plan import Event, RanksProgress, RunPlan, Step

SECRETS = ("arn:aws:secretsmanager:eu-west-1:1:secret:s", "arn:aws:secretsmanager:eu-west-1:1:k")
TARGET = Target(MACHINE, *SECRETS)


@pytest.fixture
def aws(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> FakeAws:
    """The same, and a launcher that looks often; S3 is asked over HTTP by processes only."""

    def read(url: str) -> bytes:
        try:
            return aws.objects[url.removeprefix("s3://")]
        except KeyError:
            raise storage.StorageError(f"cannot read {url}: no such object") from None

    monkeypatch.setattr(storage, "read", read)
    monkeypatch.setattr(launcher, "_SOON", 0.001)
    monkeypatch.setattr(launcher, "_LATE", 0.01)
    return aws


def plan(**fields: Any) -> RunPlan:
    usual = {
        "data": "s3://bucket/datasets/small",
        "results": "s3://bucket/results",
        "run": "r-1",
        "rendezvous": "fmi.example.org:10000",
        "timeout": 60,
    }
    return RunPlan(**usual | fields)


def run(**fields: Any) -> tuple[Any, list[Event]]:
    events: list[Event] = []
    return asyncio.run(run_on_aws(plan(**fields), TARGET, events.append)), events


def failure(**fields: Any) -> RunFailed:
    with pytest.raises(RunFailed) as caught:
        run(**fields)
    return caught.value


def steps(events: list[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, Step)]


def test_a_run_that_goes_well(aws: FakeAws) -> None:
    aws.frames = [
        Frame("RUNNING"),
        Frame("RUNNING", (ranks(running=4),)),
        Frame("RUNNING", (ranks(running=1, succeeded=3),)),
        Frame("RUNNING", (ranks("SUCCEEDED", succeeded=4),)),
        Frame("RUNNING", (ranks("SUCCEEDED", succeeded=4),)),
        succeeded("r-1"),
    ]
    result, events = run()
    assert steps(events) == ["start", "init", "infer", "summarize"]
    assert [span.name for span in result.spans] == steps(events)  # records of an older version
    assert {span.rank for span in result.spans} == {None}
    assert sum(span.seconds for span in result.spans) == pytest.approx(result.seconds, abs=1e-3)
    counts = [event for event in events if isinstance(event, RanksProgress)]
    assert counts == [(4, 0, 0, 4), (1, 3, 0, 4), (0, 4, 0, 4)]
    assert result.summary["rows"] == 40
    assert [record["rank"] for record in result.records] == [0, 1, 2, 3]
    assert result.combined_data == "s3://bucket/results/r-1/combined_data.json"
    assert result.execution_arn == aws.arn
    assert not aws.asked("StopExecution")


def test_the_execution_bears_the_name_of_the_run_and_gets_a_payload(aws: FakeAws) -> None:
    run(world_size=7, batch_size="auto", model="s3://bucket/models/m.safetensors", strict=True)
    (start,) = aws.asked("StartExecution")
    event = json.loads(start["input"])
    assert (start["name"], start["stateMachineArn"]) == ("r-1", MACHINE)
    assert len(event.pop("unique_id")) == 16
    assert event == {
        "world_size": 7,
        "batch_size": "auto",
        "data": "s3://bucket/datasets/small",
        "results": "s3://bucket/results",
        "model": "s3://bucket/models/m.safetensors",
        "run": "r-1",
        "fmi_enabled": True,
        "rendezvous_endpoint": "fmi.example.org:10000",
        "server_secret_arn": SECRETS[0],
        "key_arn": SECRETS[1],
        "engine": "torch",
        "precision": "fp32",
        "strict": True,
    }


def test_two_starts_of_one_name_are_never_taken_for_one(aws: FakeAws) -> None:
    run()
    aws.looks = 0
    run()
    first, second = (call["input"] for call in aws.asked("StartExecution"))
    assert first != second


def test_a_run_without_a_name_gets_one_of_its_own(aws: FakeAws) -> None:
    run(run=None)
    aws.looks = 0
    run(run=None)
    names = {call["name"] for call in aws.asked("StartExecution")}
    assert len(names) == 2
    inputs = {json.loads(call["input"])["run"] for call in aws.asked("StartExecution")}
    assert inputs == names


def test_without_a_rendezvous_no_secret_is_named(aws: FakeAws) -> None:
    run(fmi=False, rendezvous=None)
    event = json.loads(aws.asked("StartExecution")[0]["input"])
    assert event["fmi_enabled"] is False
    assert not [name for name in event if name.endswith("_arn") or name.startswith("rendez")]


def test_another_attempt_is_shown(aws: FakeAws) -> None:
    lost = ranks("FAILED", succeeded=1, failed=2, aborted=1)
    aws.frames = [
        Frame("RUNNING", (ranks(running=4),)),
        Frame("RUNNING", (lost,)),
        Frame("RUNNING", (lost, ranks(running=4))),
        Frame("SUCCEEDED", (lost, ranks("SUCCEEDED", succeeded=4)), succeeded("r-1").more),
    ]
    result, events = run()
    assert steps(events) == ["start", "init", "infer", "blame", "infer", "summarize"]
    assert [span.name for span in result.spans if span.rank is None] == steps(events)
    texts = [event.text for event in events if isinstance(event, Step)]
    assert texts[2] == "infer: 4 ranks"
    assert texts[4] == "infer: 4 ranks, attempt 2"
    assert RanksProgress(0, 1, 3, 4) in events


def test_a_failed_rank_is_named(aws: FakeAws) -> None:
    cause = "rank 2 failed: DatasetError: bad.pt: truncated"
    end = {"error": "DatasetError", "cause": cause}
    aws.frames = [Frame("FAILED", (ranks("FAILED", failed=1, aborted=3),), end)]
    error = failure()
    assert str(error).splitlines() == [
        "rank 2 failed: DatasetError: bad.pt: truncated",
        f"  execution: {aws.arn}",
        "  logs:      CloudWatch, log group /cosmic/w",
    ]
    assert error.as_json() == {
        "who": "rank 2",
        "type": "DatasetError",
        "message": "bad.pt: truncated",
        "rank": 2,
        "execution_arn": aws.arn,
        "log_group": "/cosmic/w",
    }
    (function,) = aws.asked("GetFunctionConfiguration")
    assert "cosmic-infer" in function


@pytest.mark.parametrize(
    ("status", "end", "says", "rank"),
    [
        (
            "FAILED",
            {"error": "RankFailed", "cause": "rank 1 left no word of its own: killed?"},
            "rank 1 left no word of its own: killed?",
            1,
        ),
        (
            "FAILED",
            {"error": "DatasetError", "cause": "s3://b/x: no .pt file there"},
            "init failed: DatasetError: s3://b/x: no .pt file there",
            None,
        ),
        ("FAILED", {"error": "States.Runtime"}, "init failed: States.Runtime: no cause", None),
        (
            "ABORTED",
            {"error": "Stopped", "cause": "by hand"},
            "the execution was stopped (Stopped: by hand)",
            None,
        ),
        ("TIMED_OUT", {}, "the execution took longer than the state machine lets it", None),
    ],
)
def test_other_ends(
    aws: FakeAws, status: str, end: dict[str, str], says: str, rank: int | None
) -> None:
    aws.frames = [Frame(status, (), end)]
    error = failure()
    assert str(error).startswith(says)
    assert error.rank == rank


def test_a_log_group_that_nobody_has_chosen(aws: FakeAws) -> None:
    aws.log_group = ""
    aws.frames = [
        Frame("FAILED", (ranks("FAILED", failed=4),), {"error": "E", "cause": "rank 0 x"})
    ]
    assert failure().as_json()["log_group"] == "/aws/lambda/cosmic-infer"


def test_who_may_not_see_the_function_still_learns_the_error(aws: FakeAws) -> None:
    denied = (400, "AccessDeniedException", "not you")
    aws.errors["DescribeStateMachineForExecution"] = [denied]
    aws.frames = [Frame("FAILED", (), {"error": "E", "cause": "c"})]
    assert str(failure()) == f"init failed: E: c\n  execution: {aws.arn}"


def test_the_time_limit_stops_the_execution(aws: FakeAws) -> None:
    aws.frames = [Frame("RUNNING", (ranks(running=3, succeeded=1),))]
    error = failure(timeout=1)
    assert str(error) == (
        "the run took longer than 1 s (--timeout), at step infer, 1 of 4 ranks done; execution r-1 "
        "is stopped; functions that run already cannot be, and end by themselves"
    )
    (stop,) = aws.asked("StopExecution")
    assert stop["executionArn"] == aws.arn
    assert "--timeout" in stop["cause"]


def cancelled(aws: FakeAws, operation: str) -> str:
    """Cancel a run when it calls an operation; returns what it says of what is left."""

    async def main() -> None:
        task = asyncio.create_task(run_on_aws(plan(), TARGET, lambda event: None))
        loop = asyncio.get_running_loop()

        def stop(called: str) -> None:
            if called == operation:
                aws.on_call = lambda called: None
                loop.call_soon_threadsafe(task.cancel)
                until(task.cancelling)

        aws.on_call = stop
        await task

    with pytest.raises(asyncio.CancelledError) as caught:
        asyncio.run(main())
    return str(caught.value)


@pytest.mark.parametrize("operation", ["StartExecution", "DescribeExecution", "ListMapRuns"])
def test_cancelling_stops_the_execution(aws: FakeAws, operation: str) -> None:
    aws.frames = [Frame("RUNNING")]
    left = cancelled(aws, operation)
    assert (
        left
        == "execution r-1 is stopped; functions that run already cannot be, and end by themselves"
    )
    (stop,) = aws.asked("StopExecution")
    assert stop["executionArn"] == aws.arn


def test_an_execution_that_cannot_be_stopped_is_not_said_to_be(aws: FakeAws) -> None:
    aws.frames = [Frame("RUNNING")]
    aws.errors["StopExecution"] = [(400, "AccessDeniedException", "User is not authorized")]
    left = cancelled(aws, "DescribeExecution")
    assert "GOES ON" in left
    assert "User is not authorized" in left
    assert left.endswith(f"aws stepfunctions stop-execution --execution-arn {aws.arn}")


def test_an_execution_that_has_ended_is_not_stopped(aws: FakeAws) -> None:
    aws.frames = [Frame("FAILED", (), {"error": "E"})]
    left = cancelled(aws, "DescribeStateMachineForExecution")
    assert left == f"the execution {aws.arn} had ended already"
    assert not aws.asked("StopExecution")


def test_results_that_cannot_be_read(aws: FakeAws) -> None:
    aws.objects.clear()
    says = "the execution has succeeded, but I cannot read s3://bucket/results/r-1/combined_data"
    with pytest.raises(storage.StorageError, match=says):
        run()


def test_nothing_is_stopped_that_did_not_start(aws: FakeAws) -> None:
    aws.errors["StartExecution"] = [(400, "ExecutionAlreadyExists", "it is there")]
    with pytest.raises(AwsError, match="choose another --run") as caught:
        run()
    assert caught.value.code == "ExecutionAlreadyExists"
    assert not aws.asked("StopExecution")


def test_an_outage_is_waited_for(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", _no_delay)
    aws.errors["DescribeExecution"] = [(400, "ThrottlingException", "Rate exceeded")] * 9
    result, events = run()
    assert result.run == "r-1"
    texts = [event.text for event in events if isinstance(event, Step)]
    assert texts[1].startswith("init: splitting")
    assert texts[2].startswith("init: no news, for I cannot follow the execution: AWS throttles")
    assert texts[3] == texts[1]
    assert len([text for text in texts if "no news" in text]) == 1
    assert [span.name for span in result.spans] == ["start", "init", "infer", "summarize"]


def _no_delay(*arguments: object) -> float:
    return 0.0


def test_an_error_that_does_not_pass_says_that_the_execution_goes_on(aws: FakeAws) -> None:
    aws.errors["DescribeExecution"] = [(400, "ExpiredTokenException", "expired")]
    with pytest.raises(AwsError) as caught:
        run()
    assert "the credentials have expired: renew them" in str(caught.value)
    assert str(caught.value).endswith(f"the execution goes on: {aws.arn}")


@pytest.mark.parametrize("operation", ["ListMapRuns", "DescribeMapRun"])
def test_without_the_right_to_see_ranks_the_run_is_followed(aws: FakeAws, operation: str) -> None:
    aws.errors[operation] = [(400, "AccessDeniedException", f"may not {operation}")] * 9
    aws.frames = [Frame("RUNNING", (ranks(running=4),))] * 3 + [succeeded("r-1")]
    result, events = run()
    assert result.run == "r-1"
    assert len(aws.asked(operation)) == 1
    told = [event.text for event in events if isinstance(event, Step) and operation in event.text]
    assert len(told) == 1
    assert [span.name for span in result.spans] == ["start", "init", "infer"]


def test_looks_become_rarer_while_nothing_happens(
    aws: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (launcher._SOON, launcher._LATE) == (0.001, 0.01)
    aws.frames = [*[Frame("RUNNING")] * 40, Frame("RUNNING", (ranks(running=4),)), succeeded("r-1")]
    pauses: list[float] = []
    sleep = asyncio.sleep

    ours = threading.current_thread()

    def pause(seconds: float) -> Any:
        if threading.current_thread() is not ours:  # a server of other tests
            return sleep(seconds)
        pauses.append(seconds)
        return sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    run()
    assert pauses[0] < 0.002
    assert pauses == [*sorted(pauses[:-1]), pauses[-1]]
    assert max(pauses) == 0.01  # never more
    assert pauses[-1] == 0.001  # something has happened
