"""The table at the widths of real terminals and pipes."""

from __future__ import annotations

from typing import Any

import pytest

from workflow.plan import RunResult
from workflow.table import notes, print_result

METRICS = {"mae": 0.01234, "mse": 0.000321, "bias": -0.00123, "nmad": 0.01301, "r2": 0.92345}
NAMES = {"mae": "MAE", "mse": "MSE", "bias": "bias", "nmad": "NMAD", "r2": "R2"}


def result(ranks: int = 4, rows: int = 313, **metrics: float | None) -> RunResult:
    values = METRICS | metrics
    records: list[dict[str, Any]] = [
        {
            "rank": rank,
            "rows": rows,
            "num_batches": 3,
            "batch_size": 128,
            "calibration": None,
            "inference_time (seconds)": 1.5,
            "sample_persec": rows / 1.5,
            "peak_memory (MB)": 345.6,
            **{name: values[key] for key, name in NAMES.items()},
        }
        for rank in range(ranks)
    ]
    summary = {
        "rows": rows * ranks,
        "rows_excluded": 0,
        "batches": 3 * ranks,
        "inference_seconds": 1.75,
        "rows_per_second": {"wall_clock": 715.4, "end_to_end": 93.2, "sum_of_ranks": 834.7},
        "engine": "torch",
        "precision_max_dz": None,
        "peak_memory_mb": 345.6,
        "metrics": values,
    }
    place = "/elsewhere/results/a"
    return RunResult(
        run="a",
        combined_data=f"{place}/combined_data.json",
        summary_path=f"{place}/summary.json",
        predictions=f"{place}/predictions.npz",
        summary=summary,
        records=records,
        seconds=9.0,
    )


def lines(capsys: pytest.CaptureFixture[str], shown: RunResult, plot: str | None) -> list[str]:
    print_result(shown, plot)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", ["80", "120"])
def test_columns_are_aligned_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    out = lines(capsys, result(rows=659_817 // 4), "/elsewhere/results/a/redshift.png")
    table = out[: next(i for i, line in enumerate(out) if not line.strip())]
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table[0]) <= 80
    assert "…" not in "".join(table)
    heads = "rank rows batches seconds rows/s MB MAE MSE bias NMAD R²"
    assert table[1].split() == heads.split()
    ends = [table[1].rstrip().index(head) + len(head) for head in ("rows/s", "NMAD", "R²")]
    for row in (line for line in table[2:] if "─" not in line):
        assert all(row[end - 1].isdigit() for end in ends)  # numbers end below their heads
    total = "total 659,816 12 1.75 715 346 0.0123 0.00032 -0.0012 0.0130 0.923"
    assert table[-1].split() == total.split()


def test_it_says_which_rate_is_wall_clock(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(lines(capsys, result(), None))
    assert "Total rows/s is wall-clock: all rows in the 1.75 s of the slowest rank." in text
    assert "add up to 835 rows/s; with joining and loading it is 93." in text
    assert "results: /elsewhere/results/a/combined_data.json" in text
    assert "plot:" not in text


def test_a_line_longer_than_the_terminal_is_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "R²" in lines(capsys, result(), None)[1]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_large_numbers_are_never_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = "\n".join(lines(capsys, result(rows=123_456_789), None))
    assert "493,827,156" in text
    assert "\u2026" not in text


def test_metrics_without_a_value_show_as_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys(METRICS)
    out = lines(capsys, result(ranks=1, rows=0, **nothing), None)
    assert out[3].split() == ["0", "0", "3", "1.50", "0", "346", *5 * ["–"]]  # noqa: RUF001


def test_many_ranks_do_not_push_the_total_off_the_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\n".join(lines(capsys, result(ranks=100), None))
    assert "in combined_data.json: 68." in text
    assert "   31    313 " in text
    assert "   32    313 " not in text
    assert "total 31,300" in text


def test_excluded_rows_are_mentioned() -> None:
    shown = result()
    named = [{"file": "/elsewhere/a.pt", "row": row, "part": "images"} for row in range(5)]
    shown.summary.update(rows_excluded=7, excluded_rows=named)
    said = notes(shown)
    assert "Warning: no metric counts 7 of 1,252 rows, as what stands in brackets is not" in said
    assert [line for line in said if line.startswith("  ")] == [
        *(f"  /elsewhere/a.pt row {row} (images)" for row in range(5)),
        "  ...",
    ]
    assert max(map(len, said)) < 100


def test_another_engine_than_the_default_is_named() -> None:
    shown = result()
    assert "engine" not in " ".join(notes(shown))
    shown.summary["engine"] = "openvino"
    assert "Predicted by engine openvino." in notes(shown)


def test_a_lower_precision_says_what_it_costs() -> None:
    shown = result()
    assert "bf16" not in " ".join(notes(shown))
    shown.summary.update(precision="bf16", precision_max_dz=0.00081, precision_rows=1024)
    line = "Precision bf16: z_phot is at most 8.1e-04 from fp32's, on 1,024 rows predicted twice."
    assert line in notes(shown)


def test_a_batch_size_that_was_chosen_is_told() -> None:
    shown = result(ranks=2)
    rates = {"8": 649.4, "16": 844.0, "32": None}
    calibration = {"asked": "auto", "chosen": 16, "rows_per_second": rates, "seconds": 1.9}
    for record in shown.records:
        record.update(batch_size=16, calibration=calibration)
    said = "\n".join(notes(shown))
    assert "Batch size auto: 16 rows, after 1.9 s of trials; rows/s were\n  8: 649, 16: 844" in said
    shown.records[1]["batch_size"] = 8  # without a rendezvous
    said = "\n".join(notes(shown))
    assert "Batch size auto: 8, 16, as each rank chose for itself; see its record." in said
