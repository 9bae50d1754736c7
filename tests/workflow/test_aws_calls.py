"""Every error of AWS is one line that says what to do."""

from __future__ import annotations

import pytest
from fake_aws import ACCOUNT, FakeAws

from workflow import aws_calls
from workflow.aws_calls import AwsError, client, find_stack, state_machine_arn


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(wait, lambda *context: 0.0)


def error(operation: str = "describe_execution") -> AwsError:
    """What a call of Step Functions comes to."""
    with (
        pytest.raises(AwsError) as caught,
        client("stepfunctions") as aws,
        aws_calls.aws_errors("follow the execution"),
    ):
        getattr(aws, operation)(executionArn="arn")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("code", "says", "passes"),
    [
        ("AccessDeniedException", "access denied: User x may not; allow it in the policy", False),
        ("ExecutionAlreadyExists", "names of executions for 90 days: choose another --run", False),
        ("ExecutionLimitExceeded", "wait for some to end", False),
        ("ExpiredTokenException", "the credentials have expired: renew them", False),
        ("InvalidSignatureException", "wrong secret key: check AWS_SECRET_ACCESS_KEY", False),
        ("StateMachineDoesNotExist", "no such state machine: check --state-machine", False),
        ("ThrottlingException", "throttles the calls, even after waiting: try again", True),
        ("UnrecognizedClientException", "unknown access key: check AWS_ACCESS_KEY_ID", False),
        ("SomethingNew", "SomethingNew: User x may not", False),
    ],
)
def test_what_aws_answers(aws: FakeAws, code: str, says: str, passes: bool) -> None:
    aws.errors["DescribeExecution"] = [(400, code, "User x\n may not.")] * 4
    found = error()
    assert str(found).startswith("cannot follow the execution: ")
    assert says in str(found)
    assert (found.code, found.passes) == (code, passes)


def test_a_server_in_trouble_may_recover(aws: FakeAws) -> None:
    aws.errors["DescribeExecution"] = [(503, "ServiceUnavailable", "later")] * 4
    assert error().passes
    assert len(aws.asked("DescribeExecution")) == 4  # and was asked again before that


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AWS_DEFAULT_REGION": ""}, "no region: set AWS_DEFAULT_REGION"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials: set AWS_PROFILE"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "no credentials: set AWS_PROFILE"),
        ({"AWS_PROFILE": "mine"}, "no such profile: check AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense; check --endpoint-url"),
    ],
)
def test_what_is_wrong_here(
    aws: FakeAws, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    for name, value in change.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert says in str(error())


def test_nobody_there(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    found = error()
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:1/"' in str(found)
    assert "check --endpoint-url or AWS_ENDPOINT_URL" in str(found)
    assert found.passes


def test_the_outputs_of_a_stack(aws: FakeAws) -> None:
    aws.outputs = {"StateMachineArn": "arn:x", "BucketName": "b"}
    stack = find_stack("cosmic")
    assert stack.outputs == aws.outputs
    assert stack.need("BucketName", "--data") == "b"
    with pytest.raises(AwsError, match=r"cosmic: it has no output Rendez.*; give --rendezvous, or"):
        stack.need("RendezvousEndpoint", "--rendezvous")


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (None, r"read the stack mine: there is none in us-east-1: check --stack and the region"),
        ({"Other": "x"}, r"stack mine: it is CREATE_COMPLETE and has no output StateMachineArn"),
    ],
)
def test_a_stack_that_is_none(aws: FakeAws, outputs: dict[str, str] | None, says: str) -> None:
    aws.outputs = outputs
    with pytest.raises(AwsError, match=says):
        find_stack("mine")


def test_other_errors_of_stacks_stay_what_they_are(aws: FakeAws) -> None:
    aws.outputs = {}
    aws.errors["DescribeStacks"] = [(400, "ValidationError", "1 validation error detected")]
    with pytest.raises(AwsError, match="ValidationError: 1 validation error detected"):
        find_stack("mine")


def test_a_name_becomes_an_arn_of_this_account(aws: FakeAws) -> None:
    expected = f"arn:aws-cn:states:us-east-1:{ACCOUNT}:stateMachine:mine"
    assert state_machine_arn("mine") == expected


def test_an_arn_stays_what_it_is(aws: FakeAws) -> None:
    assert state_machine_arn("arn:aws:states:x:1:stateMachine:y").endswith(":y")
    assert not aws.calls
