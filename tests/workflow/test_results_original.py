"""The original project's files: real ones of AWS Lambda, and ones like them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.result_files import ORIGINAL, kinds, of_kind, original_record, put
from workflow.configurations import row, summarise
from workflow.published import published
from workflow.results import Results, Run, read
from workflow.results_checks import trimmed_mean
from workflow.results_original import gigabytes, label, whole_rows

AWS = ORIGINAL / "aws"


@pytest.fixture(scope="module")
def real() -> Results:
    return read([str(ORIGINAL)])


def _run(results: Results, name: str) -> Run:
    (found,) = [run for run in results.runs if run.name == f"result-partition-{name}"]
    return found


# -- the published figures ------------------------------------------------------------------------


def test_published_figures_come_out_of_the_files(real: Results) -> None:
    (found,) = [p for p in published(real.runs) if (p.partition_mb, p.data_gb) == (25, 12.6)]
    assert (found.runs, found.incomplete) == (3, 0)
    assert found.bits_per_s_sum_of_ranks is not None
    assert f"{found.bits_per_s_sum_of_ranks / 1e9:.2f}" == "18.04"
    assert found.bits_per_s_wall_clock is not None
    assert f"{found.bits_per_s_wall_clock / 1e9:.2f}" == "3.87"
    assert found.bits_per_s_end_to_end is not None
    assert f"{found.bits_per_s_end_to_end / 1e9:.2f}" == "1.94"


def test_without_a_log_there_is_no_wall_clock_figure() -> None:
    (found,) = published(read([str(AWS / "result-partition-25MB" / "total")]).runs)
    assert found.bits_per_s_sum_of_ranks is not None
    assert (found.bits_per_s_wall_clock, found.bits_per_s_end_to_end) == (None, None)


def test_published_are_the_scaling_runs_only(real: Results) -> None:
    runs = {(p.partition_mb, p.data_gb): p.runs for p in published(real.runs)}
    assert runs == {(25, 1): 1, (25, 12.6): 3, (100, 1): 1, (100, 12.6): 3}


def test_where_records_lack_the_originals_tables_speak(real: Results) -> None:
    with (AWS / "results" / "result_stats.csv").open(newline="") as file:
        printed = [row for row in csv.DictReader(file) if row["run"] == "mean"]
    found = {(p.partition_mb, p.data_gb): p for p in published(real.runs, real.tabled)}
    assert len(found) == len(printed) == 33
    for line in printed:
        mine = found[float(line["partition (MB)"]), float(line["data (GB)"])]
        assert mine.runs == 3
        # A mean of rates that are printed to a hundredth.
        rate = float(line["throughput_bps"])
        assert mine.bits_per_s_sum_of_ranks == pytest.approx(rate, abs=0.02)
    assert (found[25, 12.6].tabled, found[100, 12.6].tabled) == (0, 0)
    assert (found[25, 1].tabled, found[50, 12.6].tabled) == (2, 3)
    assert f"{(found[50, 12.6].bits_per_s_wall_clock or 0) / 1e9:.2f}" == "3.64"
    cut = {gb for (_, gb), each in found.items() if each.incomplete == 3}
    assert cut == {256, 512, 768, 1000}
    assert {found[100, gb].bits_per_s_end_to_end for gb in cut} == {None}


def test_rows_of_tables_that_lack_data_have_no_wall_clock_rate() -> None:
    """Of 12.6 GB in 100 MB, 122 and 8 of 130 partitions; 100 GB are 95.3 % of that."""
    tables = read([str(AWS / "results")])
    assert not tables.runs
    found = {(p.partition_mb, p.data_gb): p for p in published((), tables.tabled)}
    assert (found[100, 12.6].incomplete, found[100, 12.6].bits_per_s_wall_clock) == (2, None)
    assert (found[100, 100].incomplete, found[25, 12.6].incomplete) == (0, 0)
    whole = found[25, 12.6]
    rates = whole.bits_per_s_sum_of_ranks, whole.bits_per_s_wall_clock
    assert [f"{(rate or 0) / 1e9:.2f}" for rate in rates] == ["18.04", "3.87"]


def test_rows_of_tables_are_bounded(tmp_path: Path) -> None:
    head = "partition (MB),data (GB),run,total_cpu_time (seconds),throughput_bps,total_bits\n"
    lines = [f"25,{size},1,1,1,1\n" for size in range(1, 1500)]
    (tmp_path / "result_stats.csv").write_text(head + "".join(lines))
    assert len(read([str(tmp_path)]).tabled) == 1000


def _rows(name: str) -> list[dict[str, str]]:
    with (AWS / "results" / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["run"] != "mean"]


def test_every_row_of_result_stats_is_reproduced_to_its_digits(real: Results) -> None:
    by_place = {(p.partition_mb, p.data_gb, p.repeat): p for p in real.runs if _scaling(p)}
    checked = 0
    for line in _rows("result_stats.csv"):
        key = (float(line["partition (MB)"]), float(line["data (GB)"]), int(line["run"]))
        if run := by_place.get(key):
            _same_figures(line, run)
            checked += 1
    assert checked == len(by_place) == 8


def _scaling(run: Run) -> bool:
    return run.source == "original" and "Batches" not in run.name


def _same_figures(line: dict[str, str], run: Run) -> None:
    cpu = trimmed_mean([rank.cpu_s for rank in run.ranks if rank.cpu_s is not None])
    rates = row(run)["bits_per_s_sum_of_ranks"]
    assert cpu == pytest.approx(float(line["total_cpu_time (seconds)"]), abs=0.00501)
    assert rates == pytest.approx(float(line["throughput_bps"]), abs=0.00501, rel=1e-12)
    assert run.bits == float(line["total_bits"])


def test_batch_varying_results_are_reproduced(real: Results) -> None:
    (line,) = [
        r for r in _rows("batch_varying_results.csv") if (r["batch_size"], r["run"]) == ("32", "1")
    ]
    _same_figures(line, _run(real, "25MB/1GB/Batches/32/1"))


# -- findings are true ----------------------------------------------------------------------------


def test_the_real_files_have_these_findings_and_no_others(real: Results) -> None:
    assert kinds(real) == [
        "conflict",
        *["less data than named"] * 2,
        "moved",
        *["outliers"] * 9,
        *["ranks missing"] * 2,
        "time of unknown kind",
    ]


def test_incomplete_runs_are_named(real: Results) -> None:
    first, second, third = (_run(real, f"100MB/total/{n}") for n in (1, 2, 3))
    assert [len(run.ranks) for run in (first, second, third)] == [122, 8, 130]
    assert [run.status for run in (first, second, third)] == ["incomplete", "incomplete", "ok"]
    assert [run.world_size for run in (first, second, third)] == [130, 130, 130]
    texts = {f.place: f.text for f in real.findings if f.kind == "ranks missing"}
    assert texts[first.place].startswith("122 of 130 partitions have a record")
    assert texts[second.place].startswith("8 of 130 partitions have a record")


def test_fewer_partitions_than_the_name_says_are_less_data_and_no_lost_ranks(real: Results) -> None:
    run = _run(real, "25MB/1GB/3")
    assert (run.status, run.world_size, len(run.ranks)) == ("ok", 40, 40)
    (text,) = [f.text for f in real.findings if f.place == run.place and "less" in f.kind]
    assert "40 records hold 0.98 of the 1 GB" in text
    assert "41 partitions" in text


def test_outliers_are_named_and_kept(real: Results) -> None:
    run = _run(real, "100MB/1GB/1")
    (text,) = [f.text for f in real.findings if f.place == run.place and f.kind == "outliers"]
    assert text.startswith("Beyond 21.73 to 26.50 s of CPU time")  # numpy.percentile's
    assert "1 of 11 ranks" in text
    assert "100MB/100.pt 87.04 s" in text
    assert len(run.ranks) == 11


def test_conflicts_between_tables_are_named(real: Results) -> None:
    text = of_kind(real, "conflict").text
    assert text.startswith("25 of 84 durations differ")


def test_a_table_that_does_not_fit_its_records_is_named(tmp_path: Path) -> None:
    shutil.copytree(AWS / "result-partition-100MB" / "1GB", tmp_path / "result-partition-100MB/1GB")
    table = (AWS / "results" / "result_stats.csv").read_text()
    assert "361367150.45" in table
    put(tmp_path / "result_stats.csv", table.replace("361367150.45", "361367150.46"))
    text = of_kind(read([str(tmp_path)]), "conflict").text
    assert "1 of 1 rows" in text
    assert "throughput_bps 361,367,150.46, records 361,367,150.45" in text


# -- what a record says ---------------------------------------------------------------------------


def test_all_rows_of_the_real_files_are_164160_bits(real: Results) -> None:
    ranks = [rank for run in real.runs if run.source == "original" for rank in run.ranks]
    assert {rank.rows for rank in ranks} == {240, 369, 1278, 5113}
    assert all(rank.bits == (rank.rows or 0) * 164_160 for rank in ranks)
    assert _run(real, "25MB/total/1").rows == 659_817


def test_cpu_time_is_never_wall_time(real: Results) -> None:
    for run in (run for run in real.runs if run.source == "original"):
        assert all(rank.inference_s is None and rank.wall_s is None for rank in run.ranks)
        assert all(rank.cpu_s for rank in run.ranks)
        assert row(run)["rank_p50_s"] is None
        assert row(run)["rank_cpu_p50_s"]


def test_wall_clock_is_of_the_log(real: Results) -> None:
    run = _run(real, "25MB/total/1")
    assert (run.total_s, run.inference_s) == (57.16, 30.53)
    varied = _run(real, "25MB/1GB/Batches/32/1")
    assert (varied.total_s, varied.inference_s) == (39.2, 31.59)


def test_times_of_another_result_path_are_not_taken(real: Results) -> None:
    """total/3 of 100 MB holds records of a path "timing/3"; the log's 12.6 GB are others."""
    run = _run(real, "100MB/total/3")
    assert (run.total_s, run.inference_s) == (None, None)


