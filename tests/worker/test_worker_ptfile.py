"""The torch-free reader of `.pt` files against torch, and against files that somebody damaged."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from lambda_worker import archive, dataset, ptfile
from lambda_worker.archive import Damaged, FormatError, Refused, Unusual
from lambda_worker.dataset import DatasetError
from lambda_worker.ptfile import TensorFile
from lambda_worker.reading import Shard
from lambda_worker.shard import Piece
from tests.worker.sparse import Described, pickled
from tests.worker.worker_data import MakePt, tensors

WIDE = st.sampled_from([torch.float32, torch.float64])


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def opened(data: bytes) -> TensorFile:
    return TensorFile(len(data), lambda offset, length: data[offset : offset + length])


def starts(data: bytes) -> list[int]:
    """Where the three tensors are."""
    file = opened(data)
    return [file.start(tensor) for tensor in file.content]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def columns(draw: st.DrawFn) -> list[Tensor]:
    """Three tensors of a dataset: any number of rows, each a view of a larger one or not."""
    rows, made = draw(st.integers(0, 40)), []
    for shape in dataset.SHAPES.values():
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        whole = torch.rand((before + rows + after, *shape), dtype=draw(WIDE))
        made.append(whole[before : before + rows])
    return made


@settings(max_examples=40)
@given(columns(), st.booleans(), st.data())
def test_any_rows_are_those_that_torch_loads(
    folder: Path, content: list[Tensor], plain: bool, data: st.DataObject
) -> None:
    path = folder / "a.pt"
    torch.save(tuple(content) if plain else TensorDataset(*content), path)
    rows = len(content[0])
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    shard = Shard([Piece(str(path), start, stop)], folder)
    batch_size = data.draw(st.integers(1, 50))
    for first, last, got in shard.batches(batch_size):
        for array, tensor in zip(got, content, strict=True):
            assert array.dtype == tensor.numpy().dtype
            assert np.array_equal(array, tensor[start + first : start + last])
    assert dataset.count(str(path)) == rows


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_or_a_cut_gives_an_error_or_the_same_numbers(data: st.DataObject) -> None:
    whole = saved(TensorDataset(*tensors(2, wide=torch.float64)))
    expected = starts(whole)
    weak = [*range(1000), *range(len(whole) - 1500, len(whole))]
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    for place in data.draw(st.lists(st.sampled_from(weak), max_size=2, unique=True)):
        if place < len(damaged):
            damaged[place] ^= data.draw(st.integers(1, 255))
    with suppress(FormatError, Unusual):
        assert starts(bytes(damaged)) == expected


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.nightly)])
def test_every_single_changed_bit_of_the_description_is_found(bits: int) -> None:
    """No flip outside of the numbers themselves shifts them: some lengths are only said once."""
    whole = saved(TensorDataset(*tensors(1)))
    expected = starts(whole)
    numbers = {at for start, size in zip(expected, (20480, 20, 4), strict=True)
               for at in range(start, start + size)}  # fmt: skip
    for place in sorted(set(range(len(whole))) - numbers):
        for bit in sorted((place + 3 * n) % 8 for n in range(bits)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with suppress(FormatError, Unusual):
                assert starts(bytes(damaged)) == expected, f"bit {bit} of byte {place}"


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_a_pickle_of_random_bytes_is_refused(data: bytes) -> None:
    with suppress(FormatError):
        ptfile.describe(b"\x80\x02" + data)


def tensor_pickle(offset: int, shape: Any, stride: Any, numel: int = 5120) -> bytes:
    """Instructions for one tensor, whose numbers are as given."""
    return pickled(Described("0", torch.FloatStorage, numel, offset, shape, stride))


@pytest.mark.parametrize(
    "numbers",
    [
        (-1, (1, 5), (5, 1)),
        (0, (1, 5), (-5, 1)),
        (0, (-1, 5), (5, 1)),
        (0, (1 << 63, 5), (5, 1)),
        (0, (1, 5), (5,)),
        (0, (1, 5.0), (5, 1)),
        (0, (True, 5), (5, 1)),
        (0, [1, 5], (5, 1)),
        (0, (1, 5), (5, 1), -1),
    ],
)
def test_impossible_tensors(numbers: Any) -> None:
    with pytest.raises(Damaged):
        ptfile.describe(tensor_pickle(*numbers))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, (1, 5, 32, 32), (5120, 1024, 32, 1)), "larger than what is stored"),
        ((0, (2, 5, 32, 32), (5120, 1024, 32, 1)), "larger than what is stored"),
        ((0, (1 << 61, 5, 32, 32), (1 << 61, 1024, 32, 1)), "larger than what is stored"),
        ((0, (10**12, 5, 32, 32), (0, 0, 0, 0)), "1000000000000 rows in"),
        ((0, (1, 5, 32, 32), (5120, 1024, 32, 1), 9999), "has 20480 bytes, expected others"),
    ],
)
def test_tensors_that_are_not_within_the_file(numbers: Any, message: str) -> None:
    file = opened(saved(TensorDataset(*tensors(1))))
    with pytest.raises(Damaged, match=message):
        file.check(ptfile.describe(tensor_pickle(*numbers)))


BOMBS = {
    "a memo of 2^31 places": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a text of 2^62 bytes": b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"a.",
    "a frame of 2^62 bytes": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "bytes of 2^31": b"\x80\x02T\xff\xff\xff\x7fa.",
    "a key with a hash that ends the process": b"}K\x01" + b"\x85" * 500_000 + b"Ns.",
    "many marks": b"(" * 300_000 + b"t" * 300_000 + b".",
    "a list that doubles": b"](" + b"2" * 100 + b"e.",
    "no end": b"\x80\x02" + b"N" * 100_000,
    "an integer of 250,000 digits": b"\x8b\x60\xea\x00\x00" + b"\x7f" * 60_000 + b".",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_do_nothing(data: bytes) -> None:
    """Refused, or inert; in a process of its own, which they could end, with 256 MB."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))\n"
        "from lambda_worker import archive, ptfile\n"
        "try: ptfile.describe(sys.stdin.buffer.read())\n"
        "except archive.FormatError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, timeout=20)
    assert done.returncode in (0, 7)


