"""`cosmic data split`: bit for bit, whole or not at all, and on from where it stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from lambda_worker import dataset
from lambda_worker.dataset import DatasetError
from lambda_worker.reading import Shard
from lambda_worker.shard import Piece
from tests.s3 import Trouble, s3_client, serve_s3
from tests.worker.sparse import sparse_pt
from tests.worker.worker_data import tensors
from workflow import ptwriter
from workflow.alone import Taken
from workflow.cli import app
from workflow.split import PLAN, Cut, SplitError, split

ROWS = 103


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images float32, magnitudes float64 and redshift float32, as `cosmic data make` has them."""
    images, magnitudes, redshift = tensors(ROWS)
    path = tmp_path / "all.pt"
    torch.save(TensorDataset(images, magnitudes.double(), redshift), path)
    return path


def ignore(done: int, of: int) -> None:
    pass


def load(path: Path, **options: Any) -> tuple[torch.Tensor, ...]:
    with torch.serialization.safe_globals([TensorDataset]):
        loaded = torch.load(path, weights_only=True, **options)
    assert type(loaded) is TensorDataset
    return loaded.tensors


def partitions(folder: Path) -> list[Path]:
    count = len(list(folder.glob("*.pt")))
    return [folder / f"{number}.pt" for number in range(1, count + 1)]


def same(files: list[Path], folder: Path) -> bool:
    """Do the partitions hold the same bits, in the same number formats?"""
    wanted = [torch.cat(column) for column in zip(*map(load, files), strict=True)]
    got = [torch.cat(column) for column in zip(*map(load, partitions(folder)), strict=True)]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in zip(wanted, got, strict=True)
    )


@pytest.mark.parametrize(
    ("cut", "rows"),
    [
        (Cut(rows=40), [40, 40, 23]),
        (Cut(rows=1000), [103]),
        (Cut(parts=1), [103]),
        (Cut(parts=4), [25, 26, 26, 26]),
        (Cut(parts=ROWS), [1] * ROWS),
        (Cut(mb=1), [48, 48, 7]),  # of 20,524 bytes each
    ],
)
def test_cuts(source: Path, tmp_path: Path, cut: Cut, rows: list[int]) -> None:
    done = split(str(source), tmp_path / "out", cut, ignore)
    files = partitions(tmp_path / "out")
    assert [len(load(path)[2]) for path in files] == rows
    assert same([source], tmp_path / "out")
    assert (done.parts, done.kept, done.rows) == (len(rows), 0, ROWS)
    assert cut.mb is None or max(path.stat().st_size for path in files) <= cut.mb * 1e6


def test_bits_of_nan_and_zero_stay(tmp_path: Path) -> None:
    images, magnitudes, redshift = tensors(4)
    images.view(torch.int32)[0, 0, 0, :4] = torch.tensor([0x7FC12345, -1, -(2**31), 1])
    torch.save(TensorDataset(images, magnitudes, redshift), tmp_path / "all.pt")
    split(str(tmp_path / "all.pt"), tmp_path / "out", Cut(rows=3), ignore)
    assert same([tmp_path / "all.pt"], tmp_path / "out")


def test_small_blocks_and_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is one dataset in natural order; blocks end anywhere."""
    monkeypatch.setattr("workflow.split.BLOCK", 7 * 20_480)
    monkeypatch.setattr(dataset, "WINDOW", 100)
    files = [tmp_path / "in" / f"{number}.pt" for number in (2, 9, 10)]
    (tmp_path / "in").mkdir()
    for seed, path in enumerate(files):
        torch.save(TensorDataset(*tensors(11 + seed, seed=seed)), path)
    split(str(tmp_path / "in"), tmp_path / "out", Cut(rows=10), ignore)
    assert same(files, tmp_path / "out")


def test_files_that_are_read_whole(tmp_path: Path) -> None:
    """PyTorch's old format, and bfloat16, which numpy has not."""
    images, magnitudes, redshift = tensors(9)
    path = tmp_path / "all.pt"
    content = TensorDataset(images.bfloat16(), magnitudes, redshift)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    split(str(path), tmp_path / "out", Cut(rows=4), ignore)
    got = [
        torch.cat(column) for column in zip(*map(load, partitions(tmp_path / "out")), strict=True)
    ]
    assert torch.equal(got[0], images.bfloat16().float())
    assert torch.equal(got[1], magnitudes)


