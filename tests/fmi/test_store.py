"""Stores: the same behaviour on a folder and on a real S3 server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fmi_client.errors import ProtocolError, RendezvousError
from fmi_client.transport import store as stores
from fmi_client.transport.store import FolderStore, S3Store, Store, open_store, parse_store
from tests.s3 import Trouble, s3_client, serve_s3


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{tmp_path.name}/prefix"
    return str(tmp_path / "new")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    found = open_store(url)
    yield found
    found.close()


def test_objects_are_put_got_and_deleted(store: Store) -> None:
    store.put("a/b/0", [b"one ", memoryview(bytearray(b"two"))])
    assert store.get("a/b/0", 7) == b"one two"
    store.put("a/b/0", [])
    assert store.get("a/b/0", 7) == b""
    store.delete("a/b/0")
    store.delete("a/b/0")
    assert store.get("a/b/0", 7) is None
    assert store.get("x/y", 7) is None


def test_names_are_those_of_one_folder(store: Store) -> None:
    for name in ("run/1", "run/20", "run/deep/3", "runner/4", "5"):
        store.put(name, [])
    assert {"1", "20"} <= set(store.names("run")) <= {"1", "20", "deep"}
    assert store.names("none") == []


def test_more_than_one_request_can_name_is_listed_and_cleared(
    store: Store, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if isinstance(store, S3Store):
        folder = request.getfixturevalue("bucket") / tmp_path.name / "prefix"
    else:
        folder = tmp_path / "new"
    (folder / "many" / "deep").mkdir(parents=True)
    for number in range(1100):  # an answer holds 1,000 names
        (folder / "many" / f"{number}").touch()
    store.put("many/deep/er", [])
    store.put("other", [])
    assert len(set(store.names("many")) - {"deep"}) == 1100
    store.clear("many")
    assert store.names("many") == store.names("many/deep") == []
    assert store.get("other", 1) == b""


def test_an_object_over_the_limit_is_not_read(store: Store) -> None:
    store.put("large", [bytes(11)])
    with pytest.raises(ProtocolError, match="object large has 11 bytes; at most 10"):
        store.get("large", 10)


def test_endless_folders_are_not_listed_to_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        store.put(f"run/{number}", [])
    monkeypatch.setattr(stores, "MAX_NAMES", 3)
    assert len(store.names("run")) == 3


# ------------------------------------------------------------------------------- folders
def test_a_file_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        assert FolderStore(tmp_path).names("run") == []  # nobody sees it before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RendezvousError, match=r"cannot write .*run/0: No space left on device"):
        FolderStore(tmp_path).put("run/0", [b"x"])
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("call", ["put", "get", "names", "delete"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, call: str) -> None:
    (tmp_path / "file").touch()
    store = FolderStore(tmp_path / "file")
    arguments: dict[str, Any] = {"put": ("a/b", []), "get": ("a", 9)}
    with pytest.raises(RendezvousError, match=rf"cannot \w+ {tmp_path}/file.*Not a directory"):
        getattr(store, call)(*arguments.get(call, ("a",)))


def test_a_folder_that_is_cleared_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = FolderStore(tmp_path), 0
    original = Path.mkdir

    def mkdir(self: Path, **options: Any) -> None:
        nonlocal made
        made += 1
        original(self, **options)
        if made == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    store.put("run/0", [b"x"])
    assert (store.get("run/0", 9), made) == (b"x", 2)


def test_clearing_removes_the_empty_folders_above_up_to_the_root(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("job/epoch/run/0", [])
    store.put("job/epoch/ticket", [])
    store.clear("job/epoch/run")
    assert os.listdir(tmp_path / "job" / "epoch") == ["ticket"]
    store.delete("job/epoch/ticket")
    store.clear("job/epoch/run")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ S3
def test_a_body_that_breaks_off_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    with serve_s3(tmp_path) as server, s3_client(server.endpoint, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        store, cuts = S3Store("bucket"), [1, 0, 3, 4]
        store.put("broken", [b"whole"])
        server.trouble = lambda method, path: Trouble(cut=cuts.pop()) if cuts else None
        assert store.get("broken", 5) == b"whole"
        assert cuts == []
        server.trouble = lambda method, path: Trouble(cut=1)
        with pytest.raises(RendezvousError, match=r"cannot read s3://bucket/broken: .* 5 times"):
            store.get("broken", 5)
        store.close()


def test_what_s3_refuses_says_what_to_do(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store("nowhere")
    with pytest.raises(RendezvousError, match="cannot write s3://nowhere/a: no such bucket"):
        store.put("a", [])
    store.close()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = S3Store("bucket/b")
    with pytest.raises(RendezvousError, match="cannot list s3://bucket/b/a: wrong secret key"):
        store.names("a")
    store.close()


def test_no_s3_server(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = S3Store("bucket")
    with pytest.raises(RendezvousError, match=r"s3://bucket/a: .* \(check AWS_ENDPOINT_URL"):
        store.get("a", 1)
    store.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(RendezvousError, match=r"cannot use S3: Invalid endpoint.*\(check AWS_END"):
        S3Store("bucket")


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(RendezvousError, match=r"without boto3: pip install 'cosmic-fmi\[s3\]'"):
        S3Store("bucket")


# ---------------------------------------------------------------------------------- URLs
def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_store("a/b") == ("file", f"{tmp_path}/a/b")
    assert parse_store("file:///a%20b/") == ("file", "/a b")
    assert parse_store("s3://bucket/a/b/") == ("s3", "bucket/a/b")
    assert parse_store("s3://bucket") == ("s3", "bucket")


@pytest.mark.parametrize("url", ["", "s3://", "s3:///key", "ftp://host/a", "file://host/a", "a\0"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"store=.* is not s3://bucket/prefix, nor a folder"):
        parse_store(url)
