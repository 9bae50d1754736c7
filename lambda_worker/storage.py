"""Files by URL: a plain path, file://, or s3://bucket/key.

S3 means any server that speaks it: endpoint, region and credentials come from the usual AWS_*
variables (AWS_ENDPOINT_URL among them). boto3 is imported when the first s3:// URL is used.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from fmi_client.transport.s3 import CHANGED, CONNECTIONS, S3, BrokenOff
from lambda_worker import aside
from lambda_worker.atomic import replacing

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 8 << 20  # bytes of an object that are asked for at once
TRIES = 8  # of a request to S3: where the answer is SlowDown, they take 70 s at most, 35 on average
READERS = CONNECTIONS  # files at a time: an S3 GET waits some 20 ms, and there may be thousands


class StorageError(RuntimeError):
    """Something cannot be read or written; the text names the URL and what to do."""


s3 = S3(StorageError, TRIES)
"""The client of this process."""


def local_path(url: str) -> Path | None:
    """The path that a URL means on this machine, absolute; None for s3://.

    Raises:
        StorageError: another scheme.
    """
    if not url or "\0" in url:
        raise StorageError(f"cannot use {url!r}: expected a path, file:// or s3://bucket/key")
    parts = urlsplit(url)
    if "://" not in url:
        return Path(url).absolute()
    if parts.scheme == "file":
        return Path(unquote(parts.path)).absolute()
    if parts.scheme == "s3":
        return None
    raise StorageError(f"cannot use {url}: expected a path, file:// or s3://bucket/key")


def absolute(url: str) -> str:
    """The URL in the form that means the same in every process: s3:// or an absolute path."""
    path = local_path(url)
    if path is not None:
        return os.path.normpath(path)
    s3.split(url)
    return url.rstrip("/")


def place(url: str) -> dict[str, str]:
    """A URL as Step Functions names objects: its bucket and key; of a local file, its path.

    Raises:
        StorageError: as `absolute`.
    """
    url = absolute(url)
    if local_path(url) is not None:
        return {"path": url}
    bucket, key = s3.split(url)
    return {"bucket": bucket, "key": key}


def check_writable(url: str) -> None:
    """Refuse a folder that files cannot be written to, or a bucket that is not there.

    Nothing is changed.

    Raises:
        StorageError: it is, or is inside, a file, or is read-only; or there is no such bucket.
    """
    path = local_path(url)
    if path is None:
        bucket = s3.split(url)[0]
        return _ask_if_allowed("write to", url, lambda: s3.client().head_bucket(Bucket=bucket))
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise StorageError(f"cannot write to {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {path}: no permission in {nearest}")


def _ask_if_allowed(doing: str, url: str, ask: Callable[[], object]) -> None:
    """Ask ahead of the one who will do it, whose role may have rights that ours has not."""
    with s3.errors(doing, url):
        try:
            ask()
        except s3.client().exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "403":
                raise


def remove(url: str) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    path = local_path(url)
    if path is None:
        bucket, key = s3.split(url)
        with s3.errors("remove", url):
            s3.client().delete_object(Bucket=bucket, Key=key)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def read(url: str) -> bytes:
    """All bytes of a file.

    Raises:
        StorageError: missing, or not readable.
    """
    path = local_path(url)
    if path is None:
        with s3.errors("read", url):
            return s3.read(url)
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def read_all(urls: Sequence[str]) -> list[bytes]:
    """All bytes of many files, in their order, `READERS` of them read at a time.

    Raises:
        StorageError: one is missing or not readable; the others are given up.
    """
    return in_parallel(read, urls)


