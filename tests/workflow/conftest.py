"""A run with fakes: what happens is said in the plan's `data`; or on an AWS that is one."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_aws import RECORD, FakeAws, Frame, fake_aws, succeeded
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


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    """An account with an execution that goes well, by the environment's credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    more = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (nowhere | keys | more).items():
        monkeypatch.setenv(name, value)
    with fake_aws() as account:
        monkeypatch.setenv("AWS_ENDPOINT_URL", account.endpoint)
        account.frames = [Frame("RUNNING"), succeeded("r-1")]
        place = "bucket/results/r-1/combined_data.json"
        account.objects[place] = json.dumps([RECORD | {"rank": r} for r in range(4)]).encode()
        yield account