def test_files_are_laid_out_as_torch_does(source: Path, tmp_path: Path) -> None:
    split(str(source), tmp_path / "out", Cut(parts=1), ignore)
    path = tmp_path / "out" / "1.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums and all
    mapped = load(path, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped)
    numbers = sum(tensor.numpy().nbytes for tensor in mapped)
    assert numbers < path.stat().st_size < numbers + ptwriter.OVERHEAD
    shard = Shard([Piece(str(path), 50, 60)], tmp_path)
    assert np.array_equal(shard.batch(0, 10).images, load(source)[0][50:60])


def test_same_input_same_bytes(source: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        split(str(source), tmp_path / out, Cut(rows=100), ignore)
    assert (tmp_path / "a/2.pt").read_bytes() == (tmp_path / "b/2.pt").read_bytes()


@pytest.mark.parametrize("size", [0xFFFFFFFF + 1])
def test_more_than_four_gigabytes_have_their_sizes_in_64_bits(tmp_path: Path, size: int) -> None:
    rows = size // 20_480 + 1
    block = np.zeros((1000, 5, 32, 32), np.float32)

    class Sparse:
        """A file that keeps no zeros."""

        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")

        def write(self, data: Any) -> int:
            if len(data) < 1 << 20:
                return self.file.write(data)
            self.file.seek(len(data), os.SEEK_CUR)
            return len(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def blocks() -> Any:
        left = rows
        while left:
            yield block[: min(left, 1000)]
            left -= min(left, 1000)
        yield np.zeros((rows, 5), np.float32)
        yield np.zeros(rows, np.float32)

    file: Any = Sparse(tmp_path / "a.pt")
    ptwriter.write_pt(file, rows, [np.dtype("float32")] * 3, blocks())
    file.close()
    assert dataset.count(str(tmp_path / "a.pt")) == rows
    assert load(tmp_path / "a.pt", mmap=True)[0].shape == (rows, 5, 32, 32)


COMMAND = [sys.executable, "-m", "workflow", "data", "split"]


def test_killed_split_goes_on(tmp_path: Path) -> None:
    sparse_pt(tmp_path / "all.pt", 3000)
    out = tmp_path / "out"
    command = [*COMMAND, str(tmp_path / "all.pt"), "--out", str(out), "--rows", "10"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (out / "20.pt").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    there = {path: path.stat().st_mtime_ns for path in partitions(out)}
    assert 20 <= len(there) < 300
    assert all(dataset.count(str(path)) == 10 for path in there)
    (out / ".21.pt.1.part").write_bytes(b"half")
    done = split(str(tmp_path / "all.pt"), out, Cut(rows=10), ignore)
    assert (done.parts, done.kept) == (300, len(there))
    assert {path: path.stat().st_mtime_ns for path in there} == there  # not written again
    assert len(partitions(out)) == 300
    assert list(out.glob(".*")) == []


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the first is that of the plan
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"3\.pt: No space left .*: make room, and give the same"):
            split(str(source), tmp_path / "out", Cut(rows=20), ignore)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.pt", "2.pt", PLAN]
    assert split(str(source), tmp_path / "out", Cut(rows=20), ignore).kept == 2
    assert same([source], tmp_path / "out")


def test_no_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
        with pytest.raises(SplitError, match="2 MB are still to be written, and 1 MB are free"):
            split(str(source), tmp_path / "out", Cut(rows=20), ignore)
    assert partitions(tmp_path / "out") == []
    split(str(source), tmp_path / "out", Cut(parts=2), ignore)  # it may be cut otherwise then


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    def second(done: int, of: int) -> None:
        with pytest.raises(Taken, match="out: another process is writing there: wait"):
            split(str(source), tmp_path / "out", Cut(rows=20), ignore)

    split(str(source), tmp_path / "out", Cut(rows=20), second)
    assert same([source], tmp_path / "out")


def test_what_is_not_of_this_split_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "7.pt").write_bytes(b"mine")
    with pytest.raises(SplitError, match=r"holds 7\.pt already, and all .* are one dataset"):
        split(str(source), out, Cut(rows=20), ignore)
    (out / "7.pt").unlink()
    split(str(source), out, Cut(rows=20), ignore)
    with pytest.raises(SplitError, match="holds another split, or one of a file that was changed"):
        split(str(source), out, Cut(rows=21), ignore)
    torch.save(TensorDataset(*tensors(19)), out / "2.pt")
    with pytest.raises(SplitError, match=r"2\.pt: is not of this split, which has 20 rows there"):
        split(str(source), out, Cut(rows=20), ignore)
    (out / "2.pt").unlink()
    assert split(str(source), out, Cut(rows=20), ignore).kept == 5
    os.utime(source, ns=(1, 1))
    with pytest.raises(SplitError, match="or one of a file that was changed since"):
        split(str(source), out, Cut(rows=20), ignore)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(parts=ROWS + 1), "has 103 rows, too few for 104 partitions"),
        (Cut(mb=0.02), r"a partition of one row has 0\.025 MB: give more than 0\.02 MB"),
    ],
)
def test_cuts_that_cannot_be(source: Path, tmp_path: Path, cut: Cut, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        split(str(source), tmp_path / "out", cut, ignore)
    assert not (tmp_path / "out" / PLAN).exists()


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    torch.save(TensorDataset(*tensors(0)), tmp_path / "none.pt")
    with pytest.raises(SplitError, match=r"none\.pt: has no rows"):
        split(str(tmp_path / "none.pt"), tmp_path / "out", Cut(rows=1), ignore)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(DatasetError, match=r"empty\.pt: .*it is empty"):
        split(str(tmp_path / "empty.pt"), tmp_path / "out", Cut(rows=1), ignore)
    (tmp_path / "a.txt").touch()
    with pytest.raises(SplitError, match=r"a\.txt: is no \.pt file"):
        split(str(tmp_path / "a.txt"), tmp_path / "out", Cut(rows=1), ignore)


def test_from_s3_over_a_bad_connection(source: Path, bucket: Path, tmp_path: Path) -> None:
    """Answers that break off, and a server that is busy, change nothing."""
    (bucket / "all.pt").write_bytes(source.read_bytes())
    with (
        pytest.MonkeyPatch.context() as patch,
        serve_s3(bucket.parent) as server,
        s3_client(server.endpoint, patch),
    ):
        troubles = [Trouble(cut=100_000), Trouble(cut=0), Trouble(status=503, code="SlowDown")] * 2
        gets = []

        def trouble(method: str, path: str) -> Trouble | None:
            gets.append(path)
            return troubles.pop() if len(gets) > 8 and troubles and method == "GET" else None

        server.trouble = trouble
        split("s3://bucket/all.pt", tmp_path / "out", Cut(rows=20), ignore)
    assert troubles == []
    assert same([source], tmp_path / "out")


def test_progress_reaches_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    split(str(source), tmp_path / "out", Cut(rows=20), lambda *now: seen.append(now))
    whole = ROWS * (5 * 32 * 32 * 4 + 5 * 8 + 4)
    assert seen == sorted(seen)
    assert seen[0] == (0, whole)
    assert seen[-1] == (whole, whole)


MEMORY = """
import resource, sys
from pathlib import Path
import workflow.ptwriter, torch.utils.data
from workflow.split import Cut, split
import numpy
numpy.zeros(1)
peak = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
before = peak()
split(sys.argv[1], Path(sys.argv[2]), Cut(parts=1), lambda done, of: None)
print((peak() - before) / 1024)
"""


def test_memory_does_not_grow_with_the_partition(tmp_path: Path) -> None:
    sparse_pt(tmp_path / "all.pt", 20_000)  # 410 MB
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "all.pt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100  # MiB: six blocks of 8, and some


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "split", *arguments])


def test_command(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = command(str(source), "--out", out, "--mb", "1")
    assert done.exit_code == 0, done.output
    assert f"{out}: 3 partitions of up to 48 rows (1.0 MB) each; 103 rows" in done.stdout
    again = command(str(source), "--out", out, "--mb", "1")
    assert "3 of them there before" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of them"),
        (["--rows", "1", "--parts", "2"], "give exactly one of them"),
        (["--mb", "nan"], "nan is no size"),
        (["--mb", "-1"], "no size"),
        (["--rows", "0"], "Invalid value for '--rows'"),
        (["--rows", "9", "--out", "s3://b/c"], "give a folder on this machine"),
    ],
)
def test_wrong_usage(source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = command(str(source), "--out", str(tmp_path / "out"), *options)
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert not (tmp_path / "out").exists()
