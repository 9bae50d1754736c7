"""What an S3 server may do to a run: much of everything, busy, slow, cut off, or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lambda_worker import handlers, storage
from lambda_worker.engine import DEMO_MODEL, ModelError
from lambda_worker.reading import Rows, Shard
from lambda_worker.shard import Piece
from lambda_worker.storage import READERS, TRIES, StorageError
from lambda_worker.summary import SummaryError
from tests.s3 import DENIED, SLOW_DOWN, S3Server, Trouble, s3_client, serve_s3
from tests.worker.worker_data import MakePt

PAGE = 100  # names; S3 itself gives 1,000, which takes a thousand ranks to need a second one


@pytest.fixture
def s3(tmp_path: Path, make_pt: MakePt, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with a dataset of 41 rows in two files, and a model."""
    make_pt("s3/bucket/data/1.pt", 21, seed=1)
    make_pt("s3/bucket/data/2.pt", 20, seed=2)
    (tmp_path / "s3/bucket/m.safetensors").write_bytes(DEMO_MODEL.read_bytes())
    with serve_s3(tmp_path / "s3", PAGE) as server, s3_client(server.endpoint, monkeypatch):
        yield server


EVENT = {
    "data": "s3://bucket/data",
    "model": "s3://bucket/m.safetensors",
    "results": "s3://bucket/out",
    "run": "r",
    "world_size": 1,
}


@pytest.fixture
def many(s3: S3Server, tmp_path: Path) -> dict[str, Any]:
    """A plan of more ranks that are done than a page names."""
    return done(s3, tmp_path, 110)


def done(s3: S3Server, tmp_path: Path, ranks: int) -> dict[str, Any]:
    """Rank 0 has all rows, the others none."""
    plan = handlers.init({**EVENT, "world_size": ranks})
    whole = [list(piece) for task in plan["ranks"] for piece in task["shard"]]
    folder = tmp_path / "s3" / "bucket" / "out" / "r"
    for rank, shard in ((0, whole), (1, [])):
        handlers.infer({**plan["ranks"][rank], "shard": shard})
    record, table = json.loads((folder / "1.json").read_text()), (folder / "1.npz").read_bytes()
    for rank in range(2, ranks):
        (folder / f"{rank}.json").write_text(json.dumps({**record, "rank": rank}))
        (folder / f"{rank}.npz").write_bytes(table)
    s3.requests.clear()
    s3.clients.clear()
    s3.busiest = 0
    return plan


def test_more_files_than_a_page(many: dict[str, Any], s3: S3Server) -> None:
    s3.trouble = lambda method, path: Trouble(delay=0.005)
    result = handlers.summarize(many)
    assert len(s3.clients) <= READERS + 1  # connections are used again
    assert [record["rank"] for record in result["records"]] == list(range(110))
    assert result["summary"]["rows"] == 41
    reads = [path for method, path in s3.requests if path.endswith((".json", ".npz"))]
    assert len(reads) == 2 * 110 + 3  # each once; and three that are written
    pages = [path for _, path in s3.requests if "list-type" in path]
    assert len(pages) == 2 * 3  # twice: what is there, and what has to go
    assert 1 < s3.busiest <= READERS


