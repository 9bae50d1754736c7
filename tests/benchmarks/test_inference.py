"""The comparison of inference loops: each one really runs, and the report says what was taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import inference, inference_report
from lambda_worker.engine import EngineError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workflow.export.export", no_export)
        inference._prepare(place)
    return place


def no_export(*given: object, **more: object) -> None:
    """It takes half a minute, and none of these tests runs an engine that reads it."""
    raise EngineError("none wanted")


def test_loops_run_and_agree(folder: Path) -> None:
    found = {
        name: inference.measure(
            {"loop": name, "ranks": ranks, "threads": 1}, str(folder), sizes=[16], rows=32
        )
        for name, ranks in (("reference", 1), ("torch-fp32", 2))
    }
    for each in found.values():
        assert 1 < each["rates"]["16"] < 1e5
        assert 10 < each["private_mb"] < 2000
    plain, ours = (each["values"] for each in found.values())
    assert ours == pytest.approx(plain, abs=2e-6)
    assert max(ours) - min(ours) > 1e-4


def test_an_engine_that_is_not_there_says_why(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no export"), inference.started("onnx-fp32", 1, "."):
        pass


def document() -> dict[str, Any]:
    about = {"date": "2026-11-24", "cpu": "a CPU", "cores": 2, "kernel": "6", "python": "3.11"}
    records: list[dict[str, Any]] = []
    for number, noise in enumerate((1.0, 1.1, 0.9)):
        speeds = {"sgemm": 400, "reference": 100 * noise, "torch-fp32": 200 * noise}
        for name, speed in speeds.items():
            for ranks, threads in ((1, 2), (2, 1), (1, 1)):
                rate = speed * (2 if ranks * threads == 2 else 1)
                rates = {"128": rate} if name == "sgemm" else {"16": rate / 2, "128": rate}
                record = {"round": number, "loop": name, "ranks": ranks, "threads": threads}
                values = [0.5, 0.25 + (1e-6 if name == "torch-fp32" else 0)]
                records.append(record | {"rates": rates, "private_mb": 50.0, "values": values})
        profiled = {"loop": "profiled", "ranks": 1, "threads": 2, "rates": {"128": 50 * noise}}
        records.append({"round": number, "private_mb": 90.0, "values": [0.5, 0.25], **profiled})
        cold = {"import torch": 1.5, "reference": 4, "profiled": 5, "torch-fp32": 2}
        records.append({"round": number, "cold": cold})
    return {"about": {**about, "versions": {"torch": "2"}}, "records": records}


def test_the_report_divides_what_belongs_together() -> None:
    lines = inference_report.table(document()).splitlines()
    assert "| torch | 1 × 2 | 200 (180 … 220) | 400 (360 … 440) |" in lines  # noqa: RUF001
    twice = "2.00 (2.00 … 2.00)"
    assert f"| torch | 2 × 1 | {twice} | {twice} | {twice} | 50 % |" in lines  # noqa: RUF001
    figures = next(line for line in lines if "1.0e-06" in line)
    assert "8.00 (8.00 … 8.00)" in figures  # against the profiled loop
    assert twice in figures  # two ranks against one


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n" + "old\n\n".join(inference.MARKS) + "after\n")
    inference._write(page, "new\n")
    inference._write(page, "newer")
    assert page.read_text() == "before\n<!-- inference -->\n\nnewer\n\n<!-- /inference -->\nafter\n"
