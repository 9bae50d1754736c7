"""Checkpoints whose zip archive is damaged, foreign or endless: each is refused in words."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from pickles import PROTO, pack, refused

from lambda_worker import checkpoint
from lambda_worker.checkpoint import convert


def rewritten(source: Path, target: Path, **options: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


def test_a_compressed_file_is_refused(small_original: Path, tmp_path: Path) -> None:
    packed = rewritten(
        small_original / "parallel.pt", tmp_path / "m.pt", compression=zipfile.ZIP_DEFLATED
    )
    refused(packed, "its parts are compressed: save it again with torch.save")
    convert(rewritten(small_original / "parallel.pt", tmp_path / "m.pt"), tmp_path / "out")


@pytest.mark.parametrize("names", [[], ["data.pkl"], ["a/data.pkl", "b/data.pkl"], ["a/data.txt"]])
def test_other_archives_are_refused(tmp_path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("a/version", b"3")
        for name in names:
            file.writestr(name, PROTO + b"N.")
    refused(tmp_path / "m.pt", "a zip archive without a single data.pkl")


def test_an_entry_given_twice_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt", PROTO + b"N.", {"0": b"one"})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", b"two")
    refused(path, "two parts have one name")


def test_an_old_format_says_what_to_do(small_original: Path, tmp_path: Path) -> None:
    state = torch.load(small_original / "state_dict.pt", map_location="cpu")
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "m.pt", "old format: save it again with torch.save")
    (tmp_path / "m.pt").write_bytes(b"")
    refused(tmp_path / "m.pt", "it is empty")


def test_an_endless_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "m.pt", PROTO + b"(" + (checkpoint.MAX_PICKLE - 4) * b"N" + b"t.")
    refused(path, "data.pkl has more than 4,194,304 bytes")
    monkeypatch.setattr(checkpoint, "MAX_PICKLE", 1000)  # four million instructions take seconds
    path = pack(tmp_path / "m.pt", PROTO + b"(" + 995 * b"N" + b"t.")
    refused(path, "holds tuple")
    path = pack(tmp_path / "m.pt", PROTO + b"(" + 996 * b"N" + b"t.")
    refused(path, "data.pkl has more than 1,000 bytes")


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt", PROTO + b"N.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    refused(path, "big-endian")


def test_an_endless_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 1000)
    (tmp_path / "m.pt").write_bytes(bytes(1001))
    refused(tmp_path / "m.pt", "more than 1,000 bytes")


def test_an_archive_of_many_entries_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt", PROTO + b"N.", {f"{n}": b"" for n in range(20_000)})
    refused(path, "a zip directory of 20001 parts in")


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A zip bomb without compression: many names for one long entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", PROTO + b"N.")
        file.writestr("a/data/0", bytes(10_000))
        entry = file.infolist()[1]
        for i in range(1, 100):
            copy = zipfile.ZipInfo(f"a/data/{i}")
            copy.file_size = copy.compress_size = entry.file_size
            copy.CRC, copy.header_offset = entry.CRC, entry.header_offset
            file.filelist.append(copy)
    (tmp_path / "m.pt").write_bytes(buffer.getvalue())
    refused(tmp_path / "m.pt", "claim more bytes than the file has")


def test_a_flipped_bit_in_the_weights_is_noticed(small_original: Path, tmp_path: Path) -> None:
    data = bytearray((small_original / "parallel.pt").read_bytes())
    data[len(data) // 2] ^= 1  # inside one of the storages
    (tmp_path / "m.pt").write_bytes(data)
    refused(tmp_path / "m.pt", r"wrong checksum of data/\d+")


@pytest.mark.parametrize("kept", [1, 3, 4, 100, 50_000, -1, -30, -3000])
def test_a_truncated_file_is_refused(small_original: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "m.pt").write_bytes((small_original / "parallel.pt").read_bytes()[:kept])
    refused(tmp_path / "m.pt", r"truncated|not a \.pt file")