def test_bits_that_are_no_whole_rows_are_named(tmp_path: Path) -> None:
    record = {**original_record(), "throughput_bps": 1_000_000.0}
    place = put(tmp_path / "result-partition-25MB/0.02GB/1/combined_data.json", [record])
    results = read([str(place)])
    assert kinds(results) == ["bits are not whole rows", "moved"]
    assert (results.runs[0].rows, results.runs[0].bits) == (None, 5_000_000.0)


def test_rows_of_bits_and_of_samples_have_to_agree(tmp_path: Path) -> None:
    record = {**original_record(), "sample_persec": 300.0}
    place = put(tmp_path / "result-partition-25MB/0.02GB/1/combined_data.json", [record])
    assert kinds(read([str(place)])) == ["conflict", "moved"]


@pytest.mark.parametrize("bits", [0.0, 164_160.0, 5113 * 164_160 * (1 + 1e-12)])
def test_whole_rows(bits: float) -> None:
    assert whole_rows(bits) == round(bits / 164_160)


@pytest.mark.parametrize("bits", [None, 164_161.0, 82_080.0])
def test_no_whole_rows(bits: float | None) -> None:
    assert whole_rows(bits) is None


# -- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "size", "gb", "batch", "run"),
    [
        ("a/result-partition-25MB/1GB/1", "1GB/1", "1GB", 1.0, None, 1),
        ("result-partition-25MB/1GB/run 2/combined_data.json", "1GB/run 2", "1GB", 1.0, None, 2),
        ("result-partition-25MB/total/3", "total/3", "total", 12.6, None, 3),
        ("result-partition-25MB/total256GB/3", "total256GB/3", "total256GB", 256.0, None, 3),
        ("s/result-partition-25MB/12GB/1TB/1", "12GB/1TB/1", "1TB", 1000.0, None, 1),
        ("result-partition-25MB/12GB/timing/1", "12GB/timing/1", "timing", 12.6, None, 1),
        ("result-partition-25MB/1GB/Batches/32/run 3/", "1GB/Batches/32/run 3", "1GB", 1.0, 32, 3),
        ("result-partition-25MB/test/1", "test/1", "test", None, None, 1),
    ],
)
def test_labels(
    path: str, name: str, size: str, gb: float | None, batch: int | None, run: int
) -> None:
    found = label(path)
    assert found is not None
    assert found.name == f"result-partition-25MB/{name}"
    assert (found.partition_mb, found.size, found.data_gb) == (25.0, size, gb)
    assert (found.batch_size, found.run, found.kind) == (batch, run, "")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "result/1GB/run 2",
        "result-partition-25MB/1GB/x",
        "result-partition-25MB/",
        "result/demo",
    ],
)
def test_no_label(path: str) -> None:
    assert label(path) is None


