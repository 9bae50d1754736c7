"""Files by URL: a plain path, file://, or s3://bucket/key.

S3 means any server that speaks it: endpoint, region and credentials come from the usual AWS_*
variables (AWS_ENDPOINT_URL among them). boto3 is imported when the first s3:// URL is used.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from lambda_worker.atomic import replacing

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIES = 8  # of a request: where the answer is SlowDown, they take up to 70 s, on average 35
ATTEMPTS = 5  # to get a body whole, whose connection breaks off
BLOCK = 8 << 20  # bytes of an object that are asked for at once
READERS = 16  # concurrent requests: an S3 GET waits some 20 ms, and there may be thousands
CHANGED = "it was changed while it was read: leave data alone during a run, and run again"
DENIED = "access denied: check the credentials and the role's policy"
# What S3 answers about an object that is not there to those who may not list the bucket.
OR_MISSING = " (or the name: S3 answers so, too, if there is no such object)"
BUSY = "too many requests, even after waiting: use fewer ranks, or try again later"
HINTS = {
    "NoSuchKey": "no such object: check the name",
    "NoSuchBucket": "no such bucket: create it, or check the name and AWS_ENDPOINT_URL",
    "AccessDenied": DENIED,
    "403": DENIED,
    "AllAccessDisabled": DENIED,
    "InvalidAccessKeyId": "unknown access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "wrong secret key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired: log in again",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "PreconditionFailed": CHANGED,
    "412": CHANGED,
    "NoSuchUpload": "another upload to the same place has ended this one: wait for it",
    "SlowDown": BUSY,
    "503": BUSY,
}


class StorageError(RuntimeError):
    """Something cannot be read or written; the text names the URL and what to do."""


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
    _split(url)
    return url.rstrip("/")


def place(url: str) -> dict[str, str]:
    """A URL as Step Functions names objects: its bucket and key; of a local file, its path.

    Raises:
        StorageError: as `absolute`.
    """
    url = absolute(url)
    if local_path(url) is not None:
        return {"path": url}
    bucket, key = _split(url)
    return {"bucket": bucket, "key": key}


def check_writable(url: str) -> None:
    """Refuse a folder that files cannot be written to, or a bucket that is not there; changes
    nothing.

    Raises:
        StorageError: it is, or is inside, a file, or is read-only; or there is no such bucket.
    """
    path = local_path(url)
    if path is None:
        bucket = _split(url)[0]
        return _ask_if_allowed("write to", url, lambda: client().head_bucket(Bucket=bucket))
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise StorageError(f"cannot write to {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {path}: no permission in {nearest}")


def remove(url: str) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    path = local_path(url)
    if path is None:
        bucket, key = _split(url)
        with s3_errors("remove", url):
            client().delete_object(Bucket=bucket, Key=key)
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
        return _read_object(url)
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
        Exception: what `do` has raised first; what has not begun by then never does.
    """
    with ThreadPoolExecutor(max(1, min(READERS, len(items))), "storage") as pool:
        return list(pool.map(do, items))


def write(url: str, data: bytes) -> None:
    """Write a file whole or not at all; folders are made as needed.

    Raises:
        StorageError: nothing was written, and an older file is as it was.
    """
    path = local_path(url)
    if path is None:
        bucket, key = _split(url)
        with s3_errors("write", url):
            client().put_object(Bucket=bucket, Key=key, Body=data)
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
        with s3_errors("list", url):
            return sorted(_s3_names(url))
    try:
        return sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {path}: {error.strerror}") from error


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


