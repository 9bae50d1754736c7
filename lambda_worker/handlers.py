"""The steps of a job with AWS Lambda's signature: init, infer (one per rank), summarize, blame.

And `check`, for when nothing works.

Events and results are plain JSON objects; docs/payloads.md has every field. Secrets come by
reference (ARN) or by environment (FMI_KEY, FMI_TOKEN), never in an event.
"""

from __future__ import annotations

import logging
from typing import Any

from lambda_worker import failures, planning, rank
from lambda_worker.deadline import Deadline, Progress
from lambda_worker.events import CheckTask, EventError, Payload, RunInfo, parse, parse_rank
from lambda_worker.scarce import memory_told
from lambda_worker.telemetry import observed
from lambda_worker.timing import ready

__all__ = ["blame", "check", "infer", "init", "summarize"]

log = logging.getLogger("lambda_worker")


def _silent(stage: str, rows: int, of: int) -> None:
    pass


@observed
def init(event: object, context: object = None) -> dict[str, Any]:
    """Plan a job: which rank reads which rows, and where the results go.

    Args:
        event: a `Payload`.
        context: AWS Lambda's; not used.

    Returns:
        run, world_size, batch_size, rows, results (folder of the run), fmi_enabled, init_id, model,
        data, epoch (of the first attempt), max_epochs (which no attempt's reaches), and `ranks`:
        the event of `infer` for each rank. All of it is the event of `summarize` and `blame`.
        Nothing is written, unless the payload says `ranks_file`: then the ranks stand in
        `<results>/ranks.json`, and in their place is `ranks_file`, where that is; and the payload
        stands in `<results>/payload.json`.

    Raises:
        EventError: a field is wrong.
        DatasetError: no data there, or a file that cannot be used.
        EngineError, ModelError: the engine cannot do it, or the model's export is missing or stale.
        StorageError: a place cannot be read.
    """
    return planning.plan(parse(Payload, event))


@observed
def infer(event: object, context: object = None, progress: Progress = _silent) -> dict[str, Any]:
    """One rank's part of the job: join, load, meet at a barrier, predict, merge.

    Args:
        event: a `RankTask`, or `{"task": RankTask, "epoch": n}` with the attempt's number.
        context: AWS Lambda's, for the time that is left; None: any time. In the main thread an
            alarm (SIGALRM) stops what takes too long, in others only what reports progress.
        progress: called with stage ("join", "load", with batch size "auto" "tune", "infer",
            "gather", "done"), rows done and rows of this rank.

    Returns:
        The rank's record, which also stands in `<results>/<rank>.json`. Rank 0 of a job that
        joins writes `predictions.npz` and `merged.json` too; without a job each rank writes
        `<rank>.npz`, for `summarize` to merge.

    Raises:
        EventError, DatasetError, ModelError, EngineError, StorageError: this rank cannot do its
            part; the others are told so at once (`Aborted`).
        OutOfMemory: this process got no more; the others are told so, too.
        SecretError, SecretUnavailable: a secret that an ARN names cannot be read.
        DeadlineError: the function's time is almost over; the others are told so, too.
        FmiError: the job cannot go on. After any error this rank has written no record, but
            `<results>/failed/<epoch>/<rank>.json`, for `blame`, if that could be done quickly.
    """
    with failures.recorded(event):
        task = parse_rank(event)
        deadline = Deadline(context, task.rank)
        with deadline.watched():
            return rank.run(task, deadline, progress)


@observed
def summarize(event: object, context: object = None) -> dict[str, Any]:
    """Merge the ranks' records and predictions into the run's result.

    Args:
        event: what `init` returned; more may be in it (`RunInfo`).
        context: AWS Lambda's; not used.

    Returns:
        combined_data, summary_path, predictions (URLs), summary, and records, but these not with
        `ranks_file`: they are what grows with the ranks.

    Raises:
        EventError: a field is wrong.
        SummaryError: ranks are missing, which are named. Nothing is written.
        StorageError: a file cannot be read or written.
    """
    from lambda_worker import summary

    with memory_told(lambda: "summarize"):
        return summary.summarize(parse(RunInfo, event))


@observed
def blame(event: object, context: object = None) -> dict[str, Any]:
    """Say why an attempt failed, by what its ranks left, and whether to try again.

    Args:
        event: what `init` returned, with the attempt's `epoch`, and `error`, what Step Functions
            has caught, if that is at hand (`RunInfo`).
        context: AWS Lambda's; not used.

    Returns:
        error (class of the culprit's error), cause (one line that names the rank that failed, not
        those that noticed), rank (or None), retry (whether another attempt is left, and may end
        well) and epoch (the next attempt's).

    Raises:
        EventError: a field is wrong.
        StorageError: the ranks' records cannot be read.
    """
    return failures.blame(parse(RunInfo, event))


@observed
def check(event: object, context: object = None) -> dict[str, Any]:
    """See from inside a function whether ranks can meet at a server, and if not, why.

    Args:
        event: a `CheckTask`.
        context: AWS Lambda's; not used.

    Returns:
        The report of `fmi_client.check`: ok, advice, steps and what was measured. What a check
        finds wrong is its result, too.

    Raises:
        EventError: a field is wrong.
        SecretError, SecretUnavailable: the server's secret cannot be read.
    """
    task = parse(CheckTask, event)
    from fmi_client.check import Plan, Step, run
    from lambda_worker import secret

    def tell(step: Step) -> None:
        log.info("check: %s: %s: %s", step.name, step.status, step.text)

    try:
        given = task.model_dump(exclude={"server_secret_arn"})
        plan = Plan.make(**given, secret=secret.server_secret(task.server_secret_arn))
    except ValueError as error:
        raise EventError(str(error)) from None
    return run(plan, end=tell).as_dict()


ready()
