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
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from fmi_client.errors import ProtocolError, RendezvousError
from fmi_client.protocol.peer import Buffer

CONNECT_SECONDS, READ_SECONDS = 5, 20
"""How long one request to S3 may take to connect, and to go on."""

MAX_NAMES = 1_000_000
"""So many names of one folder are looked at; more are no job's."""

CREATES = 5
"""Times that a file's folder is made: whoever clears up may remove it again, being empty."""

READS = 3
"""A body that breaks off is asked for again; boto3 repeats the rest of a request itself."""

_HINTS = {
    "NoSuchBucket": "no such bucket: create it, or check the name and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied: check the credentials and the role's policy",
    "403": "access denied: check the credentials and the role's policy",
    "InvalidAccessKeyId": "unknown access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "wrong secret key: check AWS_SECRET_ACCESS_KEY",
}


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
                _check_size(name, os.fstat(file.fileno()).st_size, limit)
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
        self._bucket, _, prefix = where.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _client()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        with self._errors("write", name):
            self._client.put_object(**self._key(name), Body=b"".join(parts))

    def get(self, name: str, limit: int) -> bytes | None:
        with self._errors("read", name):
            for last in [False] * (READS - 1) + [True]:
                with contextlib.suppress(*() if last else _broken_off()):
                    return self._get(name, limit)
        raise AssertionError("the last attempt returns or raises")

    def _get(self, name: str, limit: int) -> bytes | None:
        try:
            answer = self._client.get_object(**self._key(name))
        except self._client.exceptions.NoSuchKey:
            return None
        with contextlib.closing(answer["Body"]) as body:
            _check_size(name, answer["ContentLength"], limit)
            data: bytes = body.read()
        return data

    def delete(self, name: str) -> None:
        with self._errors("delete", name):
            self._client.delete_object(**self._key(name))

    def names(self, folder: str) -> list[str]:
        start = f"{self._prefix}{folder}/"
        with self._errors("list", folder):
            found = itertools.islice(self._keys(start, Delimiter="/"), MAX_NAMES)
            return [key.removeprefix(start) for key in found]

    def clear(self, folder: str) -> None:
        with self._errors("delete", folder):
            keys = list(self._keys(f"{self._prefix}{folder}/"))
            for at in range(0, len(keys), 1000):  # as many as one request may name
                batch = [{"Key": key} for key in keys[at : at + 1000]]
                self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch})

    def close(self) -> None:
        self._client.close()

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _keys(self, prefix: str, **options: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, **options):
            yield from (item["Key"] for item in page.get("Contents", ()))

    @contextlib.contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        """The one place where boto3's errors become ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"s3://{self._bucket}/{self._prefix}{name}"
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            why = error.response.get("Error", {}).get("Message", "")
            hint = _HINTS.get(code, f"{code}: {why}")
            raise RendezvousError(f"cannot {doing} {where}: {hint}") from error
        except BotoCoreError as error:
            hint = "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"
            raise RendezvousError(f"cannot {doing} {where}: {error} ({hint})") from error


def _client() -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise RendezvousError(
            "an s3:// store needs boto3: pip install 'cosmic-fmi[s3]'", op="connect"
        ) from None
    # Checksums only where S3 demands them: servers other than AWS often know no trailers.
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise RendezvousError(f"cannot use S3: {error}", op="connect") from error


def _broken_off() -> tuple[type[Exception], ...]:
    from botocore import exceptions

    return (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
    )


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ProtocolError(f"object {name} has {size} bytes; at most {limit} are expected")


@contextlib.contextmanager
def _folder_errors(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RendezvousError(f"cannot {doing} {path}: {error.strerror}") from error
