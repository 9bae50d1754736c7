"""Reading of `.pt` files: good ones by row, bad ones with a clear error and no execution."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lambda_worker import dataset
from lambda_worker.dataset import DatasetError
from lambda_worker.reading import Shard
from lambda_worker.shard import Piece, place
from tests.worker.worker_data import MakePt, tensors


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_shard_over_two_files_reads_its_rows(
    make_pt: MakePt, tmp_path: Path, wide: torch.dtype
) -> None:
    a, b = str(make_pt("a.pt", 6, seed=1, wide=wide)), str(make_pt("b.pt", 6, seed=2, wide=wide))
    shard = Shard([Piece(a, 4, 6), Piece(b, 3, 3), Piece(b, 0, 3)], tmp_path)
    first, second = tensors(6, seed=1, wide=wide), tensors(6, seed=2, wide=wide)
    expected = [torch.cat((x[4:6], y[:3])) for x, y in zip(first, second, strict=True)]
    assert len(shard) == 5
    for got, want in zip(shard.batch(0, 5), expected, strict=True):
        assert np.array_equal(got, want)
        assert got.dtype == want.numpy().dtype
    assert np.array_equal(shard.batch(3, 4).redshift, second[2][1:2])
    assert place(shard.pieces, 3) == (b, 1)


def test_batches_are_views_of_what_was_read(make_pt: MakePt, tmp_path: Path) -> None:
    shard = Shard([Piece(str(make_pt("a.pt", 8)), 2, 8)], tmp_path)
    first, second = (rows.images for _, _, rows in shard.batches(3))
    assert first.base is not None
    assert first.base is second.base


def test_files_are_loaded_by_many_threads(make_pt: MakePt) -> None:
    path = str(make_pt("a.pt", 2))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.count, [path] * 200)) == [2] * 200


def test_empty_shard_reads_nothing(tmp_path: Path) -> None:
    assert len(Shard([Piece("missing.pt", 0, 0)], tmp_path)) == 0


def test_count(make_pt: MakePt) -> None:
    assert dataset.count(str(make_pt("a.pt", 7))) == 7
    assert dataset.count(str(make_pt("b.pt", 0))) == 0


def test_tuple_of_tensors_is_a_dataset_too(tmp_path: Path) -> None:
    torch.save(tuple(tensors(3)), tmp_path / "a.pt")
    assert dataset.count(str(tmp_path / "a.pt")) == 3


def test_file_with_fewer_rows_than_init_saw(make_pt: MakePt, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.pt: has 4 rows, and row 4 is wanted"):
        Shard([Piece(str(make_pt("a.pt", 4)), 0, 5)], tmp_path)


def bad(index: int, tensor: Tensor) -> TensorDataset:
    content = tensors(4)
    content[index] = tensor
    dataset = TensorDataset()
    dataset.tensors = tuple(content)
    return dataset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bad(0, torch.zeros(4, 3, 32, 32)), r"images has shape \(4, 3, 32, 32\), expected \(N, 5,"),
        (bad(1, torch.zeros(4)), r"magnitudes has shape \(4,\), expected \(N, 5\)"),
        (bad(2, torch.zeros(4, 1)), r"redshift has shape \(4, 1\), expected \(N\)"),
        (bad(2, torch.tensor(1.0)), r"redshift has shape \(\), expected \(N\)"),
        (bad(2, torch.zeros(3)), r"have \[4, 4, 3\] rows, expected equal numbers"),
        (bad(0, torch.zeros(4, 5, 32, 32).half()), "images is torch.float16, expected float32"),
        (bad(2, torch.arange(4)), "redshift is torch.int64, expected float32 or float64"),
        (bad(1, torch.zeros(4, 5).to_sparse()), "magnitudes is a Tensor, expected a dense tensor"),
        (bad(1, torch.zeros(4, 5, device="meta")), "magnitudes is a Tensor, expected a dense"),
        (
            TensorDataset(torch.zeros(4)),
            "holds a list of 1, expected a TensorDataset of ima",
        ),
        ({"images": torch.zeros(4)}, "holds a dict, expected a TensorDataset"),
        ([1, 2, 3], "images is a int, expected a dense tensor"),
        (torch.nn.Linear(2, 2), r"refused, .* it needs torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(DatasetError, match=message) as caught:
        dataset.count(str(path))
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.pt: no such file"):
        dataset.count(str(tmp_path / "none.pt"))
    (tmp_path / "empty.pt").touch()
    with pytest.raises(
        DatasetError, match=r"empty\.pt: truncated or damaged: it is empty; copy it"
    ):
        dataset.count(str(tmp_path / "empty.pt"))
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(DatasetError, match=r"x\.pt: is a folder, expected a \.pt file"):
        dataset.count(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(make_pt: MakePt, share: float) -> None:
    path = make_pt("a.pt", 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DatasetError, match=r"a\.pt: (truncated or damaged|not a \.pt file)"):
        dataset.count(str(path))


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, options: dict[str, Any]) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    torch.save([Evil(trace), torch.zeros(1)], path, **options)
    with pytest.raises(DatasetError, match=r"evil\.pt: (refused|not a \.pt file)"):
        dataset.count(str(path))
    assert not trace.exists()


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(DatasetError, match=r"not a \.pt file"):
        dataset.count(str(path))
    assert not trace.exists()


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "trace"), tmp_path / "evil.pt")
    with pytest.raises(DatasetError, match=r"it needs posix\.system to be loaded"):
        dataset.count(str(tmp_path / "evil.pt"))


def test_damaged_bytes_never_give_another_error(make_pt: MakePt, tmp_path: Path) -> None:
    """Bytes of the pickle and of the zip directory replaced: read as it is, or `DatasetError`."""
    path = make_pt("a.pt", 1)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.infolist()[0]
    weak = [*range(pickled.file_size + 120), *range(len(whole) - 1200, len(whole))]
    chance, refused = random.Random(7), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for spot in chance.sample(weak, 2):
            damaged[spot] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            dataset.count(str(path))
        except DatasetError:
            refused += 1
    assert refused > 50
