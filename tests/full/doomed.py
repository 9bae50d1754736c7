"""Handlers of functions that tests make: one hangs, and ranks die if the run is called so."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from lambda_worker import handlers


def pid(event: object, context: object) -> int:
    """Say which process this is."""
    return os.getpid()


def hang(event: str, context: object) -> None:
    """Never end, having written the process's number to the file that the event names."""
    Path(event).write_text(f"{os.getpid()}\n")
    while True:
        signal.pause()


def infer(event: dict[str, Any], context: object) -> dict[str, Any]:
    """The product's handler, which SIGKILL ends when the run is called
    "…-kills-RANK-in-EPOCH" (or "-in-any") and this is that rank, about to infer."""
    task = event["task"]
    told = re.search(r"-kills-(\d+)-in-(\d+|any)", task["run"])
    doomed = told and int(told[1]) == task["rank"] and told[2] in ("any", str(event["epoch"]))

    def progress(stage: str, rows: int, of: int) -> None:
        if doomed and stage == "infer":
            os.kill(os.getpid(), signal.SIGKILL)

    return handlers.infer(event, context, progress)
