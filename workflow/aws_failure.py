"""Why an execution failed, in the words of the rank that did, and where its logs are."""

from __future__ import annotations

import json
import re
from typing import Any

from workflow.aws_calls import AwsError, aws_errors, client
from workflow.calls import RunFailed
from workflow.plan import Json, StepName

__all__ = ["ExecutionFailed", "explain"]

_STATES: dict[StepName, str] = {"init": "Init", "summarize": "Summarize"}


class ExecutionFailed(RunFailed):
    """The execution failed or was stopped; ``logs`` is the log group of what failed, if known."""

    def __init__(
        self, who: str, message: str, kind: str | None, arn: str, logs: str | None
    ) -> None:
        rank = re.match(r"rank (\d+)$", who)
        super().__init__(who, message, kind, int(rank[1]) if rank else None)
        self.arn, self.logs = arn, logs

    def __str__(self) -> str:
        lines = [super().__str__(), f"execution: {self.arn}"]
        lines += [f"logs:      CloudWatch, log group {self.logs}"] if self.logs else []
        return "\n  ".join(lines)

    def as_json(self) -> Json:
        """Return the error as one JSON object."""
        return super().as_json() | {"execution_arn": self.arn, "log_group": self.logs}


def explain(aws: Any, end: Json, step: StepName) -> ExecutionFailed:
    """Make the error of an execution that has ended, but not well.

    Args:
        aws: the Step Functions client.
        end: what DescribeExecution says of it.
        step: the last step that it was seen at.
    """
    arn, state = end["executionArn"], _STATES.get(step, "Infer")
    kind, cause = end.get("error"), end.get("cause") or "no cause is given"
    logs = _log_group(aws, arn, state)
    match end["status"]:
        case "ABORTED":
            told = ": ".join(part for part in (kind, cause) if part)
            return ExecutionFailed("the execution", f"was stopped ({told})", None, arn, logs)
        case "TIMED_OUT":
            text = "took longer than the state machine lets it (TimeoutSeconds)"
            return ExecutionFailed("the execution", text, None, arn, logs)
    if found := re.match(r"(rank \d+) (?:failed: )?", cause):
        # `blame` says who and what in one sentence; where that has no "failed", it is a story.
        told, own = cause[found.end() :], cause.startswith(f"{found[1]} failed: {kind}: ")
        text = told.removeprefix(f"{kind}: ")
        return ExecutionFailed(found[1], text, kind if own else None, arn, logs)
    return ExecutionFailed(state.lower(), cause, kind, arn, logs)


def _log_group(aws: Any, arn: str, state: str) -> str | None:
    """The log group of a state's function; None where these credentials may not find it out."""
    try:
        with aws_errors("read the state machine"):
            found = aws.describe_state_machine_for_execution(executionArn=arn)
        function = _function(json.loads(found["definition"])["States"].get(state))
        if function is None:
            return None
        region = arn.split(":")[3]
        with client("lambda", region) as functions, aws_errors("read the function"):
            settings = functions.get_function_configuration(FunctionName=function)
        name = function.split(":")[6] if function.startswith("arn:") else function
        return str(settings.get("LoggingConfig", {}).get("LogGroup") or f"/aws/lambda/{name}")
    except (AwsError, ValueError, KeyError):
        return None  # a hint less; the error itself is what counts


def _function(state: Any) -> str | None:
    """The first FunctionName anywhere in a state."""
    if isinstance(state, dict):
        if isinstance(name := state.get("FunctionName"), str):
            return name
        return next((name for part in state.values() if (name := _function(part))), None)
    return None
