"""The comparison of collectives: each library really runs, and the report says what was taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import collectives_report as report
from benchmarks import raw
from benchmarks.collectives import run
from benchmarks.start import serve


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve() as address:
        yield address


@pytest.mark.parametrize("peer", ["sync", "async", "gloo"])
def test_each_library_runs(server: str, peer: str) -> None:
    cases = ["barrier 0", "allreduce 1024", "gather 1024"]
    seconds = run(peer, 2, server, cases)
    assert list(seconds) == cases
    assert all(1e-7 < each < 1 for each in seconds.values())


def test_a_rank_that_fails_is_no_result(server: str) -> None:
    with pytest.raises(RuntimeError, match="0 of 1 ranks"):
        run("sync", 1, server.replace(":", ":x"), ["barrier 0"])


def test_the_machine_itself_is_measured() -> None:
    found = raw.measure()
    assert 1e8 < found["stream bytes/s"] < found["memcpy bytes/s"] * 10
    assert 1e-7 < found["hop s"] < 1e-2


def document() -> dict[str, Any]:
    about = {
        **{"date": "2026-11-24", "cpu": "a CPU", "cores": 2, "kernel": "6", "python": "3.11"},
        **{"congestion_control": "bbr", "versions": {"numpy": "2"}, "oversubscribed": [4]},
    }
    limits = {"memcpy bytes/s": 5e9, "stream bytes/s": 2e9, "hop s": 9e-6}
    records: list[dict[str, Any]] = [{"round": 0, "raw": limits}]
    for number, factor in enumerate((1.0, 2.0, 4.0)):
        for world in (2, 4):
            for peer, share in (("sync", 1.0), ("mpi", 0.5 * factor)):
                seconds = {"barrier 0": 1e-5 * factor * share, "allreduce 1048576": 1e-3 * share}
                place = {"round": number, "world": world, "peer": peer}
                records.append(place | {"seconds": seconds})
    return {"about": about, "records": records}


def test_the_table_has_medians_ranges_and_ratios_round_by_round() -> None:
    table = report.table(document())
    assert "### 2 ranks\n" in table
    assert "### 4 ranks (oversubscribed)" in table
    assert "memory 5.0 GB/s" in table
    # Ours takes 10, 20, 40 µs; theirs 0.5, 1, 2 times as long in the same rounds.
    assert "| barrier | µs | 20 (10 … 40) | 20 (5.00 … 80) | 1.00 (0.50 … 2.00) |" in table
    assert "| allreduce 1 MiB | GB/s | 1.05 (1.05 … 1.05) |" in table


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    report.plot(document(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
