"""The payload forms, and the errors that say which field is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lambda_worker.events import DATA_SIZES, EventError, Payload, RankTask, RunInfo, parse

FORMS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("payloads.json").read_text())
STEP_1, STEP_2, DEMO, ITEM = FORMS.values()
DOCS = Path(__file__).parents[2] / "docs" / "payloads.md"


def test_first_payload_of_the_original_project() -> None:
    payload = parse(Payload, STEP_1)
    assert payload.world_size == 4
    assert payload.joins
    assert payload.data_map == dict.fromkeys("0123")
    assert payload.data_url == "s3://team2-cosmical-7078ea12/datasets"


def test_second_payload_of_the_original_project() -> None:
    payload = parse(Payload, STEP_2)
    assert payload.data_url == "s3://team2-cosmical-7078ea12/datasets"
    assert payload.data_size == "medium"
    run = payload.run_name()
    assert re.fullmatch(r"7078ea12-\d{8}-\d{6}-[0-9a-f]{6}", run)
    assert payload.results_url(run) == f"s3://team2-cosmical-7078ea12/results/world_4/{run}"


def test_demo_input_with_string_numbers() -> None:
    payload = parse(Payload, DEMO)
    assert payload.file_limit == 11
    assert payload.world_size is None
    assert not payload.joins  # no rendezvous is named
    assert payload.data_url == "s3://cosmicai-data/100MB"
    assert payload.results_url("r") == "s3://cosmicai-data/result-partition-100MB/1GB/1/r"


def test_rank_item_in_upper_case() -> None:
    task = parse(RankTask, ITEM)
    assert (task.rank, task.world_size, task.batch_size) == (0, 4, 512)
    assert task.whole_files == ["s3://cosmicai-data/100MB/1.pt", "s3://cosmicai-data/100MB/2.pt"]
    assert task.results_url == "s3://cosmicai-data/result-partition-100MB/1GB/1"
    assert not task.joins


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batchsize": 4},
            "unknown field 'batchsize', expected some of: attempts, batch_size, bucket, ",
        ),
        (
            {"batch_size": "many"},
            "batch_size: got 'many', expected a number of rows, 1 or more, or \"auto\"",
        ),
        ({"batch_size": 0}, "batch_size: got 0, expected a number of rows, 1 or more"),
        ({"batch_size": True}, "batch_size: got True, expected a number of rows"),
        ({"world_size": 10_001}, "world_size: got 10001, expected less than or equal to 10000"),
        ({"timeout": "nan"}, "timeout: got 'nan', expected greater than 0"),
        ({"epoch": -1}, "epoch: got -1, expected greater than or equal to 0"),
        ({"threads": 0}, "threads: got 0, expected greater than or equal to 1"),
        ({"file_limit": "0"}, "file_limit: got '0', expected greater than or equal to 1"),
        ({"data_size": "huge"}, "data_size: got 'huge', expected 'small', 'medium' or 'large'"),
        ({"fmi_enabled": "perhaps"}, "fmi_enabled: got 'perhaps', expected a valid boolean"),
        ({"rendezvous_endpoint": "host"}, "rendezvous_endpoint: got 'host', expected host:port"),
        ({"rendezvous_endpoint": "::1"}, "rendezvous_endpoint: got '::1', expected host:port"),
        ({"rendezvous_endpoint": "h:65536"}, "rendezvous_endpoint: got 'h:65536', expected host"),
        ({"rendezvous_endpoint": None, "fmi_enabled": True}, "rendezvous_endpoint: missing, "),
        ({"bucket": "a b"}, "bucket: got 'a b', expected the name of an S3 bucket"),
        ({"data": " "}, "data: got ' ', expected a name"),
        ({"results": "s3://"}, "results: got 's3://', expected s3://bucket/key"),
        ({"threads": 10**9}, "threads: got 1000000000, expected less"),
        (
            {"bucket": None, "data_prefix": None},
            "data: missing, expected a .pt file or folder, or a bucket's name",
        ),
        ({"data_map": {"0": None, "2": None}}, "data_map: got keys 0, 2, expected one per rank"),
        (
            {"data_map": {"0": 5, "1": None, "2": None, "3": None}},
            "data_map.0: got 5, expected a file, a list of files, or null",
        ),
        ({"world_size": 1, "data_map": {"0": ["a", "a"]}}, "data_map.0: expected each file once"),
        ({"run": "../up"}, "run: got '../up', expected letters, digits and . _ -"),
        ({"unique_id": "x" * 65}, "unique_id: got 'xxx"),
        ({"result_path": "a/../../b"}, "result_path: got 'a/../../b', expected a path below"),
        ({"BATCH_SIZE": 4}, "BATCH_SIZE: given twice"),
    ],
)
def test_wrong_field_is_named_on_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EventError) as caught:
        parse(Payload, {**STEP_1, **change})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(EventError, match=r"batch_size: .*; epoch: "):
        parse(Payload, {"data": "d", "batch_size": 0, "epoch": -1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "rank: got 4, expected 0 to 3"),
        ({"DATA_BUCKET": None, "RESULT_PATH": None}, "results: missing"),
        ({"fmi_enabled": True, "rendezvous_endpoint": "h:1"}, "run: missing"),
        ({"shard": [["a.pt", 3, 2]]}, "shard: expected"),
        ({"SECRET": "sesame"}, "unknown field 'SECRET'"),
    ],
)
def test_wrong_rank_item(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EventError, match=message) as caught:
        parse(RankTask, {**ITEM, **change})
    assert "sesame" not in str(caught.value)  # an unknown field may hold a secret


def test_missing_field_and_no_object() -> None:
    with pytest.raises(EventError, match="rank: missing, it is required"):
        parse(RankTask, {"world_size": 1, "results": "r"})
    with pytest.raises(EventError, match=r"got \[1\], expected a JSON object"):
        parse(Payload, [1])


def test_ranks_work_alone_if_told_so() -> None:
    assert not parse(Payload, {**STEP_1, "fmi_enabled": "false"}).joins
    for endpoint in ("localhost:10000", "[::1]:10000"):
        assert parse(Payload, {"data": "d", "rendezvous_endpoint": endpoint}).joins


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, "results/r"),
        ({"results": "/tmp/out/"}, "/tmp/out/r"),
        ({"result_path": "results/world_4"}, "results/world_4/r"),
        ({"results": "s3://b/x", "result_path": "y"}, "s3://b/x/y/r"),
        ({"bucket": "b"}, "results/r"),  # the data are local, so are the results
    ],
)
def test_results_of_local_data(fields: dict[str, Any], url: str) -> None:
    assert parse(Payload, {"data": "d", **fields}).results_url("r") == url


def test_the_known_forms_work_on_this_machine_with_folders_in_place_of_buckets() -> None:
    local = parse(
        Payload, {**STEP_1, "bucket": "/srv/b", "data_map": {0: None, 1: "x/1.pt"}, "world_size": 2}
    )
    assert local.data_url == "/srv/b/datasets"
    assert local.file_url("x/1.pt") == "/srv/b/x/1.pt"
    assert local.results_url("r") == "/srv/b/results/r"
    assert parse(Payload, {"data_prefix": "/srv/100MB"}).data_url == "/srv/100MB"
    assert parse(Payload, {"data_size": "small"}).data_url == "data"
    assert parse(Payload, {"data": "d", "result_path": "/srv/out"}).results_url("r") == "/srv/out/r"
    item = parse(
        RankTask, {**ITEM, "DATA_BUCKET": None, "DATA_PATH": ["/d/1.pt"], "RESULT_PATH": "/o"}
    )
    assert (item.whole_files, item.results_url) == (["/d/1.pt"], "/o")
    item = parse(RankTask, {**ITEM, "DATA_PATH": "/d/1.pt"})
    assert item.whole_files == ["/d/1.pt"]


def test_run_has_a_new_name_each_time_unless_given() -> None:
    payload = parse(Payload, {"data": "d"})
    assert payload.run_name() != payload.run_name()
    assert parse(Payload, {"data": "d", "run": "r1"}).run_name() == "r1"


@pytest.mark.parametrize(
    ("data", "name", "url"),
    [
        (None, "100MB/1.pt", "s3://b/100MB/1.pt"),
        (None, "s3://c/1.pt", "s3://c/1.pt"),
        ("folder/", "1.pt", "folder/1.pt"),
        ("folder", "/1.pt", "/1.pt"),
        ("all.pt", "1.pt", "1.pt"),
    ],
)
def test_files_of_data_map(data: str | None, name: str, url: str) -> None:
    assert parse(Payload, {"data": data, "bucket": "b"}).file_url(name) == url


def test_data_sizes() -> None:
    assert DATA_SIZES == {"small": 1253, "medium": 25_000, "large": 100_000}


@pytest.mark.parametrize("form", [Payload, RankTask, RunInfo])
def test_every_field_is_documented(form: type[Payload]) -> None:
    documented = {name.lower() for name in re.findall(r"`(\w+)`", DOCS.read_text())}
    assert set(form.model_fields) <= documented
