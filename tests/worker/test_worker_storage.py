"""Storage: the same behaviour on files and on a real S3 server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lambda_worker import dataset, storage
from lambda_worker.storage import StorageError
from tests.worker.worker_data import MakePt


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{tmp_path.name}"
    return str(tmp_path) if request.param == "path" else tmp_path.as_uri()


def test_write_read_and_names(root: str) -> None:
    storage.write(f"{root}/run/10.json", b"ten")
    storage.write(f"{root}/run/2.json", b"two")
    storage.write(f"{root}/run/2.json", b"two again")
    storage.write(f"{root}/run/deep/3.json", b"")
    storage.write(f"{root}/runner/4.json", b"")
    assert storage.read(f"{root}/run/2.json") == b"two again"
    assert storage.names(f"{root}/run") == ["10.json", "2.json", "deep/"]
    assert storage.names(f"{root}/none") == []


def test_fetch_gives_a_local_path(root: str, tmp_path: Path) -> None:
    storage.write(f"{root}/run/a.bin", b"content")
    assert storage.fetch(f"{root}/run/a.bin", tmp_path).read_bytes() == b"content"


def test_missing_file_is_named(root: str) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*none\.json: (No such|no such)"):
        storage.read(f"{root}/none.json")


def test_listing_is_paginated(bucket: Path) -> None:
    folder = bucket / "many"
    folder.mkdir()
    for number in range(1100):  # an answer holds 1,000 names
        (folder / f"{number}.json").touch()
    assert len(storage.names("s3://bucket/many")) == 1100


def test_rows_of_an_object_are_counted_without_downloading_it(
    bucket: Path, make_pt: MakePt, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("s3://bucket/big.pt", make_pt("big.pt", 100).read_bytes())
    asked: list[int] = []
    original = storage._RangedObject._some

    def counted(self: storage.Ranged, offset: int, buffer: memoryview) -> int:
        asked.append(len(buffer))
        return original(self, offset, buffer)

    monkeypatch.setattr(storage._RangedObject, "_some", counted)
    assert dataset.count("s3://bucket/big.pt") == 100
    assert asked == [4096, 4096]  # the two edges of the file


def test_damaged_object_is_a_dataset_error(bucket: Path, make_pt: MakePt) -> None:
    storage.write("s3://bucket/cut.pt", make_pt("a.pt", 20).read_bytes()[:-100])
    with pytest.raises(dataset.DatasetError, match=r"s3://bucket/cut\.pt: truncated or damaged"):
        dataset.count("s3://bucket/cut.pt")


def test_failed_download_leaves_nothing(bucket: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/none\.pt: no such object"):
        storage.fetch("s3://bucket/none.pt", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read", [storage.read, storage.names, storage.open_ranged])
def test_missing_bucket(bucket: Path, read: object) -> None:
    with pytest.raises(StorageError, match="s3://nowhere/a: no such"):
        read("s3://nowhere/a")  # type: ignore[operator]


def test_wrong_secret(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage.s3.close()
    with pytest.raises(StorageError, match="cannot write s3://bucket/a: wrong secret key"):
        storage.write("s3://bucket/a", b"")


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    storage.s3.close()
    yield
    storage.s3.close()


@pytest.mark.usefixtures("no_server")
def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://bucket/a: .* \(check AWS_ENDPOINT_URL"):
        storage.read("s3://bucket/a")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "nonsense", r"Invalid endpoint: nonsense \(check AWS_ENDPOINT_URL"),
        ("AWS_PROFILE", "nobody", r"profile \(nobody\) could not be found \(check .*AWS_PROFILE"),
    ],
)
@pytest.mark.usefixtures("no_server")
def test_an_environment_that_makes_no_sense_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=rf"cannot use S3: .*{said}"):
        storage.read("s3://bucket/a")


@pytest.mark.usefixtures("no_server")
def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3.session", "botocore"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StorageError, match=r"without boto3: pip install 'cosmic-fmi\[s3\]'"):
        storage.read("s3://bucket/a")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match="cannot use ftp://host/a: expected a path, file://"):
        storage.read("ftp://host/a")
    with pytest.raises(StorageError, match="expected s3://bucket/key"):
        storage.read("s3:///key")


def test_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.json"
    storage.write(str(target), b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*a\.json: No space left on device"):
        storage.write(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot list"):
        storage.names(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot write"):
        storage.write(str(tmp_path / "file" / "a.json"), b"")


def test_absolute_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("file:///a%20b") == "/a b"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