def in_parallel(do: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What `do` returns for each item, in order, for `READERS` of them at a time.

    Raises:
        Exception: what `do` has raised first; nobody waits for the rest.
    """
    return aside.in_parallel(do, items, READERS)


def write(url: str, data: bytes) -> None:
    """Write a file whole or not at all; folders are made as needed.

    Raises:
        StorageError: nothing was written, and an older file is as it was.
    """
    path = local_path(url)
    if path is None:
        bucket, key = s3.split(url)
        with s3.errors("write", url):
            s3.client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name with no content
    except OSError as error:
        raise StorageError(f"{error.strerror}: {_advice(error)}choose another place") from error


def _advice(error: OSError) -> str:
    return "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def names(url: str) -> list[str]:
    """Sorted names directly in a folder, those of folders with a slash at the end.

    An S3 prefix that holds nothing and a folder that is not there give an empty list.

    Raises:
        StorageError: not readable.
    """
    path = local_path(url)
    if path is None:
        with s3.errors("list", url):
            return sorted(_names_of_objects(url))
    try:
        return sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {path}: {error.strerror}") from error


def _names_of_objects(url: str) -> Iterator[str]:
    prefix = s3.folder(url)[1]
    for page in s3.pages(url, Delimiter="/"):
        yield from (item["Key"].removeprefix(prefix) for item in page.get("Contents", ()))
        yield from (item["Prefix"].removeprefix(prefix) for item in page.get("CommonPrefixes", ()))


def fetch(url: str, folder: Path) -> Path:
    """A local path with the file's content: itself, or a download into `folder`.

    Raises:
        StorageError: the object cannot be downloaded; no part of it is left.
    """
    path = local_path(url)
    if path is not None:
        return path
    source = open_ranged(url)
    path = folder / url.removeprefix("s3://")
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            for at in range(0, source.size, BLOCK):
                file.write(source.read(at, min(BLOCK, source.size - at)))
    except OSError as error:
        raise StorageError(f"{error.strerror}: {_advice(error)}choose another TMPDIR") from error
    return path


def temporary(prefix: str = "cosmic-") -> Path:
    """A new folder for what is temporary, which the caller removes.

    Raises:
        StorageError: there is no place for it.
    """
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        why = f"cannot make a temporary folder: {error.strerror or error}"
        raise StorageError(f"{why}: {_advice(error)}choose another TMPDIR") from error


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is temporary, gone with the block; errors are those of `temporary`."""
    folder = temporary()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def version(url: str) -> str:
    """What changes with a file: ETag and time of an object, size and times of a local file.

    Raises:
        StorageError: missing, or not readable.
    """
    path = local_path(url)
    if path is not None:
        return "-".join(map(str, _version(_stat(path))))
    bucket, key = s3.split(url)
    with s3.errors("read", url):
        head = s3.client().head_object(Bucket=bucket, Key=key)
    return f"{head.get('ETag', '')} {head['LastModified']}"  # not every server has tags


def open_ranged(url: str) -> Ranged:
    """A file or object of which ranges are read, the file's content untouched so far.

    Raises:
        StorageError: missing, or not readable.
    """
    path = local_path(url)
    return _RangedObject(url) if path is None else _RangedFile(url, path)


class Ranged(ABC):
    """A file of which ranges of bytes are read, all of them of the same version.

    Attributes:
        url: as it was given.
        size: bytes.
        version: another one after any change: ETag, or size, time and inode.
        bytes_read, requests: what was read so far, and in how many requests.
    """

    def __init__(self, url: str, size: int, version: str) -> None:
        self.url, self.size, self.version = url, size, version
        self.bytes_read = self.requests = 0

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from an offset; see `read_into`."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with what stands at an offset.

        Raises:
            StorageError: it cannot be read, or the file is no longer what it was when opened.
        """
        done = 0
        while done < len(buffer):
            done += self._some(offset + done, buffer[done:])

    @abstractmethod
    def _some(self, offset: int, buffer: memoryview) -> int:
        """Read the first bytes of the buffer, at least one; gives how many."""


class _RangedFile(Ranged):
    """A local file; opened anew for each range, since there may be more files than descriptors.

    Not mapped: a mapped file that somebody truncates ends the process (SIGBUS), and its pages
    count as this process's memory.
    """

    def __init__(self, url: str, path: Path) -> None:
        self._path, stat = path, _stat(path)
        super().__init__(url, stat.st_size, _version(stat))

    def _some(self, offset: int, buffer: memoryview) -> int:
        try:
            with self._path.open("rb", buffering=0) as file:
                count = os.preadv(file.fileno(), [buffer], offset)
                version = _version(os.fstat(file.fileno()))
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from error
        if version != self.version or not count:
            raise StorageError(f"cannot read {self._path}: {CHANGED}")
        self.bytes_read += count
        self.requests += 1
        return count


class _RangedObject(Ranged):
    """An object. A body that breaks off is asked for again from where it broke."""

    def __init__(self, url: str) -> None:
        self._bucket, self._key = s3.split(url)
        with s3.errors("read", url):
            head = s3.client().head_object(Bucket=self._bucket, Key=self._key)
        super().__init__(url, head["ContentLength"], head.get("ETag", ""))
        self.requests = 1
        self._match = {"IfMatch": self.version} if self.version.strip('"') else {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = failures = 0
        while done < len(buffer):
            try:
                done += self._some(offset + done, buffer[done:])
            except BrokenOff as broken:
                done, failures = done + broken.done, failures + 1
                s3.wait(self.url, failures, broken)

    def _some(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with s3.errors("read", self.url):
            try:
                for piece in s3.pieces(self._ask(offset, len(buffer))):
                    buffer[done : (done := done + len(piece))] = piece
            finally:
                self.bytes_read += done
        if done < len(buffer):
            raise BrokenOff(f"{done:,} of {len(buffer):,} bytes came", done)
        return done

    def _ask(self, offset: int, length: int) -> Any:
        last = offset + length - 1
        self.requests += 1
        answer = s3.client().get_object(
            Bucket=self._bucket, Key=self._key, Range=f"bytes={offset}-{last}", **self._match
        )
        # Not every server knows If-Match.
        problem = CHANGED if answer.get("ETag", "") != self.version else ""
        if answer.get("ContentRange") != f"bytes {offset}-{last}/{self.size}" or (
            answer["ContentLength"] != length
        ):
            problem = problem or "the server does not answer byte ranges as S3 does"
        if problem:
            answer["Body"].close()
            raise StorageError(f"cannot read {self.url}: {problem}")
        return answer["Body"]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_dev}"


def check_there(url: str) -> None:
    """Refuse an object that is not there. Of local files the machine that reads them knows more.

    Raises:
        StorageError: there is no such object or bucket.
    """
    if local_path(url) is None:
        bucket, key = s3.split(url)
        _ask_if_allowed("read", url, lambda: s3.client().head_object(Bucket=bucket, Key=key))
