"""Files by URL: a plain path, file://, or s3://bucket/key.

S3 means any server that speaks it: endpoint, region and credentials come from the usual AWS_*
variables (AWS_ENDPOINT_URL among them). boto3 is imported when the first s3:// URL is used.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lambda_worker.atomic import replacing

HINTS = {
    "NoSuchKey": "no such object: check the name",
    "404": "no such object: check the name",
    "NoSuchBucket": "no such bucket: create it, or check the name and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied: check the credentials and the role's policy",
    "403": "access denied: check the credentials and the role's policy",
    "InvalidAccessKeyId": "unknown access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "wrong secret key: check AWS_SECRET_ACCESS_KEY",
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


def check_writable(url: str) -> None:
    """Refuse a folder on this machine that files cannot be written to; changes nothing.

    Raises:
        StorageError: it is, or is inside, a file, or is read-only.
    """
    path = local_path(url)
    if path is None:
        return  # only a write would tell
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
        with _s3_errors("remove", url):
            _s3().delete_object(Bucket=bucket, Key=key)
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
        bucket, key = _split(url)
        with _s3_errors("read", url):
            body: bytes = _s3().get_object(Bucket=bucket, Key=key)["Body"].read()
            return body
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def write(url: str, data: bytes) -> None:
    """Write a file whole or not at all; folders are made as needed.

    Raises:
        StorageError: nothing was written, and an older file is as it was.
    """
    path = local_path(url)
    if path is None:
        bucket, key = _split(url)
        with _s3_errors("write", url):
            _s3().put_object(Bucket=bucket, Key=key, Body=data)
        return
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name with no content
    except OSError as error:
        advice = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"{error.strerror}: {advice}choose another place") from error


def names(url: str) -> list[str]:
    """Sorted names directly in a folder, those of folders with a slash at the end.

    An S3 prefix that holds nothing and a folder that is not there give an empty list.

    Raises:
        StorageError: not readable.
    """
    path = local_path(url)
    if path is None:
        with _s3_errors("list", url):
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
    bucket, key = _split(url)
    path = folder / f"{bucket}/{key}"
    with _s3_errors("download", url):
        body = _s3().get_object(Bucket=bucket, Key=key)["Body"]
        with replacing(path) as partial, partial.open("wb") as file:
            for part in body.iter_chunks(1 << 20):
                file.write(part)
    return path


def open_ranged(url: str) -> io.BufferedReader:
    """A seekable file over an S3 object; only the ranges that are read are fetched.

    Raises:
        StorageError: the object is missing; reading raises it too.
    """
    # 64 KiB holds the zip directory and the pickle of a .pt file in two or three requests.
    return io.BufferedReader(_Ranged(url), 1 << 16)


class _Ranged(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        self._bucket, self._key = _split(url)
        with _s3_errors("read", url):
            head = _s3().head_object(Bucket=self._bucket, Key=self._key)
        self._size: int = head["ContentLength"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        with _s3_errors("read", self._url):
            answer = _s3().get_object(
                Bucket=self._bucket, Key=self._key, Range=f"bytes={self._at}-{stop - 1}"
            )
            data = answer["Body"].read()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _split(url: str) -> tuple[str, str]:
    parts = url.removeprefix("s3://").partition("/")
    if not parts[0]:
        raise StorageError(f"cannot use {url}: expected s3://bucket/key")
    return parts[0], parts[2]


def _s3_names(url: str) -> Iterator[str]:
    bucket, key = _split(url)
    prefix = f"{key.rstrip('/')}/" if key else ""
    pages = _s3().get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        yield from (item["Key"].removeprefix(prefix) for item in page.get("Contents", ()))
        yield from (item["Prefix"].removeprefix(prefix) for item in page.get("CommonPrefixes", ()))


@cache
def _s3() -> Any:
    from boto3.session import Session
    from botocore.config import Config

    # Checksums only where S3 demands them: servers other than AWS often know no trailers.
    config = Config(
        connect_timeout=10,
        retries={"mode": "standard", "max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", config=config)


@contextmanager
def _s3_errors(doing: str, url: str) -> Iterator[None]:
    """The one place where boto3's errors become ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        hint = HINTS.get(code, f"{code}: {error.response.get('Error', {}).get('Message', '')}")
        raise StorageError(f"cannot {doing} {url}: {hint}") from error
    except BotoCoreError as error:
        hint = "check AWS_ENDPOINT_URL, AWS_REGION and the credentials"
        raise StorageError(f"cannot {doing} {url}: {error} ({hint})") from error
