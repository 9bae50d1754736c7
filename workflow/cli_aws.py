"""``--on aws`` of ``cosmic run`` and ``sweep``: what its options mean together, and if left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from workflow.aws_calls import LONGEST_NAME
from workflow.cli_base import wrong
from workflow.cli_data import Size

if TYPE_CHECKING:
    from workflow.aws import Target
    from workflow.plan import RunPlan
    from workflow.progress import View

__all__ = [
    "AWS_PANEL",
    "AWS_VIEW",
    "AwsOptions",
    "EndpointUrl",
    "Where",
    "check",
    "refuse",
    "resolve",
    "use_endpoint",
]

AWS_PANEL = "Only with --on aws"

EndpointUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Of an emulator of AWS.", rich_help_panel=AWS_PANEL),
]

_STACK = "cosmic"
AWS_VIEW = ("ranks", 5.0)
"""The arguments of `open_view` on AWS, from which no news comes faster."""
_MACHINE = r"[A-Za-z0-9_-]{1,80}|arn:[\w-]+:states:[\w-]+:\d{12}:stateMachine:[\w:-]+"


class Where(StrEnum):
    """Where the functions of a job run: what --on says."""

    local = "local"
    aws = "aws"


class AwsOptions(NamedTuple):
    """The options that only AWS has; None where they are not given."""

    stack: str | None
    state_machine: str | None
    endpoint_url: str | None


def refuse(options: Mapping[str, object], place: str, why: str) -> None:
    """Refuse options that mean something with --on PLACE only."""
    for option, value in options.items():
        if value is not None:
            raise wrong(option, f"that is for --on {place} only, for {why}")


def use_endpoint(options: AwsOptions) -> None:
    """Have all services at the endpoint that the options name, the results' S3 too."""
    if options.endpoint_url:
        os.environ["AWS_ENDPOINT_URL"] = options.endpoint_url


def check(
    plan: RunPlan, size: Size | None, options: AwsOptions, results: str = "--results"
) -> None:
    """Refuse options that cannot be meant together.

    Args:
        plan: with empty data and results where the stack is to say them.
        size: of the dataset in the stack's bucket.
        results: the option that says where a run's results go.
    """
    places = {"--data": plan.data, "--model": plan.model, results: plan.results}
    for option, place in places.items():
        if place and not re.match("s3://[^/]", place):
            text = f"{place}: the functions on AWS see no such place; give an s3:// URL"
            raise wrong(option, text)
    if plan.run and len(plan.run) > LONGEST_NAME:
        text = f"AWS takes {LONGEST_NAME} characters at most, this has {len(plan.run)}"
        raise wrong("--run", text)
    if options.endpoint_url and not re.match("https?://[^/]", options.endpoint_url):
        raise wrong("--endpoint-url", f"{options.endpoint_url!r} is not http(s)://host:port")
    if options.state_machine is not None:
        _check_machine(plan, size, options, results)


def _check_machine(plan: RunPlan, size: Size | None, options: AwsOptions, results: str) -> None:
    """Without a stack, everything has to be said."""
    machine = options.state_machine or ""
    if options.stack is not None:
        raise wrong("--state-machine", "the stack has its own; leave --stack or this out")
    if not re.fullmatch(_MACHINE, machine):
        raise wrong("--state-machine", f"{machine!r} is neither a name nor an ARN of one")
    if size is not None:
        raise wrong("--data-size", "that is a folder of a stack's bucket; name it with --data")
    needed = {"--data": plan.data, results: plan.results}
    if plan.fmi:
        needed["--rendezvous"] = plan.rendezvous or ""
    for option, value in needed.items():
        if not value:
            or_none = ", or --no-fmi" if option == "--rendezvous" else ""
            raise wrong(
                option, f"needed with --state-machine, as there is no stack to ask{or_none}"
            )


def resolve(plan: RunPlan, size: Size, options: AwsOptions, view: View) -> tuple[RunPlan, Target]:
    """Find the state machine, and what the plan does not say.

    Raises:
        AwsError: the stack cannot be read, or does not say it.
    """
    from workflow.aws import Target
    from workflow.aws_calls import find_stack, state_machine_arn

    if options.state_machine is not None:
        return plan, Target(state_machine_arn(options.state_machine))
    view.step(f"stack: reading the outputs of {options.stack or _STACK}")
    stack = find_stack(options.stack or _STACK)
    said = stack.outputs
    target = Target(said["StateMachineArn"], said.get("ServerSecretArn"), said.get("KeyArn"))
    if not (plan.data and plan.results):
        bucket = stack.need("BucketName", "--data and --results")
        plan = replace(
            plan,
            data=plan.data or f"s3://{bucket}/datasets/{size.value}",
            results=plan.results or f"s3://{bucket}/results",
        )
    if plan.fmi and not plan.rendezvous:
        endpoint = stack.need("RendezvousEndpoint", "--rendezvous")
        plan = replace(plan, rendezvous=endpoint)
    return plan, target
