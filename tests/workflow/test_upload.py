"""`cosmic data upload`, to a real S3 server over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from lambda_worker import storage
from lambda_worker.dataset import DatasetError
from lambda_worker.storage import StorageError
from lambda_worker.storage import s3 as worker_s3
from tests.s3 import DENIED, SLOW_DOWN, S3Server, Trouble, s3_client, serve_s3
from tests.worker.worker_data import tensors
from workflow import upload as uploads
from workflow.cli import app
from workflow.upload import UploadError, upload


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server whose buckets are the folders in `s3`."""
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with serve_s3(tmp_path / "s3") as server, s3_client(server.endpoint, monkeypatch):
        yield server


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A dataset of three partitions, with what else may stand in its folder."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in (1, 2, 3):
        torch.save(TensorDataset(*tensors(number)), folder / f"{number}.pt")
    (folder / "split.json").write_text("{}")
    (folder / ".4.pt.1.part").write_text("half")
    return folder


def ignore(done: int, of: int) -> None:
    pass


def sent_by(server: S3Server) -> list[str]:
    return sorted(path.partition("?")[0] for method, path in server.requests if method == "PUT")


def unfinished(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "s3" / ".nanio" / "multipart"
    return list(folder.iterdir()) if folder.exists() else []


PLACE = "s3://bucket/datasets/small"


def test_dataset(s3: S3Server, parts: Path, tmp_path: Path) -> None:
    done = upload(parts, PLACE, True, ignore)
    folder = tmp_path / "s3" / "bucket" / "datasets" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["1.pt", "2.pt", "3.pt"]
    assert all(path.read_bytes() == (parts / path.name).read_bytes() for path in folder.iterdir())
    assert (done.files, done.rows, sorted(done.sent)) == (3, 6, ["1.pt", "2.pt", "3.pt"])


def test_what_is_there_is_not_sent_again(s3: S3Server, parts: Path) -> None:
    upload(parts, PLACE, True, ignore)
    s3.requests.clear()
    assert upload(parts, PLACE, True, ignore).sent == ()
    assert sent_by(s3) == []
    data = bytearray((parts / "2.pt").read_bytes())
    data[5000] ^= 1  # of the same size
    (parts / "2.pt").write_bytes(data)
    assert upload(parts, PLACE, True, ignore).sent == ("2.pt",)
    assert sent_by(s3) == ["/bucket/datasets/small/2.pt"]
    assert storage.read(f"{PLACE}/2.pt") == data


def test_files_of_another_dataset_are_not_mixed_in(s3: S3Server, parts: Path) -> None:
    upload(parts, PLACE, True, ignore)
    (parts / "3.pt").unlink()
    with pytest.raises(UploadError, match=r"small: holds 3\.pt, not of this dataset"):
        upload(parts, PLACE, True, ignore)
    upload(parts, "s3://bucket/mine", False, ignore)  # other places take anything


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not one"])
def test_a_dataset_that_is_none_is_not_sent(s3: S3Server, parts: Path, content: bytes) -> None:
    (parts / "2.pt").write_bytes(content)
    with pytest.raises(DatasetError, match=r"2\.pt: "):
        upload(parts, PLACE, True, ignore)
    assert sent_by(s3) == []


def test_other_files(s3: S3Server, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "deep" / "empty").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    assert upload(folder, "s3://bucket/configs", False, ignore).files == 2
    assert storage.names("s3://bucket/configs") == ["a.json", "deep/"]
    assert storage.read("s3://bucket/configs/deep/empty") == b""
    assert upload(folder / "a.json", "s3://bucket/models/", False, ignore).sent == ("a.json",)
    assert storage.names("s3://bucket/models") == ["a.json"]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of five parts."""
    monkeypatch.setattr(uploads, "_PART", 5 << 20)  # the least that S3 takes
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(21 << 20))
    return path


def test_large_file_goes_in_parts(s3: S3Server, large: Path) -> None:
    seen: list[tuple[int, int]] = []
    upload(large, "s3://bucket/models", False, lambda *now: seen.append(now))
    assert len(sent_by(s3)) == 5
    assert storage.read(f"s3://bucket/models/{large.name}") == large.read_bytes()
    assert max(done for done, _ in seen) == seen[-1][1] == 21 << 20
    assert upload(large, "s3://bucket/models", False, ignore).sent == ()


def test_failed_upload_leaves_no_parts(s3: S3Server, large: Path, tmp_path: Path) -> None:
    s3.trouble = lambda method, path: DENIED if "partNumber=4" in path else None
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/models/model.*access denied"):
        upload(large, "s3://bucket/models", False, ignore)
    assert any("partNumber" in path for _, path in s3.requests)
    assert unfinished(tmp_path) == []


COMMAND = [sys.executable, "-m", "workflow", "data", "upload"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_upload(s3: S3Server, tmp_path: Path, number: int) -> None:
    """What SIGKILL leaves, the next upload removes; SIGTERM leaves nothing."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(100 << 20))
    arrived = threading.Event()

    def slow(method: str, path: str) -> Trouble | None:
        if "partNumber" not in path:
            return None
        arrived.set()
        return Trouble(delay=0.5)

    s3.trouble = slow
    command = [*COMMAND, str(path), "s3://bucket", "--as", "models"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert arrived.wait(50)
        process.send_signal(number)
        _, said = process.communicate(timeout=50)
    s3.trouble = lambda method, path: None
    if number == signal.SIGKILL:
        assert len(unfinished(tmp_path)) == 1
    else:
        assert process.returncode == 128 + number
        assert b"nothing is left running" in said
        assert unfinished(tmp_path) == []
    assert upload(path, "s3://bucket/models", False, ignore).sent == (path.name,)
    assert unfinished(tmp_path) == []
    assert storage.read(f"s3://bucket/models/{path.name}") == path.read_bytes()


def test_unfinished_uploads_of_others_stay(s3: S3Server, large: Path, tmp_path: Path) -> None:
    worker_s3.client().create_multipart_upload(Bucket="bucket", Key="models/other")
    worker_s3.client().create_multipart_upload(Bucket="bucket", Key=f"models/{large.name}")
    upload(large, "s3://bucket/models", False, ignore)
    (left,) = unfinished(tmp_path)
    assert json.loads((left / "init.json").read_text())["key"] == "models/other"


def test_who_may_not_list_unfinished_uploads_may_upload(s3: S3Server, large: Path) -> None:
    s3.trouble = lambda method, path: DENIED if "?uploads" in path and method == "GET" else None
    assert upload(large, "s3://bucket/models", False, ignore).sent == (large.name,)


def test_upload_that_a_later_one_has_ended(s3: S3Server, large: Path, tmp_path: Path) -> None:
    """It says why, and nothing of it is there."""

    def later(method: str, path: str) -> None:
        if "partNumber=5" in path:
            (folder,) = unfinished(tmp_path)
            shutil.rmtree(folder)  # as an AbortMultipartUpload does

    s3.trouble = later
    with pytest.raises(StorageError, match="another upload to the same place has ended this one"):
        upload(large, "s3://bucket/models", False, ignore)
    assert storage.names("s3://bucket/models") == []


def test_busy_server_is_waited_for(
    s3: S3Server, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    busy = [SLOW_DOWN] * 6  # of all; a request is tried eight times
    s3.trouble = lambda method, path: busy.pop() if busy and method == "PUT" else None
    assert len(upload(parts, PLACE, True, ignore).sent) == 3
    s3.trouble = lambda method, path: SLOW_DOWN if method == "PUT" else None
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/a/\S+: too many requests"):
        upload(parts, "s3://bucket/a", False, ignore)


def test_some_files_at_a_time(s3: S3Server, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}").write_text(str(number))
    s3.trouble = lambda method, path: Trouble(delay=0.05)
    assert len(upload(folder, "s3://bucket/configs", False, ignore).sent) == 30
    assert 2 <= s3.busiest <= uploads._FILES


def test_an_error_ends_all(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose turn has not come are not even read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(100, 200):
        (folder / str(number)).write_text(str(number))
    digest, read = uploads._Sending._digest, []

    def counted(self: uploads._Sending, path: Path) -> str:
        read.append(path)
        return digest(self, path)

    monkeypatch.setattr(uploads._Sending, "_digest", counted)
    s3.trouble = lambda method, path: DENIED if path.endswith("/100") else Trouble(delay=0.02)
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/configs/100: access denied"):
        upload(folder, "s3://bucket/configs", False, ignore)
    assert len(read) < 50


def test_file_that_is_changed_meanwhile(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def change(method: str, url: str) -> None:
        if method == "PUT":
            os.utime(path, ns=(1, 1))

    s3.trouble = change
    with pytest.raises(UploadError, match="a: was changed while it was uploaded: run again"):
        upload(path, "s3://bucket/configs", False, ignore)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "upload", *arguments])


def test_command(s3: S3Server, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = ("--as", "datasets/small", "--endpoint-url", s3.endpoint)
    done = command(str(parts), "s3://bucket/", *options)
    assert done.exit_code == 0, done.output
    assert "s3://bucket/datasets/small: 3 files, 0.1 MB, 6 rows\n" in done.stdout
    again = command(str(parts), "s3://bucket", *options)
    assert "6 rows; 3 of them there before\n" in again.stdout
    other = command(str(parts), "s3://bucket/datasets/mine", "--endpoint-url", s3.endpoint)
    assert "3 files" in other.stdout  # a dataset by its place: without split.json


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("parts", "s3://nowhere", "cannot write to s3://nowhere/models: no such bucket: create it"),
        ("none", "s3://bucket", "none: no such file or folder"),
        ("s3/bucket", "s3://bucket", "s3/bucket: no file in it"),
    ],
)
def test_errors(
    s3: S3Server, parts: Path, tmp_path: Path, source: str, target: str, message: str
) -> None:
    done = command(str(tmp_path / source), target, "--as", "models")
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]


def test_denied(s3: S3Server, parts: Path) -> None:
    s3.trouble = lambda method, path: DENIED if method == "PUT" else None
    done = command(str(parts), "s3://bucket", "--as", "datasets/small")
    assert done.exit_code == 1
    assert re.search(r"cannot write s3://bucket/datasets/small/\d\.pt: access denied", done.stderr)


@pytest.mark.parametrize("target", ["bucket", "a/folder", "s3://", "https://a/b"])
def test_wrong_target(parts: Path, target: str) -> None:
    done = command(str(parts), target)
    assert done.exit_code == 2
    assert "as in s3://my-bucket" in done.stderr
