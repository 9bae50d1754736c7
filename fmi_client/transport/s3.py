"""S3, for all that use it here: a client, its errors in our words, bodies that break off.

boto3 (extra ``s3``) is imported when the client is first used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

ATTEMPTS = 5  # to get a body whole, whose connection breaks off
ANSWER_SECONDS = 10.0  # S3 answers within 0.2 s: asked again, it may be another server that does
SLOWEST = 10_000  # bytes per second: what comes slower than that for so long does not come
PIECE = 1 << 18  # bytes of a body that are taken at once, if so many are there
CONNECTIONS = 16  # kept open; those above are closed after each request
NOT_INSTALLED = "cannot use S3 without boto3: pip install 'cosmic-fmi[s3]'"
CHANGED = "it was changed while it was read: leave data alone during a run, and run again"
DENIED = "access denied: check the credentials and the role's policy"
# What S3 answers about an object that is not there to those who may not list the bucket.
OR_MISSING = " (or the name: S3 answers so, too, if there is no such object)"
BUSY = "too many requests, even after waiting: use fewer ranks, or try again later"
FAILED = "the server failed at it TIMES: try again later"
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


class BrokenOff(Exception):
    """A body ended early, after so many bytes of it were `done`."""

    def __init__(self, what: str, done: int = 0) -> None:
        super().__init__(what)
        self.done = done


class S3:
    """boto3's client, made when it is first used, and what boto3 leaves to its callers.

    Several threads may use it.

    Args:
        error: the class of all that is raised here; its text names the URL and what to do.
        tries: of a request; default: what AWS_MAX_ATTEMPTS says, or boto3.
    """

    def __init__(self, error: type[Exception], tries: int | None = None) -> None:
        self._error, self._tries = error, tries
        self._times = f"{tries} times" if tries else "each time"
        self._lock = threading.Lock()
        self._client: Any = None

    def client(self) -> Any:
        """boto3's client, for what this class does not do.

        Raises:
            Exception: `error`; boto3 is not installed, or the environment makes no sense to it.
        """
        with self._lock:
            if self._client is None:
                self._client = self._connected()
            return self._client

    def close(self) -> None:
        """Close the client; the next use makes another one."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> Any:
        try:
            from boto3.session import Session
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ModuleNotFoundError:
            raise self._error(NOT_INSTALLED) from None
        retries: Any = {"mode": "standard", "total_max_attempts": self._tries}
        # Checksums only where S3 demands them: servers other than AWS often know no trailers.
        config = Config(
            max_pool_connections=CONNECTIONS,
            connect_timeout=ANSWER_SECONDS,
            read_timeout=ANSWER_SECONDS,
            retries=retries if self._tries else None,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            hint = "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and AWS_PROFILE"
            raise self._error(f"cannot use S3: {error} ({hint})") from error

    def split(self, url: str) -> tuple[str, str]:
        """Bucket and key of s3://bucket/key."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise self._error(f"cannot use {url}: expected s3://bucket/key")
        return bucket, key

    def folder(self, url: str) -> tuple[str, str]:
        """Bucket, and prefix with a slash at its end unless it is empty."""
        bucket, key = self.split(url)
        return bucket, f"{key.rstrip('/')}/" if key else ""

    def pages(self, url: str, **options: str) -> Iterator[Any]:
        """What S3 answers about the objects below a folder; to be read within `errors`."""
        bucket, prefix = self.folder(url)
        pages = self.client().get_paginator("list_objects_v2")
        yield from pages.paginate(Bucket=bucket, Prefix=prefix, **options)

    def read(self, url: str, check: Callable[[int], None] = lambda size: None) -> bytes:
        """All bytes of an object, asked for again if they break off; call it within `errors`.

        Args:
            check: called with the object's size before it is read; may raise.
        """
        bucket, key = self.split(url)
        failures = 0
        while True:
            answer = self.client().get_object(Bucket=bucket, Key=key)
            with closing(answer["Body"]) as body:
                size = answer.get("ContentLength")  # not of every server
                check(size or 0)
                try:
                    data = b"".join(self.pieces(body))
                    if size is None or len(data) == size:
                        return data
                    raise BrokenOff(f"{len(data):,} of {size:,} bytes came")
                except BrokenOff as error:
                    failures += 1
                    self.wait(url, failures, error)

    def pieces(self, body: Any) -> Iterator[bytes]:
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
        except _broken() as error:
            raise BrokenOff(str(error), done) from error

    def wait(self, url: str, failures: int, error: Exception) -> None:
        """Wait before another try to read a body, or raise if there were enough of them."""
        if failures == ATTEMPTS:
            raise self._error(
                f"cannot read {url}: the connection broke off {ATTEMPTS} times "
                f"({error}): check the network, or try again later"
            ) from error
        time.sleep(0.05 * 2**failures)

    @contextmanager
    def errors(self, doing: str, url: str) -> Iterator[None]:
        """The one place where boto3's errors become ours: "cannot <doing> <url>: ..."."""
        try:
            from botocore import exceptions
        except ModuleNotFoundError:
            raise self._error(NOT_INSTALLED) from None
        try:
            yield
        except exceptions.ClientError as error:
            raise self._error(f"cannot {doing} {url}: {self._hint(error, doing, url)}") from error
        except exceptions.BotoCoreError as error:
            hint = "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"
            there = exceptions.ReadTimeoutError, exceptions.ConnectionClosedError
            if isinstance(error, there):  # somebody is there
                hint = f"{self._times}: check the network, or try again later"
            raise self._error(f"cannot {doing} {url}: {error} ({hint})") from error

    def _hint(self, error: Any, doing: str, url: str) -> str:
        told = error.response.get("Error", {})
        code = told.get("Code", "")
        if code == "404":  # to a HEAD, whose answer has no body that says what is missing
            code = "NoSuchBucket" if self._lacks_bucket(url) else "NoSuchKey"
        hint = HINTS.get(code, f"{code}: {told.get('Message', '')}").replace("TIMES", self._times)
        return hint + (OR_MISSING if hint == DENIED and doing == "read" else "")

    def _lacks_bucket(self, url: str) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client().head_bucket(Bucket=self.split(url)[0])
        except ClientError as error:
            return bool(error.response["Error"]["Code"] == "404")
        except BotoCoreError:
            pass
        return False


def _broken() -> tuple[type[Exception], ...]:
    """What reading a body raises when the connection breaks, stalls, or ends too early."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    names = ("IncompleteReadError", "ReadTimeoutError", "ResponseStreamingError")
    return HTTPError, *(getattr(exceptions, name) for name in names)
