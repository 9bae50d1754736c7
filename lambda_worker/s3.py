"""What S3 needs beside its URLs: a client, its errors in our words, bodies that break off.

boto3 is imported when the client is first used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIES = 8  # of a request: where the answer is SlowDown, they take up to 70 s, on average 35
ATTEMPTS = 5  # to get a body whole, whose connection breaks off
ANSWER_SECONDS = 10.0  # S3 answers within 0.2 s: asked again, it may be another server that does
SLOWEST = 10_000  # bytes per second: what comes slower than that for so long does not come
PIECE = 1 << 18  # bytes of a body that are taken at once, if so many are there
READERS = 16  # concurrent requests: an S3 GET waits some 20 ms, and there may be thousands
CHANGED = "it was changed while it was read: leave data alone during a run, and run again"
DENIED = "access denied: check the credentials and the role's policy"
# What S3 answers about an object that is not there to those who may not list the bucket.
OR_MISSING = " (or the name: S3 answers so, too, if there is no such object)"
BUSY = "too many requests, even after waiting: use fewer ranks, or try again later"
FAILED = f"the server failed at it {TRIES} times: try again later"
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
    **dict.fromkeys(("InternalError", "500", "502", "504"), FAILED),
}


class StorageError(RuntimeError):
    """Something cannot be read or written; the text names the URL and what to do."""


def broken() -> tuple[type[Exception], ...]:
    """What reading a body raises when the connection breaks, stalls, or ends too early."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    names = ("IncompleteReadError", "ReadTimeoutError", "ResponseStreamingError")
    return HTTPError, *(getattr(exceptions, name) for name in names)


def ask_if_allowed(doing: str, url: str, ask: Callable[[], object]) -> None:
    """Ask ahead of the one who will do it, whose role may have rights that ours has not."""
    from botocore.exceptions import ClientError

    with errors(doing, url):
        try:
            ask()
        except ClientError as error:
            if error.response["Error"]["Code"] != "403":
                raise


class BrokenOff(Exception):
    """A body ended early, after so many bytes of it were `done`."""

    def __init__(self, what: str, done: int = 0) -> None:
        super().__init__(what)
        self.done = done


def pieces(body: Any) -> Iterator[bytes]:
    """A body as it comes, to its end.

    Raises:
        BrokenOff: the connection breaks or stalls, or a trickle comes that would take days.
    """
    # As much as is there: botocore's own `read` waits until all that is asked for has come.
    read, done = getattr(body._raw_stream, "read1", body.read), 0
    since, before = time.monotonic(), 0
    try:
        while piece := read(PIECE):
            yield piece
            done, seconds = done + len(piece), time.monotonic() - since
            if seconds > ANSWER_SECONDS and done - before < SLOWEST * seconds:
                body.close()  # else the connection would be used again
                raise BrokenOff(f"{done - before:,} bytes came in {seconds:.0f} s", done)
            if seconds > ANSWER_SECONDS:
                since, before = time.monotonic(), done
    except broken() as error:
        raise BrokenOff(str(error), done) from error


def wait(url: str, failures: int, error: Exception) -> None:
    """Wait before another try to read a body, or raise if there were enough of them."""
    if failures == ATTEMPTS:
        raise StorageError(
            f"cannot read {url}: the connection broke off {ATTEMPTS} times "
            f"({error}): check the network, or try again later"
        ) from error
    time.sleep(0.05 * 2**failures)


def read_object(url: str, failures: int = 0) -> bytes:
    bucket, key = split(url)
    while True:
        with errors("read", url):
            answer = client().get_object(Bucket=bucket, Key=key)
            try:
                data = b"".join(pieces(answer["Body"]))
                if len(data) != answer.get("ContentLength", len(data)):
                    raise BrokenOff(f"{len(data):,} of {answer['ContentLength']:,} bytes came")
                return data
            except BrokenOff as error:
                failures += 1
                wait(url, failures, error)


def split(url: str) -> tuple[str, str]:
    parts = url.removeprefix("s3://").partition("/")
    if not parts[0]:
        raise StorageError(f"cannot use {url}: expected s3://bucket/key")
    return parts[0], parts[2]


def folder(url: str) -> tuple[str, str]:
    """Bucket, and prefix with a slash at its end unless it is empty."""
    bucket, key = split(url)
    return bucket, f"{key.rstrip('/')}/" if key else ""


def names(url: str) -> Iterator[str]:
    bucket, prefix = folder(url)
    pages = client().get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        yield from (item["Key"].removeprefix(prefix) for item in page.get("Contents", ()))
        yield from (item["Prefix"].removeprefix(prefix) for item in page.get("CommonPrefixes", ()))


def _lacks_bucket(url: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client().head_bucket(Bucket=split(url)[0])
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
        connect_timeout=ANSWER_SECONDS,
        read_timeout=ANSWER_SECONDS,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", config=config)


@contextmanager
def errors(doing: str, url: str) -> Iterator[None]:
    """The one place where boto3's errors become ours.

    Raises:
        StorageError: "cannot <doing> <url>: ..."
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionClosedError,
        ReadTimeoutError,
    )

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
        hint = "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"
        if isinstance(error, ReadTimeoutError | ConnectionClosedError):  # somebody is there
            hint = f"{TRIES} times: check the network, or try again later"
        raise StorageError(f"cannot {doing} {url}: {error} ({hint})") from error
