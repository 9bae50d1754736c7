"""Files of strangers: whatever is in them, there are results and findings, and no exception."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workflow.result_files import kinds, original_record, our_record, put
from workflow.configurations import row, summarise
from workflow.published import published
from workflow.results import Results, read
from workflow.results_files import Fields, plain

NAMES = ["combined_data.json", "summary.json", "run.json", "sweep.json", "out.json", "0.json"]


def _all(results: Results) -> Results:
    """Do with results what a report does; none of it may fail."""
    assert all(set(row(run)) for run in results.runs)
    summarise(results.runs)
    published(results.runs)
    for found in results.findings:
        assert found.text.isprintable()
        assert len(found.text) < 1500
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b'[{"rank": 0, "total_cpu_time (seconds)": 1',
        b"\xff\xfe[",
        b"[" * 100_000,
        b"[" * 900 + b"]" * 900,
        b"1" * 10_000,
        b'{"a": ' * 50_000,
    ],
    ids=[
        "empty",
        "cut",
        "cut record",
        "not UTF-8",
        "deep",
        "nested",
        "long number",
        "deep objects",
    ],
)
def test_files_that_are_no_json(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    results = _all(read([str(path)]))
    assert results.runs == ()
    assert set(kinds(results)) <= {"not readable", "not read"}
    assert kinds(results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [None, 1, "x", True, [], {}, [1, 2], ["a", "b"], [[]], [None], {"rank": {}}, [{}]]
)
def test_json_that_is_no_result(tmp_path: Path, name: str, content: object) -> None:
    results = _all(read([str(put(tmp_path / name, content))]))
    assert results.runs == ()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "-1", '"x"', "[1, 2]", "true", "{}"])
@pytest.mark.parametrize("key", ["total_cpu_time (seconds)", "throughput_bps", "batch_size"])
@pytest.mark.parametrize(
    "made", [original_record, lambda: our_record(0, 1)], ids=["theirs", "ours"]
)
def test_values_that_are_no_numbers(tmp_path: Path, made: Any, key: str, value: str) -> None:
    text = json.dumps([{**made(), key: "HERE"}]).replace('"HERE"', value)
    results = _all(read([str(put(tmp_path / "combined_data.json", text))]))
    assert len(results.runs) == 1
    assert "values not usable" in kinds(results)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "combined_data.json"
    path.touch()
    os.truncate(path, 2 << 30)  # takes no space on the disk
    results = read([str(tmp_path)])
    assert "2,147 MB" in results.findings[0].text


def test_too_many_values_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "combined_data.json", "[" + "[]," * 1_500_000 + "[]]")
    assert kinds(read([str(tmp_path)])) == ["not readable"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "\n" * 3_000_000), ("a.csv", "," * 3_000_000), ("a.json", "[" * 3_000_000)],
)
def test_more_values_than_memory_is_for_are_not_read(
    tmp_path: Path, name: str, content: str
) -> None:
    assert "2,000,000" in read([str(put(tmp_path / name, content))]).findings[0].text


def test_a_log_takes_no_time_without_end(tmp_path: Path) -> None:
    lines = ["received: {" * 200_000, "received: {" + "-" * 3000 + "1: 2}", "received: {} " * 300]
    put(tmp_path / "log.txt", "\n".join(lines * 3))
    began = time.perf_counter()
    read([str(tmp_path)])
    assert time.perf_counter() - began < 10  # 0.05 s on a machine of its own


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "combined_data.json").mkdir()
    assert read([str(tmp_path)]) == Results((), ())
    assert read(["/proc/self/mem"]).runs == ()
    assert kinds(read(["/dev/zero"])) == ["not readable"]


def test_tables_that_are_broken(tmp_path: Path) -> None:
    head = "partition (MB),data (GB),run,total_bits,throughput_bps\n"
    for n, text in enumerate(
        ["", "\n", '"a', head + '"', head + "x,y\n", head + "25,1,1,NaN,1e999\n"]
    ):
        put(tmp_path / f"{n}.csv", text)
    put(tmp_path / "log.txt", "received: {'a': " + "(" * 2000 + "}\nreceived: {1: 2}\n")
    put(tmp_path / "result-partition-25MB/1GB/1/combined_data.json", [original_record()])
    results = _all(read([str(tmp_path)]))
    assert len(results.runs) == 1


def test_names_do_not_reach_a_terminal_as_they_are(tmp_path: Path) -> None:
    evil = "\x1b[31m\nred"
    put(tmp_path / evil / "combined_data.json", [our_record(0, 1, run=evil, engine="\x1b]0;x\x07")])
    results = _all(read([str(tmp_path)]))
    assert all(str(value).isprintable() for value in row(results.runs[0]).values())


def test_plain_is_short() -> None:
    assert plain("a\nb\x1b" + "x" * 1000) == "a?b?" + "x" * 296 + "…"


# -- fuzzing --------------------------------------------------------------------------------------

_KEYS = sorted(
    {*original_record(), *our_record(0), "plan", "seconds", "metrics", "status", "report", "error"}
    | {"batch_seconds", "inference_seconds", "environment", "kind", "GB_processed", "MAE", "R2"}
    | {"total_execution_time (seconds)", "failures", "world_sizes", "batch_sizes", "memory_mb"}
)
_TEXTS = st.sampled_from(["ok", "failed", "small", "result-partition-25MB/1GB/1", "25MB/1.pt", ""])
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS | st.text(max_size=20)
_ANY = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=5), inner, max_size=8)
    ),
    max_leaves=25,
)


@st.composite
def _mutated(draw: st.DrawFn) -> Any:
    """Good records with some values replaced, and some keys removed."""
    made = draw(st.sampled_from([original_record(), our_record(0), our_record(1)]))
    for key in draw(st.lists(st.sampled_from(sorted(made)), max_size=4)):
        made.pop(key, None)
        if draw(st.booleans()):
            made[key] = draw(_ANY)
    return made


_CONTENTS = _ANY | st.lists(_mutated(), max_size=6) | _mutated()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.dictionaries(
        st.sampled_from([*NAMES, "1.json", "runs/a.json", "runs/a/run.json"]),
        _CONTENTS,
        min_size=1,
        max_size=5,
    )
)
def test_any_json_gives_results(files: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        for path, content in files.items():
            put(Path(name) / path, content)
        _all(read([name]))


@settings(max_examples=100)
@given(
    data=st.binary(max_size=200)
    | st.text(alphabet='",\n 0159.MBGT()xrun', max_size=200).map(str.encode),
    name=st.sampled_from(["a.csv", "a.json", "a.txt", "sweep.json"]),
    head=st.sampled_from(
        [
            b"",
            b"partition (MB),data (GB),run,num_worlds,duration\n",
            b"partition (MB),data (GB),batch_size,batch_varying,run,inference_duration (s)\n",
            b"batch_size,run,total_bits\n",
        ]
    ),
)
def test_any_bytes_give_results(folder: Path, data: bytes, name: str, head: bytes) -> None:
    path = folder / name
    path.write_bytes(head + data)
    _all(read([str(path)]))
    path.unlink()


@given(value=_ANY)
def test_fields_give_numbers_or_none(value: Any) -> None:
    f = Fields({"x": value})
    number = f.amount("x")
    assert number is None or 0 <= number < float("inf")
    assert f.count("x") is None or isinstance(f.count("x"), int)
    assert (f.word("x") or "").isprintable()
