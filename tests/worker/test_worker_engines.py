"""The engine of a run: chosen once by init, named in what is written, and no torch where it is not
the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lambda_worker import handlers
from lambda_worker.engine import DEMO_MODEL, EngineError, ModelError
from lambda_worker.events import EventError
from lambda_worker.model_file import save_model
from tests.worker.worker_data import SMALL, MakePt, trained

Event = dict[str, Any]


@pytest.fixture
def payload(make_pt: MakePt, tmp_path: Path) -> Event:
    data = str(make_pt("a.pt", 40))
    return {"data": data, "world_size": 2, "results": str(tmp_path / "out"), "threads": 1}


def finish(plan: Event) -> Event:
    for task in plan["ranks"]:
        handlers.infer(task)
    return handlers.summarize(plan)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_run_without_torch_predicts_what_torch_does(payload: Event, engine: str) -> None:
    exact = finish(handlers.init({**payload, "run": "torch"}))
    plan = handlers.init({**payload, "run": engine, "engine": engine})
    assert plan["model"] == str(DEMO_MODEL.with_suffix(".onnx"))
    for task in plan["ranks"]:
        assert (task["engine"], task["model"]) == (engine, plan["model"])
    done = finish(plan)
    assert (done["summary"]["engine"], done["summary"]["precision"]) == (engine, "fp32")
    assert {record["engine"] for record in done["records"]} == {engine}
    with np.load(exact["predictions"]) as wanted, np.load(done["predictions"]) as found:
        assert abs(wanted["z_phot"] - found["z_phot"]).max() <= 2e-6


def test_torch_unless_told_and_auto_becomes_one_engine(
    payload: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = handlers.init(payload)
    assert (plan["ranks"][1]["engine"], plan["model"]) == ("torch", str(DEMO_MODEL))
    plan = handlers.init({**payload, "engine": "auto"})
    assert [task["engine"] for task in plan["ranks"]] == ["openvino"] * 2
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert handlers.init({**payload, "engine": "auto"})["ranks"][1]["engine"] == "onnx"
    # A rank that lacks the engine never takes another one.
    with pytest.raises(EngineError, match=r"openvino is not .*: pip install 'cosmic-fmi\[openvino"):
        handlers.infer(plan["ranks"][0])


def test_ranks_do_not_choose(payload: Event) -> None:
    task = handlers.init(payload)["ranks"][0]
    with pytest.raises(EventError, match="engine: got auto, which is for init"):
        handlers.infer({**task, "engine": "auto"})
    with pytest.raises(EventError, match="engine: got 'jax', expected 'torch', 'onnx'"):
        handlers.init({**payload, "engine": "jax"})


def test_init_tells_of_a_missing_or_stale_export(payload: Event, tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    save_model(trained(SMALL), model)
    event = {**payload, "model": str(model), "engine": "onnx"}
    with pytest.raises(ModelError, match=f"no export at .*: cosmic model export {model}$"):
        handlers.init(event)
    model.with_suffix(".onnx").write_bytes(DEMO_MODEL.with_suffix(".onnx").read_bytes())
    with pytest.raises(ModelError, match="exported from another model"):
        handlers.init(event)


BLOCKED = """
import sys
for name in ("torch", "safetensors", "boto3", "pandas", "matplotlib"):
    sys.modules[name] = None  # to import it is an error
from lambda_worker.__main__ import main
main()
"""


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_no_step_of_a_run_imports_torch(payload: Event, engine: str) -> None:
    def run(step: str, event: Event) -> Event:
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, step],
            input=json.dumps(event),
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        last: Event = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == 0, last
        result: Event = last["result"]
        return result

    plan = run("init", {**payload, "engine": engine, "world_size": 1})
    assert run("infer", plan["ranks"][0])["rows"] == 40
    assert run("summarize", plan)["summary"]["engine"] == engine
