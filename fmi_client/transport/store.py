"""Places for objects that all ranks of a job can reach: a shared folder, or an S3 bucket.

S3 means any server that speaks it: endpoint, region, credentials and the number of attempts
come from the usual AWS_* variables. boto3 (extra ``s3``) is imported when such a store is opened.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import unquote, urlsplit

from fmi_client.errors import ProtocolError, RendezvousError
from fmi_client.protocol.peer import Buffer
from fmi_client.transport.s3 import S3

MAX_NAMES = 1_000_000
"""So many names of one folder are looked at; more are no job's."""

CREATES = 5
"""Times that a file's folder is made: whoever clears up may remove it again, being empty."""


class Store(Protocol):
    """Objects by name: a path with slashes, of letters, digits, ``.``, ``-``, ``_`` and ``%``.

    All methods block, may be called from several threads, and raise `RendezvousError` when the
    store cannot be used. What was put is seen whole, or not at all, by whoever asks afterwards.
    """

    def put(self, name: str, parts: Sequence[Buffer]) -> None: ...

    def get(self, name: str, limit: int) -> bytes | None:
        """Return an object, None if there is none; `ProtocolError` if it is over `limit` bytes."""

    def delete(self, name: str) -> None: ...

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly in `folder`."""

    def clear(self, folder: str) -> None:
        """Delete all objects below `folder`."""

    def close(self) -> None: ...


def parse_store(url: str) -> tuple[str, str]:
    """Return ("s3", "bucket/prefix") or ("file", absolute path).

    Raises:
        ValueError: it is neither.
    """
    parts = urlsplit(url)
    if "://" not in url and url and "\0" not in url:
        return "file", os.path.abspath(url)
    if parts.scheme == "file" and parts.path and not parts.netloc:
        return "file", os.path.abspath(unquote(parts.path))
    if parts.scheme == "s3" and parts.netloc:
        return "s3", url.removeprefix("s3://").strip("/")
    raise ValueError(f"store={url!r} is not s3://bucket/prefix, nor a folder")


def open_store(url: str) -> Store:
    """Open a store; imports boto3 for S3, so it may take half a second.

    Raises:
        RendezvousError: boto3 is not installed.
    """
    kind, where = parse_store(url)
    return S3Store(where) if kind == "s3" else FolderStore(Path(where))


class FolderStore:
    """Files in a folder that all ranks mount."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self._root / name
        partial = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        with _folder_errors("write", path):
            try:
                with _create(partial) as file:
                    file.writelines(parts)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def get(self, name: str, limit: int) -> bytes | None:
        path = self._root / name
        with _folder_errors("read", path):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            with file:
                _check_size(name, limit, os.fstat(file.fileno()).st_size)
                return file.read()

    def delete(self, name: str) -> None:
        path = self._root / name
        with _folder_errors("delete", path):
            path.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        path = self._root / folder
        with _folder_errors("list", path):
            try:
                with os.scandir(path) as entries:
                    seen = itertools.islice(entries, MAX_NAMES)
                    return [e.name for e in seen if not e.name.startswith(".")]
            except FileNotFoundError:
                return []

    def clear(self, folder: str) -> None:
        path = self._root / folder
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # until one is not empty
            while (path := path.parent) != self._root:
                path.rmdir()

    def close(self) -> None:
        pass


def _create(path: Path) -> IO[bytes]:
    """Open a new file; its folder may be missing, or be removed by another rank just now."""
    for _ in range(CREATES):
        with contextlib.suppress(FileNotFoundError):
            return path.open("xb")
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


class S3Store:
    """Objects under a prefix of a bucket: ``bucket/prefix``."""

    def __init__(self, where: str) -> None:
        self._url, self._s3 = f"s3://{where}", S3(RendezvousError)
        self._client = self._s3.client()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        with self._errors("write", name):
            self._client.put_object(**self._key(name), Body=b"".join(parts))

    def get(self, name: str, limit: int) -> bytes | None:
        with self._errors("read", name):
            try:
                return self._s3.read(f"{self._url}/{name}", partial(_check_size, name, limit))
            except self._client.exceptions.NoSuchKey:
                return None

    def delete(self, name: str) -> None:
        with self._errors("delete", name):
            self._client.delete_object(**self._key(name))

    def names(self, folder: str) -> list[str]:
        with self._errors("list", folder):
            found = itertools.islice(self._keys(folder, Delimiter="/"), MAX_NAMES)
            return [key.rpartition("/")[2] for key in found]

    def clear(self, folder: str) -> None:
        with self._errors("delete", folder):
            keys = list(self._keys(folder))
            for at in range(0, len(keys), 1000):  # as many as one request may name
                batch = [{"Key": key} for key in keys[at : at + 1000]]
                bucket = self._key("")["Bucket"]
                self._client.delete_objects(Bucket=bucket, Delete={"Objects": batch})

    def close(self) -> None:
        self._s3.close()

    def _errors(self, doing: str, name: str) -> AbstractContextManager[None]:
        return self._s3.errors(doing, f"{self._url}/{name}")

    def _key(self, name: str) -> dict[str, str]:
        bucket, key = self._s3.split(f"{self._url}/{name}")
        return {"Bucket": bucket, "Key": key}

    def _keys(self, folder: str, **options: str) -> Iterator[str]:
        for page in self._s3.pages(f"{self._url}/{folder}", **options):
            yield from (item["Key"] for item in page.get("Contents", ()))


def _check_size(name: str, limit: int, size: int) -> None:
    if size > limit:
        raise ProtocolError(f"object {name} has {size} bytes; at most {limit} are expected")


@contextlib.contextmanager
def _folder_errors(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RendezvousError(f"cannot {doing} {path}: {error.strerror}") from error