def test_sizes_that_are_no_sizes() -> None:
    assert [gigabytes(size) for size in ("test", "", "1MB", "GB")] == [None] * 4


def test_all_memory_and_s3_schemas_are_read(tmp_path: Path) -> None:
    memory = {"total_process_memory (MB)": 1.0, "total_model_memory (MB)": 2.0}
    s3 = {"s3_num_requests": 5, "s3_total_time": 0.2, "s3_first_request_time": 1.7e9}
    for number, more in enumerate(({}, memory, s3), 1):
        records = [{**original_record(cpu=number + 1.0), **more}]
        put(tmp_path / f"result-partition-25MB/0.02GB/{number}/combined_data.json", records)
    results = read([str(tmp_path)])
    assert kinds(results) == ["moved"]
    assert [run.rows for run in results.runs] == [1278] * 3
    assert all(run.ranks[0].peak_memory_mb is None for run in results.runs)  # it is no peak


def test_numbers_as_texts_and_lists_of_one(tmp_path: Path) -> None:
    plain, odd = original_record(), original_record()
    odd |= {"sample_persec": [plain["sample_persec"]], "batch_size": "512"}
    odd |= {"total_cpu_time (seconds)": str(plain["total_cpu_time (seconds)"])}
    runs = [
        read([str(put(tmp_path / name / "combined_data.json", [record]))]).runs[0]
        for name, record in (("a", plain), ("b", odd))
    ]
    assert runs[0].ranks == runs[1].ranks
    assert runs[1].batch_size == 512


