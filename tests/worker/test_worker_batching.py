"""Batch size "auto": what is chosen, within which time and memory, and by all ranks alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lambda_worker import batching, handlers
from lambda_worker.batching import CANDIDATES, allowance, calibrate, choose, report
from lambda_worker.engine import Array
from tests.worker.worker_data import MakePt

PLENTY = (10**12, "machine")


class Machine:
    """A model, a clock and a memory that are easy to foresee: row by row, and so much a call."""

    def __init__(self, row: float, call: float, mb_per_row: float = 0.0, peak: float = 0.0) -> None:
        self.row, self.call, self.mb_per_row = row, call, mb_per_row
        self.now, self.peak = 0.0, 100.0 + peak
        self.sizes: list[int] = []

    def predict(self, images: Array, magnitudes: Array) -> Array:
        assert images.shape[1:] == (5, 32, 32)
        assert images.dtype == magnitudes.dtype == np.float32
        self.sizes.append(len(images))
        self.now += self.call + self.row * len(images)
        self.peak = max(self.peak, 100.0 + self.mb_per_row * len(images))
        return magnitudes[:, 0]

    def calibrate(self, rows: int = 10**6, memory: tuple[int, str] = PLENTY) -> batching.Trials:
        used = {"VmRSS": lambda: 100.0, "VmHWM": lambda: self.peak}
        return calibrate(
            self.predict, rows, memory=memory, used=lambda f: used[f](), clock=lambda: self.now
        )


def test_the_smallest_that_is_nearly_the_fastest() -> None:
    assert choose(np.array([10.0, 50, 96, 98, 100, 90, 80])) == 64
    assert choose(np.array([10.0, 50, 97.5, 98, 100, 90, 80])) == 32
    assert choose(np.array([1.0, 2, 3, 4, 5, 6, 7])) == 512
    assert choose(np.array([5.0, 0, 0, 0, 0, 0, 0])) == 8


def test_sizes_that_do_not_matter_are_not_chosen() -> None:
    assert choose(np.array([10.0, 20, np.inf, np.inf, np.inf, np.inf, np.inf])) == 16
    assert choose(np.full(7, np.inf)) == 8  # no rank has any row


def test_a_fast_machine_tries_all_sizes() -> None:
    machine = Machine(row=1e-5, call=1e-3)
    trials = machine.calibrate()
    assert trials.rates == pytest.approx([size / (1e-3 + 1e-5 * size) for size in CANDIDATES])
    assert choose(trials.rates) == 512
    assert trials.seconds < batching.BUDGET


def test_a_slow_machine_stops_in_time() -> None:
    machine = Machine(row=1 / 400, call=0.0)  # the full model on two cores
    trials = machine.calibrate()
    assert trials.seconds <= batching.BUDGET
    assert max(machine.sizes) == 256
    assert trials.rates[-1] == 0
    assert choose(trials.rates) == 8


def test_one_slow_call_does_not_decide() -> None:
    machine = Machine(row=1e-3, call=1e-2)
    plain = machine.predict

    def predict(images: Array, magnitudes: Array) -> Array:
        machine.now += 3.0 * (len(machine.sizes) == 1)
        return plain(images, magnitudes)

    machine.predict = predict  # type: ignore[method-assign]
    assert choose(machine.calibrate().rates) == 32


def test_no_size_is_tried_for_which_memory_may_be_short() -> None:
    machine = Machine(row=1e-5, call=1e-3, mb_per_row=1.0)
    rates = machine.calibrate(memory=(100_000_000, "cgroup")).rates
    assert machine.peak - 100.0 <= 100
    assert list(rates > 0) == [True, True, True, True, False, False, False]


def test_the_first_size_is_tried_whatever_memory_there_is() -> None:
    assert Machine(1e-5, 1e-3, peak=500.0).calibrate(memory=(0, "lambda")).rates[0] > 0


def test_no_size_far_above_the_rows_there_are() -> None:
    machine = Machine(row=1e-5, call=1e-3)
    rates = machine.calibrate(rows=40).rates
    assert max(machine.sizes) == 64
    assert np.isinf(rates[4:]).all()
    assert np.isinf(Machine(1e-5, 1e-3).calibrate(rows=0).rates).all()


def test_the_report_is_json() -> None:
    trials = Machine(row=1e-5, call=1e-3).calibrate(rows=10)
    assert report(trials, trials.rates) == {
        "asked": "auto",
        "chosen": 16,
        "rows_per_second": {
            "8": pytest.approx(8 / 1.08e-3),
            "16": pytest.approx(16 / 1.16e-3),
            **dict.fromkeys(("32", "64", "128", "256", "512")),
        },
        "memory_mb": 1e6,
        "memory_limit": "machine",
        "seconds": trials.seconds,
    }


# -- memory --------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8,000 MiB available, its process in a group of two levels."""
    files = {
        "proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable:   8192000 kB\n",
        "proc/self/status": "VmHWM:\t 900000 kB\nVmRSS:\t  204800 kB\n",
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": f"{100 << 20}\n",
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def half(mib: int) -> int:
    return (mib << 20) // 2


def test_half_of_what_the_machine_has_available(root: Path) -> None:
    assert allowance(root, {}) == (half(8000), "machine")


def test_divided_among_the_ranks_of_this_machine(root: Path) -> None:
    assert allowance(root, {"LOCAL_WORLD_SIZE": "4"}) == (half(2000), "machine")


def test_a_group_above_ours_may_be_the_limit(root: Path) -> None:
    outer = root / "sys/fs/cgroup/outer"
    write(outer / "memory.max", f"{1000 << 20}\n")
    write(outer / "memory.current", f"{600 << 20}\n")
    assert allowance(root, {}) == (half(400), "cgroup")
    write(outer / "memory.stat", f"anon 5\ninactive_file {200 << 20}\n")  # goes when needed
    assert allowance(root, {}) == (half(600), "cgroup")


def test_groups_of_version_1(root: Path) -> None:
    write(root / "proc/self/cgroup", "3:cpu:/x\n4:memory:/docker/abc\n")
    # In a container the path is the host's; the group itself stands at the top.
    folder = root / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", f"{512 << 20}\n")
    write(folder / "memory.usage_in_bytes", f"{112 << 20}\n")
    assert allowance(root, {}) == (half(400), "cgroup")


def test_a_lambda_function_has_what_it_was_given(root: Path) -> None:
    assert allowance(root, {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "600"}) == (half(400), "lambda")
    assert allowance(root, {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "100"}) == (0, "lambda")


def test_of_this_machine_something_is_known() -> None:
    room, limit = allowance()
    assert room > 1_000_000
    assert limit in ("machine", "cgroup")


# -- in a job ------------------------------------------------------------------------------------


def test_all_ranks_choose_the_same_by_the_slowest(
    make_pt: MakePt, tmp_path: Path, rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = [
        batching.Trials(np.array([9.0, 10, 11, 80, 99, 99, 99]), PLENTY, 0.1),
        batching.Trials(np.array([9.0, 10, 70, 10, 0, 0, 0]), PLENTY, 0.2),
        batching.Trials(np.array([90.0, 60, 70, np.inf, np.inf, np.inf, np.inf]), PLENTY, 0.3),
    ]
    monkeypatch.setattr(batching, "calibrate", lambda predict, rows: each[rows - 40])
    for number in range(3):
        make_pt(f"data/{number}.pt", 40 + number)
    data = {str(number): f"{number}.pt" for number in range(3)}
    event = {"data": str(tmp_path / "data"), "results": str(tmp_path / "out"), "data_map": data}
    plan = handlers.init({**event, "batch_size": "AUTO", "rendezvous_endpoint": rendezvous})
    with ThreadPoolExecutor(3) as pool:
        records: list[dict[str, Any]] = list(pool.map(handlers.infer, plan["ranks"]))
    assert [record["batch_size"] for record in records] == [32] * 3
    rates = {"8": 9.0, "16": 10.0, "32": 11.0, "64": 10.0, "128": None, "256": None, "512": None}
    assert [record["calibration"]["rows_per_second"] for record in records] == [rates] * 3
    assert [record["calibration"]["seconds"] for record in records] == [0.1, 0.2, 0.3]
    summary = handlers.summarize(plan)["summary"]
    assert (summary["batch_size"], summary["batch_size_asked"]) == (32, "auto")


def test_without_a_rendezvous_each_rank_chooses(
    make_pt: MakePt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(rank: int) -> batching.Trials:
        return batching.Trials(np.eye(7)[rank], PLENTY, 0.1)

    ranks = iter((1, 3))
    monkeypatch.setattr(batching, "calibrate", lambda predict, rows: predicted(next(ranks)))
    event = {"data": str(make_pt("a.pt", 30)), "results": str(tmp_path / "out"), "world_size": 2}
    plan = handlers.init({**event, "batch_size": "auto"})
    assert [handlers.infer(task)["batch_size"] for task in plan["ranks"]] == [16, 64]
    assert handlers.summarize(plan)["summary"]["batch_size"] is None
    fixed = handlers.init(event)
    assert [handlers.infer(task)["calibration"] for task in fixed["ranks"]] == [None, None]
    assert handlers.summarize(fixed)["summary"]["batch_size"] == 128
