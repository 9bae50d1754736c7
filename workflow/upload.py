"""What ``cosmic data upload`` does: files into a bucket, those that are not there yet."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_worker import dataset, storage
from lambda_worker.storage import s3

if TYPE_CHECKING:
    from s3transfer.manager import TransferManager

__all__ = ["UploadError", "Uploaded", "upload"]

_FILES = 4  # at the same time; boto3's transfer manager sends ten parts of them at a time
_PART = 16 << 20  # bytes; larger files go up in parts of so many, each of which is tried again
_CHUNK = 1 << 20


class UploadError(ValueError):
    """These files cannot go there; the text says what to do."""


@dataclass(frozen=True)
class Uploaded:
    """What an upload came to.

    ``place`` is the URL of the folder; ``sent`` the names of the files that were not there yet;
    ``rows`` those of a dataset, else None.
    """

    place: str
    files: int
    bytes: int
    sent: tuple[str, ...]
    rows: int | None


def upload(
    source: Path, place: str, is_dataset: bool, progress: Callable[[int, int], None]
) -> Uploaded:
    """Upload a file, or what is in a folder, unless it is there with the same size and SHA-256.

    The checksum stands in the metadata of the object, as ``sha256``.

    Args:
        source: hidden files in it are left out.
        place: ``s3://bucket/prefix``, of the folder.
        is_dataset: the .pt files directly in the folder, which have to be usable, and no others;
            and no others may be there.
        progress: called with the bytes that are there, and all bytes.

    Raises:
        UploadError: see there. DatasetError: a file is no dataset.
        StorageError, OSError: a file cannot be read or written; no part of it is then left in the
            bucket. Those that are there by then stay, and the same call goes on from there.
    """
    files = _files(source, is_dataset)
    rows = None
    if is_dataset:
        rows = sum(storage.in_parallel(dataset.count, [str(path) for path in files.values()]))
    if rows == 0:
        raise UploadError(f"{source}: has no rows")
    storage.check_writable(place)
    there = _listed(place)
    if is_dataset:
        _check_alone(place, files, there)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if any(size >= _PART for size in sizes.values()):
        _abort_unfinished(place, set(files))
    sent = _Sending(place, files, sizes, there, progress).run()
    return Uploaded(place, len(files), sum(sizes.values()), sent, rows)


def _files(source: Path, is_dataset: bool) -> dict[str, Path]:
    """The files by their names in the bucket."""
    if not source.exists():
        raise UploadError(f"{source}: no such file or folder")
    if source.is_file():
        files = {source.name: source}
    else:
        found = sorted(source.glob("*.pt") if is_dataset else source.rglob("*"))
        files = {p.relative_to(source).as_posix(): p for p in found if p.is_file()}
        files = {name: p for name, p in files.items() if not f"/{name}".count("/.")}
    if is_dataset:
        files = {name: path for name, path in files.items() if name.endswith(".pt")}
    if not files:
        raise UploadError(f"{source}: no {'.pt ' if is_dataset else ''}file in it")
    return files


def _listed(place: str) -> dict[str, int]:
    """Names below a place, and their sizes."""
    prefix = s3.folder(place)[1]
    with s3.errors("list", place):
        return {
            item["Key"].removeprefix(prefix): item["Size"]
            for page in s3.pages(place)
            for item in page.get("Contents", ())
        }


def _check_alone(place: str, files: Mapping[str, Path], there: Mapping[str, int]) -> None:
    others = sorted(name for name in there if name.endswith(".pt") and "/" not in name)
    if others := [name for name in others if name not in files]:
        count = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise UploadError(
            f"{place}: holds {others[0]}{count}, not of this dataset, and all .pt files of a "
            "folder are one: upload its folder as a whole, or remove them, or choose another place"
        )


def _abort_unfinished(place: str, names: set[str]) -> None:
    """End uploads to these names that somebody has left half done: their parts are charged for."""
    from botocore.exceptions import ClientError

    bucket, prefix = s3.folder(place)
    client = s3.client()
    try:
        pages = client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Uploads", ()):
                if item["Key"].removeprefix(prefix) in names:
                    client.abort_multipart_upload(
                        Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"]
                    )
    except ClientError as error:
        # Who may write need not be allowed to list them; and not every server knows them.
        if error.response["Error"]["Code"] not in ("AccessDenied", "403", "NotImplemented", "501"):
            with s3.errors("list the unfinished uploads to", place):
                raise


class _Sending:
    """Uploads some files at a time, and ends all when one fails."""

    def __init__(
        self,
        place: str,
        files: Mapping[str, Path],
        sizes: Mapping[str, int],
        there: Mapping[str, int],
        progress: Callable[[int, int], None],
    ) -> None:
        self._place, self._files, self._sizes, self._there = place, files, sizes, there
        self._bucket, self._prefix = s3.folder(place)
        self._of, self._done = sum(sizes.values()), 0
        self._tell, self._lock, self._stopped = progress, threading.Lock(), threading.Event()

    def run(self) -> tuple[str, ...]:
        """Names of the files that were not there yet."""
        from boto3.s3.transfer import TransferConfig
        from s3transfer.manager import TransferManager

        config = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART)
        # The manager ends first: it cancels what it sends if there was an error, and then the
        # threads that wait for that end, too.
        with (
            ThreadPoolExecutor(_FILES, "upload") as pool,
            TransferManager(s3.client(), config) as manager,
        ):
            waiting = {pool.submit(self._one, name, manager): name for name in self._files}
            try:
                return tuple(waiting[each] for each in as_completed(waiting) if each.result())
            except BaseException:
                self._stopped.set()
                for each in waiting:
                    each.cancel()
                raise

    def _one(self, name: str, manager: TransferManager) -> bool:
        """Upload a file; False if it is there."""
        path, size = self._files[name], self._sizes[name]
        before, url = path.stat(), f"{self._place}/{name}"
        digest = self._digest(path)
        with s3.errors("write", url):
            if self._there.get(name) == size and self._metadata(name).get("sha256") == digest:
                self._count(size)
                return False
            manager.upload(
                str(path),
                self._bucket,
                self._prefix + name,
                extra_args={"Metadata": {"sha256": digest}},
                subscribers=[_subscriber(self._count)],
            ).result()
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UploadError(f"{path}: was changed while it was uploaded: run again")
        return True

    def _metadata(self, name: str) -> dict[str, str]:
        head = s3.client().head_object(Bucket=self._bucket, Key=self._prefix + name)
        found: dict[str, str] = head["Metadata"]
        return found

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while chunk := file.read(_CHUNK):
                if self._stopped.is_set():
                    raise CancelledError
                digest.update(chunk)
        return digest.hexdigest()

    def _count(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._tell(self._done, self._of)


def _subscriber(count: Callable[[int], None]) -> Any:
    from s3transfer.subscribers import BaseSubscriber

    class Subscriber(BaseSubscriber):
        def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
            count(bytes_transferred)

    return Subscriber()
