"""Pickles to order: parts of the original's replaced, and storages that lie."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

import pytest

from lambda_worker.checkpoint import convert
from lambda_worker.engine import ModelError

PROTO, STOP = b"\x80\x02", b"."
HIDDEN = rb"X\x0f\0\0\0hidden_features(?:q.|r....)"  # an attribute that nobody looks at
VALUE = rb"(?:K.|M..|J....)"


def pack(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A file as torch.save writes it, around this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, raw in (storages or {}).items():
            file.writestr(f"archive/data/{key}", raw)
    return path


def unpack(path: Path) -> tuple[bytes, dict[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        entries = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    storages = {k.removeprefix("data/"): v for k, v in entries.items() if k.startswith("data/")}
    return entries["data.pkl"], storages


def edited(source: Path, target: Path, before: bytes, old: bytes, new: bytes) -> Path:
    """The first `old` that follows `before` (patterns both), replaced by `new`."""
    pickled, storages = unpack(source)
    changed, count = re.subn(
        b"(" + before + b")" + old, lambda m: m[1] + new, pickled, count=1, flags=re.DOTALL
    )
    assert count == 1
    return pack(target, changed, storages)


def hidden(source: Path, target: Path, code: bytes) -> Path:
    """A good checkpoint with this code, which leaves one value, in place of an attribute's."""
    return edited(source, target, HIDDEN, VALUE, code)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    """GLOBAL, the module being all but the last part of the name."""
    module, _, leaf = name.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def call(name: str, *args: bytes) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    return named(name) + b"(" + b"".join(args) + b"tR"


def refused(path: Path, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        convert(path, path.with_name("out"))
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()
    assert len(said) < len(str(path)) + 310
    assert not path.with_name("out").exists()
