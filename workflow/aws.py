"""A run on AWS: starts an execution of the Step Functions state machine and follows it to its end.

The state machine is workflow/state_machine.asl.json: init, a distributed Map over the ranks (again
under a new epoch, where `blame` says that this can help), summarize.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from lambda_worker.timing import Stopwatch
from workflow.aws_calls import AwsError, aws_errors, client
from workflow.aws_failure import explain
from workflow.calls import RunFailed
from workflow.plan import Json, OnEvent, RanksProgress, RunPlan, RunResult, Step, StepName
from workflow.spans import all_spans

__all__ = ["AwsResult", "Target", "run_on_aws"]

# Seconds between two looks at an execution. The quotas, of the whole account, are a few calls a
# second (ListMapRuns, DescribeMapRun) to fifteen (DescribeExecution).
_SOON, _LATE, _SLOWER = 1.0, 5.0, 1.25
# What is waited for when the execution has to be stopped.
_STOPPING = 20.0
_NOWHERE = Step("start", "")
# Step Functions starts no more functions, but Lambda has no way to end one.
_GOING_ON = "functions that run already cannot be, and end by themselves"


@dataclass(frozen=True)
class Target:
    """Where to run: the state machine's ARN, and what its ranks need to be let in.

    The secrets are ARNs; None where the functions know theirs, or need none.
    """

    state_machine: str
    server_secret_arn: str | None = None
    key_arn: str | None = None


@dataclass(frozen=True)
class AwsResult(RunResult):
    """A finished run on AWS; ``seconds`` is from the start of the execution as seen from here."""

    execution_arn: str


async def run_on_aws(plan: RunPlan, target: Target, on_event: OnEvent) -> AwsResult:
    """Run ``plan`` to its end, telling ``on_event`` about every step.

    Cancelling this coroutine stops the execution; the `CancelledError` then says what is left.

    Raises:
        RunFailed: the execution failed, was stopped by somebody, or ``plan.timeout`` has passed.
        AwsError: AWS refuses a call, or cannot be reached.
        StorageError: the results cannot be read.
    """
    # Late, for pydantic; the same names as `init` itself would give.
    from lambda_worker.events import Payload, parse

    run = parse(Payload, plan.payload(plan.rendezvous)).run_name()
    with client("stepfunctions", _region(target)) as aws:
        execution = _Execution(plan, target, run, on_event, aws)
        try:
            async with asyncio.timeout(plan.timeout):
                return await execution.run()
        except TimeoutError as error:
            left = await execution.stop(f"cosmic run: longer than {plan.timeout:g} s (--timeout)")
            text = f"took longer than {plan.timeout:g} s (--timeout), at {execution.whereabouts()}"
            raise RunFailed("the run", f"{text}; {left}") from error
        except asyncio.CancelledError:
            left = await execution.stop("cosmic run: stopped by its user")
            raise asyncio.CancelledError(left) from None


def _region(target: Target) -> str | None:
    """The region of the state machine, whatever the environment's is."""
    return target.state_machine.split(":")[3] or None