def test_missing_among_many(many: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s3/bucket/out/r/104.json").unlink()
    with pytest.raises(SummaryError, match=r"no record of rank 104 \(of 110\)"):
        handlers.summarize(many)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("7.json", b'{"rank": 7', "JSONDecodeError"),
        ("7.json", b"[]", "holds a list, expected a record"),
        ("8.json", b"\x00\xff", "UnicodeDecodeError|JSONDecodeError"),
        ("9.npz", b"", "EOFError"),
        ("9.npz", b"PK\3\4 cut off", "BadZipFile"),
        ("9.npz", b"not numpy", "ValueError|UnpicklingError"),
    ],
)
def test_damaged_files_are_named(
    s3: S3Server, tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    plan = done(s3, tmp_path, 10)
    (tmp_path / "s3/bucket/out/r" / name).write_bytes(content)
    where = rf"s3://bucket/out/r/{name} is damaged \({len(content)} bytes; "
    with pytest.raises(SummaryError, match=rf"run r: {where}.*({what}).*: .* Run again"):
        handlers.summarize(plan)


def test_merged_records_that_are_damaged_are_named(s3: S3Server, tmp_path: Path) -> None:
    plan = {**handlers.init(EVENT), "fmi_enabled": True}
    folder = tmp_path / "s3/bucket/out/r"
    folder.mkdir(parents=True)
    (folder / "0.json").write_text("{}")
    for text in ("{", "[]", "{}", '{"records": 1, "metrics": {}}'):
        (folder / "merged.json").write_text(text)
        with pytest.raises(SummaryError, match=r"s3://bucket/out/r/merged\.json is damaged"):
            handlers.summarize(plan)


def test_strays_are_removed_many_at_a_time(s3: S3Server, tmp_path: Path) -> None:
    done(s3, tmp_path, 30)
    small = handlers.init(EVENT)
    handlers.infer(small["ranks"][0])
    s3.busiest = 0
    s3.trouble = lambda method, path: Trouble(delay=0.005)
    handlers.summarize(small)
    assert len([path for method, path in s3.requests if method == "DELETE"]) == 2 * 29
    assert 1 < s3.busiest <= READERS
    left = ["0.json", "0.npz", "combined_data.json", "predictions.npz", "summary.json"]
    assert storage.names("s3://bucket/out/r") == left


def test_read_all_keeps_the_order_and_stops_at_an_error(s3: S3Server) -> None:
    urls = [f"s3://bucket/some/{number}" for number in range(50)]
    storage.in_parallel(lambda url: storage.write(url, url.encode()), urls)
    s3.trouble = lambda method, path: Trouble(delay=0.03 if path.endswith("0") else 0)
    assert storage.read_all(urls) == [url.encode() for url in urls]
    assert storage.read_all([]) == []
    s3.requests.clear()
    s3.trouble = lambda method, path: DENIED if path.endswith("/3") else Trouble(delay=0.01)
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/some/3: access denied"):
        storage.read_all(urls)
    assert len(s3.requests) < 40  # the others are given up


def refused(event: dict[str, Any], *changes: str) -> str:
    """What `init` says of an event in which these places are in a bucket that is not there."""
    wrong = {name: EVENT[name].replace("bucket", "nowhere") for name in changes}  # type: ignore[attr-defined]
    with pytest.raises(StorageError) as error:
        handlers.init({**event, **wrong})
    return str(error.value)


NO_BUCKET = "no such bucket: create it, or check the name and AWS_ENDPOINT_URL"


def test_missing_bucket_is_said_by_init(s3: S3Server) -> None:
    """Before any rank starts, and of each place."""
    assert refused(EVENT, "data") == f"cannot list s3://nowhere/data: {NO_BUCKET}"
    assert refused(EVENT, "model") == f"cannot read s3://nowhere/m.safetensors: {NO_BUCKET}"
    assert refused(EVENT, "results") == f"cannot write to s3://nowhere/out/run: {NO_BUCKET}"


def test_missing_model_is_said_by_init(s3: S3Server) -> None:
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/x\.safetensors: no such obj"):
        handlers.init({**EVENT, "model": "s3://bucket/x.safetensors"})


def test_model_that_is_none_is_named_by_its_url(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "s3/bucket/m.safetensors").write_bytes(b"PK\3\4 and more")
    (task,) = handlers.init(EVENT)["ranks"]
    with pytest.raises(ModelError, match=r"^s3://bucket/m\.safetensors is no .*, but one of PyTo"):
        handlers.infer(task)


@pytest.mark.parametrize("what", ["data", "model", "results"])
def test_bucket_that_is_gone_is_said_by_a_rank(s3: S3Server, what: str) -> None:
    (task,) = handlers.init(EVENT)["ranks"]
    text = json.dumps(task)
    changed = {
        "data": text.replace("s3://bucket/data", "s3://nowhere/data"),
        "model": text.replace("s3://bucket/m.", "s3://nowhere/m."),
        "results": text.replace("s3://bucket/out", "s3://nowhere/out"),
    }[what]
    with pytest.raises(StorageError, match=rf"cannot (read|write) s3://nowhere/.*: {NO_BUCKET}"):
        handlers.infer(json.loads(changed))


def test_bucket_that_is_gone_is_said_by_summarize(s3: S3Server) -> None:
    plan = {**handlers.init(EVENT), "results": "s3://nowhere/out/r"}
    with pytest.raises(StorageError, match=rf"cannot list s3://nowhere/out/r: {NO_BUCKET}"):
        handlers.summarize(plan)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_access_denied(s3: S3Server, method: str) -> None:
    (task,) = handlers.init(EVENT)["ranks"]
    s3.trouble = lambda asked, path: DENIED if asked == method else None
    with pytest.raises(StorageError, match="access denied: check the credentials and the role's"):
        handlers.infer(task)


def test_who_may_write_but_not_list_is_not_refused(s3: S3Server) -> None:
    """Nor who may not read the model: the ranks may have another role."""

    def trouble(method: str, path: str) -> Trouble | None:
        denied = path.strip("/") == "bucket" or path.endswith(".safetensors")
        return DENIED if method == "HEAD" and denied else None

    s3.trouble = trouble
    assert handlers.init(EVENT)["rows"] == 41


def test_rank_on_a_busy_server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is refused a few times; the numbers are the same."""
    (task,) = handlers.init(EVENT)["ranks"]
    wanted = handlers.infer(task)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    asked: dict[tuple[str, str], int] = {}

    def trouble(method: str, path: str) -> Trouble | None:
        asked[method, path] = asked.get((method, path), 0) + 1
        return SLOW_DOWN if asked[method, path] % 4 else None

    s3.trouble = trouble
    record = handlers.infer(task)
    assert (record["MAE"], record["rows"]) == (wanted["MAE"], 41)
    assert len(waits) >= 3 * 10
    assert max(waits) > 1  # backing off


def test_rank_that_gives_up_says_why(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = handlers.init(EVENT)["ranks"]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    s3.trouble = lambda method, path: SLOW_DOWN if path.endswith("/2.pt") else None
    s3.requests.clear()
    with pytest.raises(StorageError, match=r"2\.pt: too many requests, even after waiting: use f"):
        handlers.infer(task)
    assert len([path for _, path in s3.requests if path.endswith("/2.pt")]) == TRIES


def test_many_readers_on_a_busy_server(s3: S3Server) -> None:
    """A server that takes four at a time is not asked for more until it breaks."""
    urls = [f"s3://bucket/some/{number}" for number in range(30)]
    storage.in_parallel(lambda url: storage.write(url, b"x"), urls)
    s3.trouble = lambda method, path: SLOW_DOWN if s3.busy > 4 else Trouble(delay=0.02)
    assert storage.read_all(urls) == [b"x"] * 30


@pytest.mark.parametrize("read", ["read", "fetch"])
def test_answers_that_break_off(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(storage, "BLOCK", 300_000)
    url, wanted = "s3://bucket/m.safetensors", DEMO_MODEL.read_bytes()
    cuts = [0, 1, 100_000, 200_000]

    def trouble(method: str, path: str) -> Trouble | None:
        return Trouble(cut=cuts.pop()) if cuts and method == "GET" else None

    def result() -> bytes:
        if read == "read":
            return storage.read(url)
        return storage.fetch(url, tmp_path / "scratch").read_bytes()

    s3.trouble = trouble
    assert result() == wanted
    assert cuts == []
    s3.trouble = lambda method, path: Trouble(cut=10) if method == "GET" else None
    with pytest.raises(StorageError, match=r"m\.safetensors: the connection broke off 5 times"):
        result()
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_ranges_are_read_by_many_threads(s3: S3Server, tmp_path: Path) -> None:
    """One open dataset, whose answers break off, gives each thread its own rows."""
    shard = Shard([Piece(f"s3://bucket/data/{n}.pt", 0, 20) for n in (1, 2)], tmp_path)
    wanted = shard.batch(0, 40)
    count = iter(range(10_000))
    s3.trouble = lambda method, path: Trouble(cut=9000) if next(count) % 3 == 0 else None

    def rows(start: int) -> Rows:
        return shard.batch(start, start + 2)

    with ThreadPoolExecutor(8) as pool:
        for start, got in enumerate(pool.map(rows, range(39))):
            for a, b in zip(got, wanted.part(start, start + 2), strict=True):
                assert np.array_equal(a, b)
