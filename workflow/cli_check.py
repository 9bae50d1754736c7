"""``cosmic check``: what to run first when ranks do not find each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import AsJson

if TYPE_CHECKING:
    from fmi_client.check import Plan, Report

__all__ = ["EXAMPLES", "check"]

EXAMPLES = """\b
Examples:
  cosmic check fmi.example.org                    from where a rank would run
  cosmic check fmi.example.org:10000 --secret-file secret
  cosmic check fmi.example.org --json | jq -r .advice

\b
Links, too: the same in two places, within a minute of each other.
  cosmic check fmi.example.org --job try --size 2 --rank 0
  cosmic check fmi.example.org --job try --size 2 --rank 1

\b
On a Lambda function: handler lambda_worker.handlers.check with the event
  {"server": "fmi.example.org:10000"}

\b
Exit code: 0 nothing failed, 1 something did, 2 wrong usage.
"""


def check(
    server: Annotated[
        str, typer.Argument(metavar="SERVER", help="host:port of the server; port 10000 if left.")
    ],
    job: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Join this job and test its links."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", help="The job's number of ranks, at most 8.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Which of them this one is, from 0.")
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The server's secret, to make a token from."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="What admits the job  [default: $FMI_TOKEN]"),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", help="The server's second port, 0: none  [default: the next one]"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Limit for each step.")] = 10,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="Limit for the other ranks to come.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """See whether ranks can meet at a server, and if not, why.

    Looks up the name, connects, measures the round trip, authenticates, compares
    addresses to tell which NAT is in between, and ends with one sentence of
    advice. It disturbs no job: it joins one of its own, of one rank.

    With --job, --size and --rank, each in a process of its own, the ranks also
    link to each other and measure round trip and rate of every link. Their key,
    if any, is in $FMI_KEY.
    """
    from fmi_client.check import Plan
    from rendezvous_server.config import ConfigError, read_secret

    try:
        plan = Plan.make(
            server,
            job=job,
            rank=rank,
            size=size,
            token=token,
            secret=read_secret(secret_file),
            admin_port=admin_port,
            timeout=timeout,
            wait=wait,
        )
    except (ValueError, ConfigError) as error:
        if as_json:
            wrong = {"who": "cosmic", "type": "usage", "message": str(error), "rank": None}
            print(json.dumps({"error": wrong}))
        raise typer.BadParameter(str(error)) from None
    report = _look(plan, as_json)
    if as_json:
        print(json.dumps(report.as_dict()))
    raise SystemExit(0 if report.ok else 1)


def _look(plan: Plan, as_json: bool) -> Report:
    """Check, with a line for each step as it ends: on stdout, unless that is for JSON."""
    from fmi_client.check import run
    from workflow.check_view import CheckView

    with CheckView(to_stderr=as_json) as view:
        report = run(plan, view.begin, view.end)
    view.conclude(report.advice)
    return report
