"""A rank reads its rows and no others, in little memory, and all from one version of the file."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lambda_worker import dataset, inference, reading, storage
from lambda_worker.reading import Shard
from lambda_worker.shard import Piece, balance
from lambda_worker.storage import StorageError
from tests.s3 import s3_client
from tests.support import in_thread
from tests.worker.faulty import Faulty
from tests.worker.sparse import sparse_pt
from tests.worker.worker_data import MakePt, tensors

ROW = 5 * 32 * 32 * 4 + 5 * 8 + 8
ROWS = 1278  # of a partition of 25 MB, as the reference has them


def read_all(shard: Shard, batch_size: int = 128) -> int:
    return sum(len(rows.redshift) for _, _, rows in shard.batches(batch_size))


@pytest.fixture
def served(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the bodies that the S3 server sends, as the server counts them."""
    from nanio.storage import filesystem

    lengths: list[int] = []
    original = filesystem._stream_pread

    def counted(path: Path, start: int, length: int, chunk: int) -> Any:
        lengths.append(length)
        return original(path, start, length, chunk)

    monkeypatch.setattr(filesystem, "_stream_pread", counted)
    return lengths


@pytest.mark.parametrize("world_size", [1, 4, 64])
@pytest.mark.parametrize("place", ["file", "object"])
def test_bytes_that_ranks_read(
    bucket: Path, served: list[int], place: str, world_size: int, tmp_path: Path
) -> None:
    sparse_pt(bucket / "a.pt", ROWS)
    url = "s3://bucket/a.pt" if place == "object" else str(bucket / "a.pt")
    together = 0
    for pieces in balance({url: ROWS}, world_size):
        served.clear()
        shard = Shard(pieces, tmp_path)
        assert read_all(shard) == len(shard)
        assert shard.bytes_read <= 1.02 * len(shard) * ROW + 65536
        assert shard.requests <= 9 + len(shard) * ROW / reading.BLOCK
        if place == "object":
            assert sum(served) == shard.bytes_read
            assert len(served) == shard.requests - 1  # one asks for the size
        together += shard.bytes_read
    assert together <= 1.05 * (bucket / "a.pt").stat().st_size


def test_objects_are_read_right(bucket: Path, make_pt: MakePt, tmp_path: Path) -> None:
    names = []
    for seed, wide in ((1, torch.float64), (2, torch.float32)):
        data = make_pt(f"{seed}.pt", 30, seed=seed, wide=wide).read_bytes()
        names.append(f"s3://bucket/right/{seed}.pt")
        storage.write(names[-1], data)
    shard = Shard([Piece(names[0], 20, 30), Piece(names[1], 0, 5)], tmp_path)
    first, second = tensors(30, seed=1, wide=torch.float64), tensors(30, seed=2)
    wanted = [torch.cat((x[20:], y[:5])) for x, y in zip(first, second, strict=True)]
    for start, stop, rows in shard.batches(4):
        for array, tensor in zip(rows, wanted, strict=True):
            assert np.array_equal(array, tensor[start:stop])
    assert list(tmp_path.glob("bucket")) == []  # nothing was downloaded whole


