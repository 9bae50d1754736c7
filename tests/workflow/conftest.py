"""A run with fakes: what happens is said in the plan's `data`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import FAKES

from workflow.plan import RunPlan


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    """Make a plan of 4 ranks with the fakes: plan({"infer 2": "kill"})."""
    monkeypatch.setenv("FAKE_SERVER_FOLDER", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def make(what: dict[str, str] | None = None, **fields: Any) -> RunPlan:
        usual = {
            "data": f"fake://{json.dumps(what or {})}",
            "results": str(tmp_path),
            "run": "fake-run",
            "fmi": False,
            "timeout": 30,
            "worker": (sys.executable, str(FAKES / "worker.py")),
            "server": (sys.executable, str(FAKES / "server.py")),
        }
        return RunPlan(**usual | fields)

    return make