def test_missing_and_senseless_values_are_unknown_and_named(tmp_path: Path) -> None:
    record = original_record()
    del record["sample_persec"]
    record |= {"num_batches": "many", "throughput_bps": None}
    results = read([str(put(tmp_path / "combined_data.json", [record]))])
    rank = results.runs[0].ranks[0]
    assert (rank.batches, rank.rows_per_s, rank.bits, rank.rows) == (None, None, None, None)
    assert kinds(results) == ["records incomplete", "values not usable"]
    assert "num_batches" in of_kind(results, "values not usable").text


def _scaling_records(count: int, partitions: int = 130) -> list[Any]:
    names = sorted(f"100MB/{n}.pt" for n in range(1, partitions + 1))
    return [
        original_record(names[rank % partitions], 5113, 20 + rank / count) for rank in range(count)
    ]


def test_a_run_cut_at_1000_records(tmp_path: Path) -> None:
    place = tmp_path / "result-partition-100MB/total256GB/1/combined_data.json"
    results = read([str(put(place, _scaling_records(1000)))])
    assert (results.runs[0].status, results.runs[0].world_size) == ("incomplete", None)
    assert kinds(results) == ["cut at 1,000", "moved", "partitions used again"]


def test_1000_ranks_that_are_all_of_them_are_not_cut(tmp_path: Path) -> None:
    place = tmp_path / "result-partition-100MB/97.6GB/1/combined_data.json"
    results = read([str(put(place, _scaling_records(1000, 1000)))])
    assert (results.runs[0].status, results.runs[0].world_size) == ("ok", 1000)
    assert "cut at 1,000" not in kinds(results)