def test_old_object_is_downloaded_and_read_whole(bucket: Path, tmp_path: Path) -> None:
    content, path = TensorDataset(*tensors(5)), tmp_path / "old.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    storage.write("s3://bucket/old.pt", path.read_bytes())
    path.unlink()
    assert dataset.count("s3://bucket/old.pt") == 5
    shard = Shard([Piece("s3://bucket/old.pt", 3, 5)], tmp_path)
    assert np.array_equal(shard.batch(0, 2).images, content.tensors[0][3:])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def server(make_pt: MakePt, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """s3://bucket/a.pt, 200 rows, on a server that answers as it is told."""
    data = make_pt("a.pt", 200).read_bytes()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with (
        in_thread(Faulty(data)) as server,
        s3_client(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch),
    ):
        yield server


@pytest.mark.parametrize("faults", [["cut"], ["cut"] * 4, ["slow down"], ["", "cut", "slow down"]])
def test_what_passes_is_tried_again(server: Faulty, faults: list[str], tmp_path: Path) -> None:
    shard = Shard([Piece("s3://bucket/a.pt", 0, 200)], tmp_path)
    server.faults = faults
    read = np.concatenate([rows.images for _, _, rows in shard.batches(64)])
    assert np.array_equal(read, tensors(200)[0])
    assert server.faults == []


def test_a_body_that_breaks_off_goes_on_where_it_broke(server: Faulty) -> None:
    ranged = storage.open_ranged("s3://bucket/a.pt")
    server.faults = ["cut"]
    assert ranged.read(1000, 2000) == server.content[1000:3000]
    assert server.asked == ["bytes=1000-2999", "bytes=2000-2999"]
    assert ranged.bytes_read == 2000


def test_connections_are_used_again(server: Faulty, tmp_path: Path) -> None:
    assert read_all(Shard([Piece("s3://bucket/a.pt", 0, 200)], tmp_path)) == 200
    assert len(server.asked) > 5
    assert server.connections <= 2  # that of the thread that opens, and of the one that reads


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["cut"] * 5, "the connection broke off 5 times .*: check the network"),
        (["slow down"] * 8, "too many requests, even after waiting: use fewer ranks"),
        (["shifted"], "the server does not answer byte ranges as S3 does"),
        (["whole"], "the server does not answer byte ranges as S3 does"),
        (["short"], "the server does not answer byte ranges as S3 does"),
        (["other"], "it was changed while it was read: .* run again"),
    ],
)
def test_what_remains_is_named(
    server: Faulty, faults: list[str], message: str, tmp_path: Path
) -> None:
    shard = Shard([Piece("s3://bucket/a.pt", 0, 200)], tmp_path)
    server.faults = faults
    with pytest.raises(StorageError, match=rf"cannot read s3://bucket/a\.pt: {message}"):
        read_all(shard)
    assert readers() == []


def test_object_that_is_replaced_meanwhile(server: Faulty, tmp_path: Path) -> None:
    shard = Shard([Piece("s3://bucket/a.pt", 0, 200)], tmp_path)
    server.version = '"2"'
    with pytest.raises(StorageError, match="it was changed while it was read"):
        read_all(shard)


def test_object_that_is_replaced_on_a_server_without_if_match(
    bucket: Path, make_pt: MakePt, tmp_path: Path
) -> None:
    storage.write("s3://bucket/a.pt", make_pt("a.pt", 30, seed=1).read_bytes())
    shard = Shard([Piece("s3://bucket/a.pt", 0, 30)], tmp_path)
    storage.write("s3://bucket/a.pt", make_pt("a.pt", 30, seed=2).read_bytes())
    with pytest.raises(StorageError, match="it was changed while it was read"):
        read_all(shard)


@pytest.mark.parametrize("how", ["truncated", "overwritten", "replaced", "removed"])
def test_file_that_is_changed_meanwhile(make_pt: MakePt, tmp_path: Path, how: str) -> None:
    path = make_pt("a.pt", 1000)
    shard = Shard([Piece(str(path), 0, 1000)], tmp_path)
    batches = shard.batches(128)
    next(batches)
    if how == "truncated":  # a mapped file would end this process
        os.truncate(path, 1000)
    elif how == "overwritten":
        with path.open("r+b") as file:
            file.write(b"x")
    elif how == "replaced":
        make_pt("b.pt", 1000, seed=1).replace(path)
    else:
        path.unlink()
    message = "No such file" if how == "removed" else "it was changed while it was read"
    with pytest.raises(StorageError, match=rf"cannot read .*a\.pt: {message}"):
        list(batches)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_next_block_is_read_while_this_one_is_in_use(
    make_pt: MakePt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 1)  # a block is a batch
    shard = Shard([Piece(str(make_pt("a.pt", 4)), 0, 4)], tmp_path)
    done = [threading.Event() for _ in range(4)]
    block = shard._block

    def told(start: int, stop: int) -> tuple[int, reading.Rows]:
        try:
            return block(start, stop)
        finally:
            done[start].set()

    monkeypatch.setattr(shard, "_block", told)
    for start, _, _ in shard.batches(1):
        assert done[min(start + 1, 3)].wait(5)
        assert not any(event.is_set() for event in done[start + 2 :])  # one block ahead, no more
    assert readers() == []