def version(url: str) -> str:
    """What changes with a file: ETag and time of an object, size and times of a local file.

    Raises:
        StorageError: missing, or not readable.
    """
    path = local_path(url)
    if path is not None:
        return "-".join(map(str, _version(_stat(path))))
    bucket, key = _split(url)
    with _s3_errors("read", url):
        head = _s3().head_object(Bucket=bucket, Key=key)
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
        self._bucket, self._key = _split(url)
        with s3_errors("read", url):
            head = client().head_object(Bucket=self._bucket, Key=self._key)
        super().__init__(url, head["ContentLength"], head.get("ETag", ""))
        self.requests = 1
        self._match = {"IfMatch": self.version} if self.version.strip('"') else {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = failures = 0
        while done < len(buffer):
            try:
                done += self._some(offset + done, buffer[done:])
            except _BrokenOff as broken:
                done, failures = done + broken.done, failures + 1
                _wait(self.url, failures, broken)

    def _some(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with s3_errors("read", self.url):
            body = self._ask(offset, len(buffer))
            try:
                while done < len(buffer) and (count := body.readinto(buffer[done:])):
                    done += count
            except _broken() as error:
                raise _BrokenOff(str(error), done) from error
            finally:
                self.bytes_read += done
        return done

    def _ask(self, offset: int, length: int) -> Any:
        last = offset + length - 1
        self.requests += 1
        answer = client().get_object(
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


def _broken() -> tuple[type[Exception], ...]:
    """What reading a body raises when the connection breaks, stalls, or ends too early."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    names = ("IncompleteReadError", "ReadTimeoutError", "ResponseStreamingError")
    return HTTPError, *(getattr(exceptions, name) for name in names)


def check_there(url: str) -> None:
    """Refuse an object that is not there. Of local files the machine that reads them knows more.

    Raises:
        StorageError: there is no such object or bucket.
    """
    if local_path(url) is None:
        bucket, key = _split(url)
        _ask_if_allowed("read", url, lambda: client().head_object(Bucket=bucket, Key=key))


def _ask_if_allowed(doing: str, url: str, ask: Callable[[], object]) -> None:
    """Ask ahead of the one who will do it, whose role may have rights that ours has not."""
    from botocore.exceptions import ClientError

    with s3_errors(doing, url):
        try:
            ask()
        except ClientError as error:
            if error.response["Error"]["Code"] != "403":
                raise


class _BrokenOff(Exception):
    """A body ended early, after so many bytes of it were `done`."""

    def __init__(self, what: str, done: int = 0) -> None:
        super().__init__(what)
        self.done = done


def _wait(url: str, failures: int, error: Exception) -> None:
    """Wait before another try to read a body, or raise if there were enough of them."""
    if failures == ATTEMPTS:
        raise StorageError(
            f"cannot read {url}: the connection broke off {ATTEMPTS} times "
            f"({error}): check the network, or try again later"
        ) from error
    time.sleep(0.05 * 2**failures)


def _read_object(url: str, failures: int = 0) -> bytes:
    bucket, key = _split(url)
    while True:
        with s3_errors("read", url):
            body = client().get_object(Bucket=bucket, Key=key)["Body"]
            try:
                data: bytes = body.read()
                return data
            except _broken() as error:
                failures += 1
                _wait(url, failures, error)


def _split(url: str) -> tuple[str, str]:
    parts = url.removeprefix("s3://").partition("/")
    if not parts[0]:
        raise StorageError(f"cannot use {url}: expected s3://bucket/key")
    return parts[0], parts[2]


def _s3_names(url: str) -> Iterator[str]:
    bucket, key = _split(url)
    prefix = f"{key.rstrip('/')}/" if key else ""
    pages = client().get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        yield from (item["Key"].removeprefix(prefix) for item in page.get("Contents", ()))
        yield from (item["Prefix"].removeprefix(prefix) for item in page.get("CommonPrefixes", ()))


def _lacks_bucket(url: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client().head_bucket(Bucket=_split(url)[0])
    except ClientError as error:
        return bool(error.response["Error"]["Code"] == "404")
    except BotoCoreError:
        pass
    return False


@cache
def client() -> Any:
    """boto3's client for S3, for what this module does not do; of this process."""
    from boto3.session import Session
    from botocore.config import Config

    # Checksums only where S3 demands them: servers other than AWS often know no trailers.
    config = Config(
        max_pool_connections=READERS,  # else those above ten are closed after each request
        connect_timeout=10,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", config=config)


@contextmanager
def s3_errors(doing: str, url: str) -> Iterator[None]:
    """The one place where boto3's errors become ours.

    Raises:
        StorageError: "cannot <doing> <url>: ..."
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code == "404":  # to a HEAD, whose answer has no body that says what is missing
            code = "NoSuchBucket" if _lacks_bucket(url) else "NoSuchKey"
        hint = HINTS.get(code, f"{code}: {error.response.get('Error', {}).get('Message', '')}")
        more = OR_MISSING if hint == DENIED and doing == "read" else ""
        raise StorageError(f"cannot {doing} {url}: {hint}{more}") from error
    except BotoCoreError as error:
        hint = "check AWS_ENDPOINT_URL, AWS_REGION and the credentials"
        raise StorageError(f"cannot {doing} {url}: {error} ({hint})") from error
