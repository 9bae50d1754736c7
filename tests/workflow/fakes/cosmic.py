"""The command line `cosmic`, with the fake worker and server, and a report that draws nothing."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from workflow import plan
from workflow.__main__ import main


def write(results: Any, folder: str, **more: Any) -> SimpleNamespace:
    """Stand in for `workflow.report.write`."""
    page = Path(folder, "report.html")
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"{len(results.runs)} runs")
    return SimpleNamespace(paths=[str(page)])


if __name__ == "__main__":
    sys.modules["workflow.report"] = SimpleNamespace(write=write)  # type: ignore[assignment]
    here = Path(__file__).parent
    plan.RunPlan = partial(
        plan.RunPlan,
        worker=(sys.executable, str(here / "worker.py")),
        server=(sys.executable, str(here / "server.py")),
    )
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    if ignored := os.environ.get("COSMIC_IGNORES"):
        signal.signal(signal.Signals[ignored], signal.SIG_IGN)
    main()