def test_partitions_used_again_are_said_to_be_so(tmp_path: Path) -> None:
    place = tmp_path / "result-partition-100MB/total100GB/1/combined_data.json"
    results = read([str(put(place, _scaling_records(983)))])
    assert results.runs[0].status == "ok"
    assert kinds(results) == ["less data than named", "moved", "partitions used again"]
    text = of_kind(results, "partitions used again").text
    assert "983 records name 130 partitions, each 7 to 8 times" in text


def test_duplicate_partitions(tmp_path: Path) -> None:
    records = [original_record(f"25MB/{n}.pt", cpu=5 + n / 100) for n in (1, 2, 3, 3, 3)]
    place = tmp_path / "result-partition-25MB/0.1GB/1/combined_data.json"
    results = read([str(put(place, records))])
    assert of_kind(results, "duplicate partitions").text.startswith("3 of 5 records name")


@pytest.mark.parametrize(
    ("numbers", "lost"),
    [
        ([1, 10, 100, 101], False),  # the first of S3's list
        ([1, 2, 3, 4], False),  # the first by number
        ([1, 10, 101, 102], True),
        ([2, 3, 4], True),
        ([7], True),
    ],
)
def test_gaps(tmp_path: Path, numbers: list[int], lost: bool) -> None:
    records = [original_record(f"p/{n}.pt", cpu=5 + n / 1000) for n in numbers]
    results = read([str(put(tmp_path / "combined_data.json", records))])
    assert (results.runs[0].status == "incomplete") is lost
    assert ("ranks missing" in kinds(results)) is lost


def test_a_gap_where_the_path_says_no_size(tmp_path: Path) -> None:
    records = [original_record(f"p/{n}.pt", cpu=5 + n / 1000) for n in (2, 3, 5)]
    records = [{**record, "result_path": "mine"} for record in records]
    results = read([str(put(tmp_path / "combined_data.json", records))])
    assert "2 partitions between them lack" in of_kind(results, "ranks missing").text
    assert results.runs[0].world_size is None


def test_the_log_of_a_function_tells_the_world_size(tmp_path: Path) -> None:
    shutil.copy(AWS / "results" / "log_example.txt", tmp_path)
    records = [original_record(f"75MB/{n}.pt") for n in (1, 10, 100)]
    put(tmp_path / "result-partition-75MB/8GB/2/combined_data.json", records)
    results = read([str(tmp_path)])
    assert (results.runs[0].status, results.runs[0].world_size) == ("incomplete", 110)
    assert of_kind(results, "ranks missing").text.startswith("3 records of 110 ranks")


def test_executions_under_one_path_get_no_time_of_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "result-partition-25MB/1GB/1"
    for name, cpu in (("combined_data", 5.0), ("combined_data_1", 6.0)):
        put(folder / f"{name}.json", [original_record(cpu=cpu)])
    shutil.copy(AWS / "results" / "state_machine_logs.csv", tmp_path)
    results = read([str(tmp_path)])
    assert [run.name.rpartition("/")[2] for run in results.runs] == ["1", "combined_data_1"]
    assert [run.total_s for run in results.runs] == [None, None]
    assert [p.runs for p in published(results.runs)] == [1]
    assert "2 files share" in of_kind(results, "time not known").text


def test_head_of_the_logs_newer_form(tmp_path: Path) -> None:
    log = (
        "data (GB),batch_size,run,partition (MB),total_duration (s),inference_duration (s),"
        "batch_varying\n983GB,512,1,100MB,116.81,65.13,False\n100GB,512,1,100MB,59.69,52.76,False\n"
    )
    put(tmp_path / "state_machine_logs.csv", log)
    records = [
        {**r, "result_path": "scaling/result-partition-100MB/12GB/983GB/1"}
        for r in _scaling_records(983)
    ]
    put(tmp_path / "result-partition-100MB/total100GB/1/combined_data.json", records)
    (run,) = read([str(tmp_path)]).runs
    assert (run.data_gb, run.inference_s) == (100.0, 65.13)  # not those of the path "100GB"


