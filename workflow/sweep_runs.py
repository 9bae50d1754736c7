"""How the runs of a sweep are done: on this machine, on AWS, or as `cosmic infer` in a process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from lambda_worker import storage
from workflow.aws_calls import LONGEST_NAME
from workflow.calls import RunFailed, start, with_log
from workflow.local import run_job
from workflow.plan import Json, OnEvent, RunPlan
from workflow.processes import ProcessFamily, death_note, read_tail
from workflow.runfile import save
from workflow.sweep import Outcome
from workflow.sweep_plan import Item, Plan

if TYPE_CHECKING:
    from workflow.aws import Target
    from workflow.sweep import Execute

__all__ = ["COSMIC", "infers", "runs_here", "runs_on_aws"]

COSMIC = (sys.executable, "-m", "workflow")


def runs_here(plan: RunPlan, data: Callable[[str], str], on_event: OnEvent) -> Execute:
    """Runs like ``plan`` on this machine.

    Args:
        data: what an item's data are called here.
    """

    async def execute(item: Item, folder: Path) -> Outcome:
        mine = _mine(plan, item, data(item.data))
        mine = replace(mine, results=str(folder.parent), run=folder.name)
        result = await run_job(mine, on_event)
        save(result, mine, "local")
        return Outcome(result.seconds, result.folder)

    return execute


def runs_on_aws(
    sweep: str, plans: Mapping[str, tuple[RunPlan, Target]], on_event: OnEvent
) -> Execute:
    """Runs on AWS, whose names start with the sweep's.

    Args:
        plans: by an item's data, what is the same for all of its runs.
    """

    async def execute(item: Item, folder: Path) -> Outcome:
        from workflow.aws import run_on_aws

        plan, target = plans[item.data]
        # Step Functions keeps names for 90 days, and a run that failed is done again.
        end = f"{folder.name}-{token_hex(3)}"
        mine = _mine(plan, item, plan.data)
        mine = replace(mine, run=f"{sweep[: LONGEST_NAME - 1 - len(end)]}-{end}")
        result = await run_on_aws(mine, target, on_event)
        urls = result.combined_data, result.summary_path, save(result, mine, "aws")
        for url in urls:  # so that the sweep can be read, and moved, without AWS
            storage.write(str(folder / url.rpartition("/")[2]), storage.read(url))
        return Outcome(result.seconds, result.folder)

    return execute


def infers(
    plan: Plan, data: Callable[[str], str], timeout: float, cosmic: Sequence[str] = COSMIC
) -> Execute:
    """Each run is a `cosmic infer` in a process of its own, whose peak of memory is its own."""

    async def execute(item: Item, folder: Path) -> Outcome:
        command = (*cosmic, "infer", *_options(plan, item, data(item.data)))
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout), ProcessFamily() as family:
                process = await start(family, "cosmic infer", command, os.environ)
                report = await _report(process)
        except TimeoutError as error:
            text = f"took longer than {timeout:g} s (--timeout)"
            raise RunFailed("cosmic infer", text) from error
        return Outcome(time.monotonic() - began, None, report)

    return execute


def _mine(plan: RunPlan, item: Item, data: str) -> RunPlan:
    return replace(plan, data=data, world_size=item.world_size, batch_size=item.batch_size)


def _options(plan: Plan, item: Item, data: str) -> list[str]:
    given = {
        "--data": data,
        "--batch-size": item.batch_size,
        "--engine": plan.engine,
        "--precision": plan.precision,
        "--model": plan.model,
        "--threads": plan.threads,
    }
    words = [str(w) for option in given.items() if option[1] is not None for w in option]
    return [*words, "--json", *(["--strict"] if plan.strict else [])]


async def _report(process: Process) -> Json:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.close()
    log = asyncio.create_task(read_tail(process.stderr))
    try:
        answer, code = await process.stdout.read(), await process.wait()
        with suppress(ValueError):
            report: Json = json.loads(answer)
            return _judged(report)
        note = death_note(code) if code else "wrote no report"
        raise RunFailed("cosmic infer", with_log(note, await log))
    finally:
        log.cancel()


def _judged(report: Json) -> Json:
    if error := report.get("error"):
        raise RunFailed("cosmic infer", error["message"], kind=error["type"])
    return report