@pytest.mark.parametrize(
    "instruction", [b"i__main__\nEvil\n", b"c__builtin__\neval\n", b"\x82\x01"]
)
def test_instructions_that_would_call_something(instruction: bytes) -> None:
    with pytest.raises(Refused):
        ptfile.describe(b"\x80\x02(" + instruction + b".")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"]N\x85R.", "a call of what is no global"),
        (b"ccollections\nOrderedDict\n(NtR.", "it calls collections.OrderedDict"),
        (b"ctorch\nSize\n)R]b.", "it gives torch.Size a state that is no plain dict"),
        (b"}N\x85Ns.", "keys that are neither text nor numbers"),
    ],
)
def test_what_is_known_cannot_be_used_otherwise(data: bytes, message: str) -> None:
    with pytest.raises((Refused, Damaged), match=message):
        ptfile.describe(b"\x80\x02" + data)


def rezipped(data: bytes, method: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """The parts of an archive in a new one, some of them with other content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.partition("/")[2], old.read(name)))
    return buffer.getvalue()


def test_an_archive_that_another_program_packed(folder: Path) -> None:
    content = tensors(3)
    path = folder / "gepäckt π.pt"
    torch.save(TensorDataset(*content), path)  # whose parts have names like the file's
    for data in (path.read_bytes(), rezipped(path.read_bytes())):
        path.write_bytes(data)
        shard = Shard([Piece(str(path), 1, 3)], folder)
        assert np.array_equal(shard.batch(0, 2).images, content[0][1:])
        assert shard.requests > 1  # by range


class Canary:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("how", ["plain", "old", "compressed", "big-endian"])
def test_nothing_is_run_however_the_file_is_read(tmp_path: Path, how: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "a.pt"
    data = saved((Canary(trace), *tensors(1)[1:]), _use_new_zipfile_serialization=how != "old")
    if how == "compressed":
        data = rezipped(data, zipfile.ZIP_DEFLATED)
    elif how == "big-endian":
        data = rezipped(data, byteorder=b"big")
    path.write_bytes(data)
    for read in (dataset.count, lambda url: Shard([Piece(url, 0, 1)], tmp_path)):
        with pytest.raises(DatasetError, match=r"refused, .* it needs posix\.mkdir to be loaded"):
            read(str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("old", r"it has PyTorch's old format: save it again with torch\.save"),
        ("compressed", r"its parts are compressed: save it again with torch\.save"),
        ("big-endian", "its numbers are big-endian: save it again on this machine"),
        ("strided", r"its images are strided: save them again as contiguous\(\)"),
        ("expanded", r"its redshift are strided: save them again as contiguous\(\)"),
        ("bfloat16", "its magnitudes are bfloat16: save them again as float32"),
    ],
)
def test_files_that_are_read_whole_and_say_so(
    how: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = tensors(6)
    if how == "strided":
        content = [tensor[::2] for tensor in content]
    elif how == "expanded":
        content[2] = torch.full((1,), 0.5).expand(6)
    elif how == "bfloat16":
        content[1] = content[1].bfloat16()
    data = saved(TensorDataset(*content), _use_new_zipfile_serialization=how != "old")
    if how == "compressed":
        data = rezipped(data, zipfile.ZIP_DEFLATED)
    elif how == "big-endian":
        data = rezipped(data, byteorder=b"big")
        content = [torch.from_numpy(tensor.numpy().byteswap()) for tensor in content]
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    assert dataset.count(str(path)) == len(content[0])
    shard = Shard([Piece(str(path), 1, 3)], tmp_path)
    for array, tensor in zip(shard.batch(0, 2), content, strict=True):
        assert np.array_equal(array, tensor[1:3].float(), equal_nan=True)
        assert array.dtype == np.float32
    (record,) = caplog.records
    assert f"{path}: read whole" in record.getMessage()
    assert re.search(message, record.getMessage())
    assert shard.bytes_read == len(data)


@pytest.mark.parametrize(
    ("new", "times", "message"),
    [
        (b"a/data/1", -1, "two parts have one name"),
        (b"b/data/0", -1, "its part data/0 is missing"),
        (b"b/data/0", 1, "no header of a/data/0 where it should be"),  # in its header only
        (b"a/.....0", -1, "its part data/0 is missing"),
    ],
)
def test_names_that_are_not_as_they_should(
    make_pt: MakePt, new: bytes, times: int, message: str
) -> None:
    whole = make_pt("a.pt", 1).read_bytes()
    with pytest.raises(Damaged, match=message):
        starts(whole.replace(b"a/data/0", new, times))


def test_what_is_read_of_a_file_is_limited(
    make_pt: MakePt, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_pt("a.pt", 1).read_bytes()
    with pytest.raises(Damaged, match="a zip directory of 60000 parts in"):
        opened(whole[:-66] + struct.pack("<Q", 60000) + whole[-58:])
    with pytest.raises(FormatError, match=r"its part data\.pkl has more than 1,048,576 bytes"):
        opened(rezipped(whole, **{"data.pkl": bytes(2 << 20)}))
    monkeypatch.setattr(archive, "LIMIT", 400)
    with pytest.raises(Damaged, match="a zip directory of 9 parts in"):
        opened(whole)


def test_directory_outside_of_the_file(make_pt: MakePt) -> None:
    outside = bytearray(make_pt("a.pt", 1).read_bytes())
    struct.pack_into("<Q", outside, len(outside) - 34, 0x7FFFFFFF)
    with pytest.raises(Damaged, match="it points to a place outside of it"):
        opened(bytes(outside))


def test_unknown_byte_order(make_pt: MakePt) -> None:
    whole = make_pt("a.pt", 1).read_bytes()
    with pytest.raises(Damaged, match="byte order b'middle'"):
        opened(rezipped(whole, byteorder=b"middle"))


def test_parameters_are_tensors(tmp_path: Path) -> None:
    content = [torch.nn.Parameter(tensor) for tensor in tensors(2)]
    torch.save(tuple(content), tmp_path / "a.pt")
    rows = Shard([Piece(str(tmp_path / "a.pt"), 0, 2)], tmp_path).batch(0, 2)
    assert np.array_equal(rows.images, content[0].detach())


def test_reading_by_range_needs_no_torch(make_pt: MakePt, tmp_path: Path) -> None:
    path = str(make_pt("a.pt", 5))
    code = (
        "import sys; from pathlib import Path; from lambda_worker.reading import *\n"
        "from lambda_worker.dataset import count\n"
        f"shard = Shard([Piece({path!r}, 0, count({path!r}))], Path('/'))\n"
        "print(sum(len(rows.images) for _, _, rows in shard.batches(2)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "False"]