def test_durations_of_a_table_where_no_log_is(tmp_path: Path) -> None:
    put(tmp_path / "result-partition-25MB/1GB/1/combined_data.json", [original_record()])
    shutil.copy(AWS / "results" / "total_execution_time.csv", tmp_path)
    results = read([str(tmp_path)])
    assert (results.runs[0].total_s, results.runs[0].inference_s) == (26.642, None)
    assert "time of a table" in kinds(results)


def test_ranks_own_files_of_a_run_that_was_not_summarized(tmp_path: Path) -> None:
    folder = tmp_path / "result-partition-25MB/0.05GB/1"
    for n in (1, 2):
        put(folder / f"{n - 1}.json", original_record(f"25MB/{n}.pt", cpu=4.0 + n))
    (run,) = read([str(tmp_path)]).runs
    assert (run.name, len(run.ranks)) == ("result-partition-25MB/0.05GB/1", 2)


def test_one_process_that_tells_after_each_gigabyte(tmp_path: Path) -> None:
    states = [
        {
            "total_execution_time (seconds)": 236.0 * gb,
            "total_process_memory (MB)": 1635.0,
            "num_batches": 103 * gb,
            "batch_size": 512,
            "device": "cpu",
            "GB_processed": gb,
            "execution_time_per_batch": 2.29,
            "throughput_bps": 103 * 512 * 164_160 / 236.0,
            "sample_persec": [103 * 512 / 236.0],
        }
        for gb in (1, 2, 3)
    ]
    results = read([str(put(tmp_path / "cpu" / "total.json", states))])
    (run,) = results.runs
    assert (run.source, run.data_gb, run.inference_s) == ("original, one process", 3.0, 708.0)
    assert run.rows == 3 * 103 * 512
    assert run.ranks[0].rows_per_s == pytest.approx(223.457627)
    assert "3 states of one process" in of_kind(results, "one process").text


def test_accuracy_files(real: Results) -> None:
    first, second = (run for run in real.runs if run.source == "original, one process")
    assert (first.batch_size, first.rows, first.ranks[0].batches) == (32, 24_992, 781)
    assert first.inference_s is None  # it may be CPU time
    assert first.metrics["nmad"] == 0.011839682161808014
    assert first.metrics["r2"] == 0.9684378430247307
    assert second.metrics["mae"] == 0.012519702469931539
    assert second.rows is None


def test_the_demo_input_is_known_to_be_none(real: Results) -> None:
    assert "not read" not in kinds(real)


def test_the_originals_runs_make_configurations(real: Results) -> None:
    found = {c.data: c for c in summarise(real.runs) if c.source == "original"}
    total = found["25MB partitions, 12.6GB"]
    assert (total.ok, total.world_size, total.batch_size, total.on) == (3, 517, 512, "aws")
    assert total.measures["inference_s"].median == 27.18


def test_the_same_records_in_two_files_are_read_once(tmp_path: Path) -> None:
    records = json.loads((AWS / "result-partition-100MB/1GB/1/combined_data.json").read_text())
    put(tmp_path / "a" / "combined_data.json", records)
    put(tmp_path / "b" / "combined_data.json", records)
    results = read([str(tmp_path)])
    assert len(results.runs) == 1
    assert of_kind(results, "given twice").place.endswith("b/combined_data.json")


def test_records_that_are_in_another_file_as_well_are_named(tmp_path: Path) -> None:
    one, two, three = (original_record(cpu=5.0 + n) for n in range(3))
    put(tmp_path / "a" / "combined_data.json", [one, two])
    put(tmp_path / "b" / "combined_data.json", [two, three])
    results = read([str(tmp_path)])
    assert len(results.runs) == 2
    assert of_kind(results, "records twice").text.startswith("1 of 2 records")