def test_reader_ends_with_a_loop_that_is_left(make_pt: MakePt, tmp_path: Path) -> None:
    shard = Shard([Piece(str(make_pt("a.pt", 1000)), 0, 1000)], tmp_path)

    def fail(images: object, magnitudes: object) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inference.run(fail, shard, 1)
    assert readers() == []
    batches = shard.batches(1)
    next(batches)
    assert readers() != []
    del batches
    gc.collect()
    assert readers() == []


def test_flaws_are_known_without_reading_again(
    bucket: Path, served: list[int], tmp_path: Path
) -> None:
    rows = tensors(20)
    rows[0][3, 1, 2, 3] = torch.nan
    rows[1][3] = rows[1][5] = torch.inf
    rows[2][7] = -1
    torch.save(TensorDataset(*rows), tmp_path / "a.pt")
    storage.write("s3://bucket/flaws.pt", (tmp_path / "a.pt").read_bytes())
    shard = Shard([Piece("s3://bucket/flaws.pt", 2, 20)], tmp_path)
    expected = {1: "images", 3: "magnitudes", 5: "redshift"}
    assert {row: flaw for row in (0, 1, 3, 5) if (flaw := shard.flaw(row))} == expected
    read_all(shard)
    served.clear()
    assert {row: flaw for row in range(18) if (flaw := shard.flaw(row))} == expected
    assert served == []


LIMITED = """
import sys, resource
from pathlib import Path
import numpy
from lambda_worker.dataset import count
from lambda_worker.reading import Piece, Shard

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

url, rows = sys.argv[1], count(sys.argv[1])
shard = Shard([Piece(url, 0, rows)], Path("/"))
before, most, seen = private(), 0.0, 0
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
for start, stop, part in shard.batches(128):
    seen += len(part.redshift)
    if start % 1280 == 0: most = max(most, private() - before)
assert seen == rows
print(round(most, 1))
"""


def private_growth(url: str) -> float:
    """MiB of private memory that reading a file takes in a process with 512 MiB of addresses."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, url]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    sparse_pt(tmp_path / "a.pt", 50_000)  # 1 GB
    assert private_growth(str(tmp_path / "a.pt")) < 3 * 8 + 12


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["file", "object"])
@pytest.mark.parametrize("gigabytes", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_gigabytes_within_512_mb(bucket: Path, gigabytes: int, place: str) -> None:
    sparse_pt(bucket / "big.pt", gigabytes * 49_000)
    url = "s3://bucket/big.pt" if place == "object" else str(bucket / "big.pt")
    assert private_growth(url) < 3 * 8 + 20
    (bucket / "big.pt").unlink()


def test_edges_of_batches_do_not_matter(make_pt: MakePt, tmp_path: Path) -> None:
    """Small windows and blocks, over files: every row once, and no byte twice."""
    names = [str(make_pt(f"{seed}.pt", 23, seed=seed)) for seed in (1, 2)]
    pieces = [Piece(names[0], 2, 23), Piece(names[1], 1, 20), Piece(names[0], 0, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "WINDOW", 7 * 20)
        patch.setattr(reading, "BLOCK", 5 * ROW)
        shard = Shard(pieces, tmp_path)
        before, parts = shard.bytes_read, list(shard.batches(2))
    assert [(start, stop) for start, stop, _ in parts] == list(pairwise([*range(0, 42, 2), 42]))
    got = np.concatenate([rows.magnitudes for _, _, rows in parts])
    one, two = tensors(23, seed=1)[1], tensors(23, seed=2)[1]
    assert np.array_equal(got, torch.cat((one[2:], two[1:20], one[:2])))
    assert shard.bytes_read - before == 42 * (5 * 32 * 32 * 4 + 5 * 4 + 4)
