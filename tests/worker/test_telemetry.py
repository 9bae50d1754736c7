"""Logs and metrics inside AWS Lambda, and their absence elsewhere."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lambda_worker import handlers, telemetry
from lambda_worker.events import EventError
from tests.worker.worker_data import MakePt

CONTEXT = SimpleNamespace(aws_request_id="1-2-3", function_name="ranks")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As at the start of a process; and the logger as it was before, for other tests."""
    log = logging.getLogger("lambda_worker")
    handlers_before, level = list(log.handlers), log.level
    before = set(vars(log))
    telemetry._logger.cache_clear()
    telemetry._cold = True
    yield
    telemetry._logger.cache_clear()
    log.handlers[:] = handlers_before
    log.setLevel(level)
    for name in set(vars(log)) - before:
        delattr(log, name)


@pytest.fixture
def task(make_pt: MakePt, tmp_path: Path) -> dict[str, Any]:
    event = {"data": str(make_pt("a.pt", 7)), "results": str(tmp_path), "world_size": 2}
    plan = handlers.init({**event, "run": "r1", "engine": "onnx"})
    ranks: list[dict[str, Any]] = plan["ranks"]
    return ranks[1]


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_line_says_who_and_which_event(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handlers.infer({"task": {**task, "epoch": 0}, "epoch": 3}, CONTEXT)
    *lines, metrics = printed(capsys)
    stages = [line["message"] for line in lines]
    assert [text for text in stages if text.startswith("infer")] == [
        "infer: started",
        "infer: join",
        "infer: load",
        "infer: infer",
        "infer: gather",
        "infer: done",
    ]
    who = {"request_id": "1-2-3", "function": "ranks", "run": "r1", "rank": 1, "epoch": 3}
    for line in lines:
        assert line.items() >= {**who, "cold_start": True, "level": "INFO"}.items()
    assert metrics.items() >= who.items()
    assert lines[-1]["result"]["rows"] == 4
    assert lines[-1]["seconds"] > 0


def test_metrics_are_few_and_have_units_and_one_dimension(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        record = handlers.infer(task, CONTEXT)
    first, second = [line for line in printed(capsys) if "_aws" in line]
    (told,) = second["_aws"]["CloudWatchMetrics"]
    assert told["Namespace"] == "cosmic"
    assert told["Dimensions"] == [["function"]]  # each further one would be billed for every value
    assert {m["Name"]: m["Unit"] for m in told["Metrics"]} == telemetry.UNITS
    assert second["rows_per_second"] == [record["sample_persec"]]
    assert second["engine"] == "onnx"
    assert (first["cold_start"], second["cold_start"]) == ([1.0], [0.0])


def test_a_rank_without_rows_does_not_spoil_the_rate(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handlers.infer({**task, "shard": []}, CONTEXT)
    assert "rows_per_second" not in printed(capsys)[-1]


def test_a_failure_is_one_line_with_its_class(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EventError):
        handlers.infer({**task, "batch_size": "-3"}, CONTEXT)
    *_, line, metrics = printed(capsys)
    assert (line["level"], line["error"], line["rank"]) == ("ERROR", "EventError", 1)
    assert line["message"].startswith("infer: failed: EventError: batch_size: got '-3'")
    assert [m["Name"] for m in metrics["_aws"]["CloudWatchMetrics"][0]["Metrics"]] == ["cold_start"]


def test_keys_of_one_event_are_not_in_the_next(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handlers.infer(task, CONTEXT)
    capsys.readouterr()
    with pytest.raises(EventError):
        handlers.check({}, SimpleNamespace(aws_request_id="4", function_name="check"))
    for line in printed(capsys):
        assert line["request_id"] == "4"
        assert not {"run", "rank", "epoch"} & set(line)
        assert "cold_start" in line


@pytest.mark.parametrize("name", ["init", "infer", "summarize", "blame", "check"])
def test_every_handler_is_observed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EventError):
        getattr(handlers, name)({"Run": "r7"}, CONTEXT)
    first = printed(capsys)[0]
    assert (first["message"], first["handler"], first["run"]) == (f"{name}: started", name, "r7")


def test_init_and_summarize_tell_what_came_of_them(
    make_pt: MakePt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"data": str(make_pt("a.pt", 7)), "results": str(tmp_path), "world_size": 1}
    plan = handlers.init({**event, "run": "r1", "engine": "onnx"}, CONTEXT)
    handlers.infer(plan["ranks"][0])
    handlers.summarize(plan, CONTEXT)
    done = [line for line in printed(capsys) if line.get("message", "").endswith(": done")]
    assert [line["result"]["rows"] for line in done] == [7, 7]
    assert done[1]["result"]["metrics"]["mae"] > 0


def test_without_a_context_nothing_is_printed(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handlers.infer(task)
    handlers.infer(task, SimpleNamespace(get_remaining_time_in_millis=lambda: 60_000))
    assert capsys.readouterr().out == ""
    assert telemetry._cold


def test_without_powertools_there_are_plain_lines(
    task: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("aws_lambda_powertools")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aws_lambda_powertools", None)
    assert handlers.infer(task, CONTEXT)["rows"] == 4
    assert capsys.readouterr().out == ""
    assert caplog.messages[0] == "infer: started"
    assert caplog.messages[-1] == "infer: done"


def test_what_a_caller_gives_as_progress_is_used(task: dict[str, Any]) -> None:
    stages: list[str] = []
    handlers.infer(task, CONTEXT, progress=lambda stage, rows, of: stages.append(stage))
    assert stages[-1] == "done"


@pytest.mark.parametrize("field", ["key_arn", "server_secret_arn", "fmi_key"])
def test_a_secret_in_the_wrong_place_is_not_repeated(
    task: dict[str, Any], capsys: pytest.CaptureFixture[str], field: str
) -> None:
    secret = "deadbeef" * 8
    with pytest.raises(EventError) as caught:
        handlers.infer({**task, field: secret}, CONTEXT)
    assert secret[:8] not in str(caught.value)
    assert secret[:8] not in capsys.readouterr().out
    assert field in str(caught.value)
