"""Storage that fails: said clearly, tried again where that helps, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmi_client.errors import Aborted
from fmi_client.transport import s3
from lambda_worker import handlers, storage
from lambda_worker.dataset import DatasetError
from lambda_worker.storage import StorageError
from tests.processes import serve_rendezvous
from tests.reliability.conftest import Measured
from tests.reliability.faults import EVENT, attempt, disk_takes, fill_bucket, visible
from tests.s3 import S3Server, Trouble, s3_client, serve_s3

pytestmark = pytest.mark.row(21)

NEVER = 1000.0  # seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    fill_bucket(folder / "bucket", 3)
    return folder


@pytest.fixture
def store(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """S3 with data and a model; impatience in place of patience, so that tests are short."""
    shutil.copytree(files, tmp_path / "s3", copy_function=os.link)
    monkeypatch.setattr(s3, "ANSWER_SECONDS", 0.3)
    with serve_s3(tmp_path / "s3") as server, s3_client(server.endpoint, monkeypatch):
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def rendezvous() -> Iterator[str]:
    with serve_rendezvous() as server:
        yield server


def times(count: int, method: str, end: str, trouble: Trouble) -> Callable[..., Trouble | None]:
    """Trouble for so many requests to what ends like this."""
    left = [count]

    def given(asked: str, path: str) -> Trouble | None:
        if asked != method or not path.partition("?")[0].endswith(end) or not left[0]:
            return None
        left[0] -= 1
        return trouble

    return given


DENIED = "access denied: check the credentials"
BROKE = r"the connection broke off 5 times .*: check the network, or try again later"
FAILED = "the server failed at it 8 times: try again later"
LATE = "(Read timeout|[Cc]onnection was closed).*8 times: check the network, or try again later"

# What happens, whether another try may help, and what is said where it does not. "Body" in the
# name: it happens after the answer's headers, so that only what is read can be struck.
FAULTS = {
    "403": (Trouble(status=403, code="AccessDenied"), False, DENIED),
    "404": (Trouble(status=404, code="NoSuchKey"), False, "no such object: check the name"),
    "500": (Trouble(status=500, code="InternalError"), True, FAILED),
    "502 of a proxy": (Trouble(status=502), True, FAILED),
    "503": (Trouble(status=503, code="SlowDown"), True, "too many requests, even after waiting"),
    "hang": (Trouble(delay=NEVER), True, LATE),
    "body cut": (Trouble(cut=1000), True, BROKE),
    "body reset": (Trouble(cut=1000, reset=True), True, BROKE),
    "body hangs": (Trouble(cut=1000, trickle=NEVER), True, BROKE),
    "body trickles": (Trouble(cut=1000, trickle=0.1), True, BROKE),
}
PLACES = {"data": ("GET", "/1.pt"), "model": ("GET", "/m.onnx"), "record": ("PUT", "r/0.json")}
# One of a kind is enough for every day: each try of some waits for its time, and what a status
# means is looked up in one place, whatever was asked for.
RARE = {
    *("hang-model", "hang-record", "body hangs-data", "body hangs-model", "body trickles-model"),
    *("500-model", "500-data", "502 of a proxy-data", "502 of a proxy-record", "404-record"),
    "body reset-model",
}
STRUCK = [
    pytest.param(
        *(fault, place),
        id=f"{fault}-{place}",
        marks=[pytest.mark.nightly] if f"{fault}-{place}" in RARE else [],
    )
    for fault in FAULTS
    for place in PLACES
    if place != "record" or not fault.startswith("body")
]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("fault", "place"), STRUCK)
def test_what_s3_does_to_a_rank(store: S3Server, tmp_path: Path, fault: str, place: str) -> None:
    """Once, and it does not matter or is said at once; always, and it is said after some tries."""
    trouble, passes, said = FAULTS[fault]
    bucket, (task,) = tmp_path / "s3/bucket", handlers.init({**EVENT, "world_size": 1})["ranks"]
    method, end = PLACES[place]
    for count in (1, 10_000) if passes else (1,):
        store.trouble = times(count, method, end, trouble)
        if passes and count == 1:
            assert handlers.infer(task)["rows"] == 60
            assert visible(bucket) == {"0.json", "0.npz"}
            (bucket / "out/r/0.json").unlink()
            (bucket / "out/r/0.npz").unlink()
            continue
        store.requests.clear()
        with pytest.raises(
            StorageError, match=rf"cannot (read|write) s3://bucket.*{end}: .*{said}"
        ):
            handlers.infer(task)
        asked = [(how, path.partition("?")[0].endswith(end)) for how, path in store.requests]
        tries = (s3.ATTEMPTS if said == BROKE else storage.TRIES) if passes else 1
        # Of a data file's three reads some get on, by a thousand bytes each time.
        reads = 3 if (place, said) == ("data", BROKE) else 1
        assert tries <= asked.count((method, True)) <= reads * tries
        assert visible(bucket) <= {"0.npz"}  # without the record that says it is good
    record = json.loads((bucket / "out/r/failed/0/0.json").read_text())
    assert record["type"] == "StorageError"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({b"etag": b'"other"'}, "it was changed while it was read"),
        ({b"content-range": b"bytes 0-9/10"}, "does not answer byte ranges as S3 does"),
    ],
)
def test_answers_that_are_of_something_else(
    store: S3Server, tmp_path: Path, headers: dict[bytes, bytes], said: str
) -> None:
    (task,) = handlers.init({**EVENT, "world_size": 1})["ranks"]
    store.trouble = times(1, "GET", "/2.pt", Trouble(headers=headers))
    with pytest.raises(StorageError, match=rf"cannot read s3://bucket/data/2\.pt: .*{said}"):
        handlers.infer(task)
    assert visible(tmp_path / "s3/bucket") == set()


@pytest.mark.usefixtures("impatient")
def test_an_event_whose_ranks_cannot_be_written(store: S3Server, tmp_path: Path) -> None:
    store.trouble = times(10_000, "PUT", "/ranks.json", FAULTS["503"][0])
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/out/r/ranks\.json: too many"):
        handlers.init({**EVENT, "world_size": 2, "ranks_file": True})


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", ["/predictions.npz", "/combined_data.json", "/summary.json"])
def test_results_that_cannot_be_merged(store: S3Server, tmp_path: Path, end: str) -> None:
    """What says that all is there is never there without the rest."""
    plan = handlers.init({**EVENT, "world_size": 2})
    for task in plan["ranks"]:
        handlers.infer(task)
    store.trouble = times(10_000, "PUT", end, FAULTS["500"][0])
    with pytest.raises(StorageError, match=rf"cannot write s3://bucket/out/r{end}: .*{FAILED}"):
        handlers.summarize(plan)
    assert "summary.json" not in visible(tmp_path / "s3/bucket")
    store.trouble = lambda method, path: None
    assert handlers.summarize(plan)["summary"]["rows"] == 60


@pytest.mark.parametrize("place", ["data", "model", "hang"])
def test_others_are_told_at_once(
    store: S3Server, rendezvous: str, place: str, measured: Measured
) -> None:
    """Rank 1 fails; ranks 0 and 2 end by its word, also if one is in the middle of a read."""
    plan = handlers.init(
        {**EVENT, "run": "r", "world_size": 3, "rendezvous_endpoint": rendezvous, "timeout": 40}
    )
    s3.ANSWER_SECONDS = NEVER  # the fixture restores it: of itself no read ends here
    storage.s3.close()
    plan["ranks"][1]["shard"] = [["s3://bucket/data/none.pt", 0, 20]]
    if place == "model":
        plan["ranks"][1] |= {"shard": [], "model": "s3://bucket/none.safetensors"}
    began, failed = time.monotonic(), list[float]()

    def trouble(method: str, path: str) -> Trouble | None:
        if "/none." in path:
            failed.append(time.monotonic())
        hangs = place == "hang" and path.endswith("/3.pt") and method == "GET"
        return Trouble(delay=NEVER) if hangs else None

    store.trouble = trouble
    outcome = attempt(plan["ranks"])
    measured(
        f"others end after a rank's failure: {place}", time.monotonic() - failed[0], "s", "< 5"
    )
    assert [type(error) for error in outcome] == [Aborted, StorageError, Aborted]
    assert time.monotonic() - failed[0] < 5
    assert time.monotonic() - began < 20
    verdict = handlers.blame(plan)
    assert (verdict["rank"], verdict["error"]) == (1, "StorageError")
    if place == "hang":
        told = json.loads(storage.read("s3://bucket/out/r/failed/0/2.json"))["message"]
        assert "this rank was waiting for the data files to be opened" in told


def test_no_read_that_hangs_holds_up_a_failing_rank(store: S3Server, measured: Measured) -> None:
    """Of two files one is damaged, and the other one never comes: said at once, exit at once."""
    plan = handlers.init({**EVENT, "world_size": 1})
    plan["ranks"][0]["shard"] = [["s3://bucket/m.onnx", 0, 1], ["s3://bucket/data/2.pt", 0, 20]]
    store.trouble = times(10_000, "GET", "/2.pt", Trouble(delay=NEVER))
    began = time.monotonic()
    done = worker("infer", plan["ranks"][0])
    seconds = time.monotonic() - began
    measured("a process fails and ends while a read hangs", seconds, "s", "< 8")
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert (done.returncode, error["type"]) == (1, "DatasetError")
    assert "m.onnx" in error["message"]
    assert "Traceback" not in done.stderr
    assert seconds < 8  # of which most is Python's start; a request is given up after 10 s


def test_a_damaged_file_is_said_though_another_one_hangs(store: S3Server) -> None:
    """In this process, too, where the AWS runtime serves one event after the other."""
    s3.ANSWER_SECONDS = NEVER
    storage.s3.close()
    plan = handlers.init({**EVENT, "world_size": 1})
    plan["ranks"][0]["shard"] = [["s3://bucket/m.onnx", 0, 1], ["s3://bucket/data/2.pt", 0, 20]]
    store.trouble = times(10_000, "GET", "/2.pt", Trouble(delay=NEVER))
    with pytest.raises(DatasetError, match=r"m\.onnx"):
        handlers.infer(plan["ranks"][0])


def worker(step: str, event: object, before: str = "", **env: str) -> Any:
    """`python -m lambda_worker` with an event, after some lines of Python."""
    code = (
        f"import sys; sys.argv[1:] = [{step!r}]\n{before}\nfrom lambda_worker.__main__ import main"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nmain()"],
        input=json.dumps(event),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=50,
    )


# ------------------------------------------------------------------------------- full disks
def local(files: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    places = {"data": str(files / "bucket/data"), "model": str(files / "bucket/m.safetensors")}
    return handlers.init({**EVENT, **places, "results": str(tmp_path / "out"), **more})


@pytest.mark.parametrize("size", [0, 100])
def test_disk_that_is_full_for_a_record(files: Path, tmp_path: Path, size: int) -> None:
    (task,) = local(files, tmp_path, world_size=1)["ranks"]
    with disk_takes(size), pytest.raises(StorageError) as error:
        handlers.infer(task)
    said = f"cannot write {tmp_path}/out/r/0.npz: File too large: choose another place"
    assert str(error.value) == said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["predictions.npz", "combined_data.json", "summary.json"])
def test_disk_that_is_full_for_the_results(
    files: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = local(files, tmp_path, world_size=2)
    for task in plan["ranks"]:
        handlers.infer(task)
    write, before = storage.write, storage.names(plan["results"])

    def full(url: str, data: bytes) -> None:
        with disk_takes(len(data) - 1 if url.endswith(name) else 1 << 30):
            write(url, data)

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(StorageError, match=rf"cannot write .*{name}: File too large"):
        handlers.summarize(plan)
    left = set(storage.names(plan["results"])) - set(before)
    assert not {name, "summary.json"} & left
    assert not [file for file in os.listdir(plan["results"]) if file.endswith(".part")]


def test_no_room_for_a_download(store: S3Server, tmp_path: Path) -> None:
    (task,) = handlers.init({**EVENT, "world_size": 1})["ranks"]
    with disk_takes(100_000), pytest.raises(StorageError, match="another TMPDIR") as error:
        handlers.infer(task)
    assert "m.onnx: File too large: choose another TMPDIR" in str(error.value)
    assert visible(tmp_path / "s3/bucket") == set()


TMPFS = """
mount -t tmpfs -o size=64k none "$1" || exit 99
head -c {taken} /dev/zero > "$1/taken"
{then}
shift; "$@"
code=$?; find "$0" ! -type d; exit $code
"""


@pytest.mark.parametrize(
    ("taken", "then", "said"),
    [
        ("1M", "", "No space left on device: make room, or choose another place"),
        ("30000", "", "No space left on device: make room, or choose another place"),
        ("0", 'mount -o remount,ro "$1"', "Read-only file system: choose another place"),
    ],
    ids=["full", "all but full", "read-only"],
)
def test_real_file_system(files: Path, tmp_path: Path, taken: str, then: str, said: str) -> None:
    """A small tmpfs, in a mount namespace of its own."""
    place = tmp_path / "out"
    place.mkdir()
    (task,) = local(files, tmp_path, world_size=1)["ranks"]
    task["shard"] = task["shard"] * 60  # 3,600 rows: the table takes some 90 KB
    command = [sys.executable, "-m", "lambda_worker", "infer"]
    script = ["unshare", "-rm", "sh", "-c", TMPFS.format(taken=taken, then=then), str(place)]
    done = subprocess.run(
        [*script, str(place), *command], input=json.dumps(task), capture_output=True, text=True
    )
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip(f"no namespaces here: {done.stderr}")
    lines = done.stdout.splitlines()
    error = next(json.loads(line)["error"] for line in lines if line.startswith('{"error"'))
    assert error["type"] == "StorageError"
    assert error["message"] == f"cannot write {place}/r/0.npz: {said}"
    left = [line for line in lines if line.startswith("/") and "/failed/" not in line]
    assert left == [f"{place}/taken"]
    assert "Traceback" not in done.stderr


def test_no_place_for_what_is_temporary(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = local(files, tmp_path, world_size=1)["ranks"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(
        StorageError, match=r"cannot make a temporary folder: No such file .*TMPDIR"
    ):
        handlers.infer(task)


# ------------------------------------------------------------------------------ memory
LIMIT = """
import resource
from lambda_worker import inference
run = inference.run
def limited(*given):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    return run(*given)
inference.run = limited
"""


def test_out_of_memory_is_said_in_words(files: Path, tmp_path: Path) -> None:
    (task,) = local(files, tmp_path, world_size=1, batch_size=100_000)["ranks"]
    task["shard"] = task["shard"] * 200
    done = worker("infer", task, LIMIT)
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["type"] == "OutOfMemory"
    assert error["message"].startswith("out of memory at stage infer")
    assert error["message"].endswith(
        "take a smaller batch size, more ranks, or give the worker more memory"
    )
    assert "Traceback" not in done.stderr
    assert (done.returncode, visible(tmp_path)) == (1, set())


def test_others_hear_of_a_rank_without_memory(
    files: Path, tmp_path: Path, rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = local(files, tmp_path, world_size=2, rendezvous_endpoint=rendezvous, timeout=30)
    from lambda_worker import inference

    run, once = inference.run, threading.Lock()

    def short(*given: Any) -> Any:
        if once.acquire(blocking=False):
            raise MemoryError("Unable to allocate 9.9 GiB")
        return run(*given)

    monkeypatch.setattr(inference, "run", short)
    kinds = {type(error).__name__: str(error) for error in attempt(plan["ranks"])}
    assert kinds.keys() == {"OutOfMemory", "Aborted"}
    assert "out of memory at stage infer" in kinds["Aborted"]
    verdict = handlers.blame(plan)
    assert (verdict["error"], verdict["retry"]) == ("OutOfMemory", False)
