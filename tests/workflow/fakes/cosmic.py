"""The command line `cosmic`, with the fake worker and server."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from workflow import plan
from workflow.__main__ import main

if __name__ == "__main__":
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
