"""``run.json`` in a run's folder: what the launcher knows of the run, and no rank does."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Literal

from lambda_worker import storage
from lambda_worker.threads import cores
from workflow import environment
from workflow.plan import Json, RunPlan, RunResult

__all__ = ["FORMAT", "NAME", "content", "save"]

NAME = "run.json"
FORMAT = 1

# How processes are started is of this machine, and says nothing about the run.
_COMMANDS = {"worker", "server"}


def save(result: RunResult, plan: RunPlan, on: Literal["local", "aws"]) -> str:
    """Write `content` beside the run's results.

    Returns:
        Its URL.

    Raises:
        StorageError: it cannot be written.
    """
    url = f"{result.folder}/{NAME}"
    text = json.dumps(content(result, plan, on), indent=1, allow_nan=False)
    storage.write(url, text.encode() + b"\n")
    return url


def content(result: RunResult, plan: RunPlan, on: Literal["local", "aws"]) -> Json:
    """What stands in ``run.json``; docs/payloads.md has every field.

    Args:
        on: where the ranks ran. On AWS nobody here knows their environment: it is null.
    """
    threads, engine = max(1, cores() // plan.world_size), result.summary["engine"]
    return {
        "format": FORMAT,
        "run": result.run,
        "on": on,
        "seconds": result.seconds,
        # The ranks' are in their records.
        "spans": [list(span) for span in result.spans if span.rank is None],
        # What "auto" has become, which the plan does not know.
        "environment": environment.describe(threads, engine) if on == "local" else None,
        "plan": {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in _COMMANDS},
    }