@dataclass
class _Execution:
    plan: RunPlan
    target: Target
    run_name: str
    on_event: OnEvent
    aws: Any  # the Step Functions client
    arn: str | None = None
    step: Step = _NOWHERE
    clock: Stopwatch = field(default_factory=Stopwatch)
    map_run: str | None = None
    map_status: str = ""  # of the newest attempt
    counts: RanksProgress | None = None
    attempts: int = 0
    ended: bool = False
    silent: bool = False  # AWS has not answered the last time
    blind: bool = False  # these credentials may not see Map Runs

    async def run(self) -> AwsResult:
        *_, region, _, _, machine = self.target.state_machine.split(":")[:7]
        self._tell("start", f"start: execution {self.run_name} of {machine} in {region}")
        await self._start()
        self._tell("init", f"init: splitting {self.plan.data} between {self.plan.world_size} ranks")
        end = await self._follow()
        self.ended = True
        if end["status"] != "SUCCEEDED":
            raise await asyncio.to_thread(explain, self.aws, end, self.step.name)
        records = await asyncio.to_thread(_records, output := json.loads(end["output"]))
        self.clock.lap(self.step.name)
        names = ("run", "combined_data", "summary_path", "predictions", "summary")
        return AwsResult(
            **{name: output[name] for name in names},
            records=records,
            seconds=self.clock.total,
            spans=all_spans(self.clock, records),
            execution_arn=end["executionArn"],
        )

    async def stop(self, cause: str) -> str:
        """Stop the execution; returns what is left of the run, for people."""
        if self.arn is None:
            return "no execution was started"
        if self.ended:
            return f"the execution {self.arn} had ended already"
        self.on_event(Step("stop", f"stop: execution {self.run_name}"))
        try:
            async with asyncio.timeout(_STOPPING):
                await self._call(
                    "stop the execution", "stop_execution", error="Stopped", cause=cause
                )
        except (AwsError, TimeoutError) as error:
            if isinstance(error, AwsError) and error.code == "ValidationException":
                return f"the execution {self.arn} had ended already"
            reason = str(error) or "no answer"
            command = f"aws stepfunctions stop-execution --execution-arn {self.arn}"
            return f"the execution GOES ON ({reason}); stop it with: {command}"
        return f"execution {self.run_name} is stopped; {_GOING_ON}"

    def whereabouts(self) -> str:
        """Say where the run stands, for the message about a timeout."""
        if self.counts is None or self.step.name != "infer":
            return f"step {self.step.name}"
        return f"step infer, {self.counts.done} of {self.counts.of} ranks done"

    # -- start and end --------------------------------------------------------------------------

    async def _start(self) -> None:
        start = asyncio.create_task(asyncio.to_thread(self._begin))
        try:
            self.arn = await asyncio.shield(start)
        except asyncio.CancelledError:
            # The request is on its way: whoever cancels wants to stop what it starts.
            with contextlib.suppress(AwsError):
                self.arn = await start
            raise

    def _begin(self) -> str:
        with aws_errors(f"start the execution {self.run_name}"):
            answer = self.aws.start_execution(
                stateMachineArn=self.target.state_machine,
                name=self.run_name,
                input=json.dumps(self._payload()),
            )
        return str(answer["executionArn"])

    def _payload(self) -> Json:
        arns: Json = {}
        if self.plan.fmi:
            arns["server_secret_arn"] = self.target.server_secret_arn
            arns["key_arn"] = self.target.key_arn
        # Step Functions takes a second start of the same name with the same input for the first
        # one, so each start has something of its own: `unique_id`, which `run` makes idle.
        own = secrets.token_hex(8)
        return self.plan.payload(self.plan.rendezvous, **arns, run=self.run_name, unique_id=own)

    # -- progress -------------------------------------------------------------------------------

    async def _follow(self) -> Json:
        """Return the description of the execution once it has ended."""
        pause = _SOON
        while True:
            before = self.step, self.counts
            end = await self._look()
            if end is not None:
                return end
            pause = _SOON if (self.step, self.counts) != before else min(pause * _SLOWER, _LATE)
            await asyncio.sleep(pause)

    async def _look(self) -> Json | None:
        """Tell what is new; returns the execution's description if it has ended."""
        try:
            seen = await self._call("follow the execution", "describe_execution")
            await self._look_at_ranks()
        except AwsError as error:
            if not error.passes:
                raise AwsError(f"{error}; the execution goes on: {self.arn}", error.code) from error
            if not self.silent:
                self.on_event(Step(self.step.name, f"{self.step.name}: no news, for I {error}"))
            self.silent = True
            return None
        if self.silent:
            self.silent = False
            self.on_event(self.step)
        return None if seen["status"] == "RUNNING" else seen

    async def _look_at_ranks(self) -> None:
        """Find out which attempt it is, and how many of its ranks are done."""
        if self.blind or self.map_status == "SUCCEEDED":
            return
        try:
            if self.map_status != "RUNNING":
                await self._find_attempt()
            if self.map_status == "RUNNING":
                await self._count_ranks()
        except AwsError as error:
            if not error.denied:
                raise
            self.blind = True  # all else can go on
            self._tell("infer", f"infer: {self._ranks()}; how many are done is not known: {error}")

    async def _find_attempt(self) -> None:
        runs = (await self._call("see its attempts", "list_map_runs"))["mapRuns"]
        if len(runs) == self.attempts:
            return
        newest = sorted(runs, key=lambda run: run["startDate"])[-1]
        self.attempts, self.map_run, self.map_status = len(runs), newest["mapRunArn"], "RUNNING"
        self.counts = None
        again = f", attempt {self.attempts}" if self.attempts > 1 else ""
        self._tell("infer", f"infer: {self._ranks()}{again}")

    async def _count_ranks(self) -> None:
        doing = "see how many ranks are done"
        seen = await self._call(doing, "describe_map_run", mapRunArn=self.map_run)
        n, self.map_status = seen["itemCounts"], seen["status"]
        failed = n["failed"] + n["timedOut"] + n["aborted"]
        of = max(n["total"], self.plan.world_size)  # it counts them up while it reads the list
        counts = RanksProgress(n["running"], n["succeeded"], failed, of)
        if counts != self.counts:
            self.counts = counts
            self.on_event(counts)
        if self.map_status == "SUCCEEDED":
            self._tell("summarize", "summarize: merging the ranks' records")
        elif self.map_status != "RUNNING":
            self._tell("blame", "blame: finding out which rank failed, and whether to try again")

    # -- small things ---------------------------------------------------------------------------

    def _ranks(self) -> str:
        return f"{self.plan.world_size} ranks" if self.plan.world_size > 1 else "1 rank"

    def _tell(self, name: StepName, text: str) -> None:
        before, self.step = self.step, Step(name, text)
        if before.name != name and before is not _NOWHERE:
            self.clock.lap(before.name)
        self.on_event(self.step)

    async def _call(self, doing: str, operation: str, **more: Any) -> Json:
        """Call an operation on the execution, off the event loop."""
        arguments = more if "mapRunArn" in more else {"executionArn": self.arn, **more}

        def call() -> Json:
            with aws_errors(doing):
                answer: Json = getattr(self.aws, operation)(**arguments)
                return answer

        return await asyncio.to_thread(call)


def _records(output: Json) -> list[Json]:
    """Download the ranks' records, whose URL the execution's output tells."""
    from lambda_worker import storage

    try:
        records: list[Json] = json.loads(storage.read(output["combined_data"]))
    except storage.StorageError as error:
        raise storage.StorageError(f"the execution has succeeded, but I {error}") from error
    return records
