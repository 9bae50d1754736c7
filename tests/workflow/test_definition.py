"""The state machine's definition: what AWS and we expect of it, and no validator checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

TEXT = files("workflow").joinpath("state_machine.asl.json").read_text()
MACHINE = json.loads(TEXT)
LAMBDA_SECONDS = 900  # the most that AWS lets an invocation take

# An invocation that came to one of these may have begun: nothing of it is lost if init, summarize
# or blame begin again, but a rank cannot rejoin the job that it has left.
MAY_HAVE_BEGUN = {"Lambda.ServiceException", "Lambda.AWSLambdaException"}


def states(of: dict[str, Any] = MACHINE) -> Iterator[tuple[str, dict[str, Any]]]:
    """All states, also those inside of a Map."""
    for name, state in of["States"].items():
        yield name, state
        if "ItemProcessor" in state:
            yield from states(state["ItemProcessor"])


TASKS = {name: state for name, state in states() if state["Type"] == "Task"}


def retried(state: dict[str, Any]) -> set[str]:
    return {error for retry in state["Retry"] for error in retry["ErrorEquals"]}


def test_functions_are_filled_in_by_whoever_deploys() -> None:
    assert sorted(re.findall(r"\$\{(\w+)\}", TEXT)) == [
        *("BlameFunctionArn", "InferFunctionArn", "InitFunctionArn", "SummarizeFunctionArn")
    ]
    assert "JSONata" not in TEXT
    assert "{%" not in TEXT


def test_nothing_waits_for_ever() -> None:
    assert set(TASKS) == {"Init", "Rank", "Summarize", "Blame"}
    for state in TASKS.values():
        assert state["TimeoutSeconds"] < MACHINE["TimeoutSeconds"]
        assert all(retry["MaxDelaySeconds"] <= 30 for retry in state["Retry"])
        assert all(retry["JitterStrategy"] == "FULL" for retry in state["Retry"])
    # A function's own limit comes first, whose error says more.
    assert TASKS["Rank"]["TimeoutSeconds"] > LAMBDA_SECONDS
    seconds = {name: state["TimeoutSeconds"] for name, state in TASKS.items()}
    three_attempts = 3 * (seconds["Rank"] + seconds["Blame"])
    assert seconds["Init"] + three_attempts + seconds["Summarize"] < MACHINE["TimeoutSeconds"]


def test_a_rank_is_invoked_again_only_if_it_never_ran() -> None:
    assert retried(TASKS["Rank"]) == {"Lambda.TooManyRequestsException"}
    others = [state for name, state in TASKS.items() if name != "Rank"]
    assert all(retried(state) >= MAY_HAVE_BEGUN for state in others)


def test_all_ranks_run_at_once_and_none_may_fail() -> None:
    ranks = MACHINE["States"]["Infer"]
    assert ranks["ItemProcessor"]["ProcessorConfig"]["Mode"] == "DISTRIBUTED"
    assert ranks["MaxConcurrencyPath"] == "$.job.world_size"
    assert ranks["ToleratedFailureCount"] == 0
    assert "ToleratedFailurePercentage" not in ranks
    assert len(ranks["Label"]) <= 40


def test_every_error_ends_in_a_state_that_tells_it() -> None:
    for name, state in MACHINE["States"].items():
        if state["Type"] in ("Task", "Map"):
            assert state["Catch"][-1]["ErrorEquals"] == ["States.ALL"], name
        if state["Type"] == "Fail":
            assert {"ErrorPath", "CausePath"} <= set(state), name
