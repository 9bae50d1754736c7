"""The model that stays loaded: the same one is used again, a changed one never."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lambda_worker import storage, warm
from lambda_worker.engine import Precision
from lambda_worker.model_file import save_model
from lambda_worker.warm import Loaded
from tests.worker.worker_data import SMALL, trained

HOW: dict[str, Any] = {"engine": "torch", "precision": "fp32", "threads": 1}


@pytest.fixture(autouse=True)
def in_lambda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As a process that the runtime has just started, with a /tmp of its own."""
    monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", "127.0.0.1:9001")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    warm._engine = warm._file = None
    yield
    warm._engine = warm._file = None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What engines were opened with, instead of opening them."""
    seen: list[dict[str, Any]] = []

    def open_engine(path: Path, **how: Any) -> object:
        assert path.is_file()
        assert warm._engine is None, "memory may not take two models"
        seen.append({"content": path.read_bytes(), **how})
        return lambda images, magnitudes: images

    monkeypatch.setattr(warm, "open_engine", open_engine)
    return seen


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    fetch = storage.fetch
    monkeypatch.setattr(storage, "fetch", lambda url, to: (seen.append(url), fetch(url, to))[1])
    return seen


@pytest.fixture(params=["file", "s3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a model."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
    url = "s3://bucket/m.safetensors" if request.param == "s3" else str(tmp_path / "m.safetensors")
    storage.write(url, b"one")
    return url


def load(url: str, tmp_path: Path, **how: Any) -> Loaded:
    return warm.load(url, tmp_path / "scratch", **{**HOW, **how})


def test_the_same_model_is_loaded_and_fetched_once(
    model: str, opened: list[Any], fetched: list[str], tmp_path: Path
) -> None:
    first = load(model, tmp_path)
    assert load(model, tmp_path) is first
    assert len(opened) == len(fetched) == 1
    assert first.path.is_file()


def test_a_changed_model_is_noticed(
    model: str, opened: list[Any], fetched: list[str], tmp_path: Path
) -> None:
    first = load(model, tmp_path)
    storage.write(model, b"two")  # as long as the first
    second = load(model, tmp_path)
    assert second.predict is not first.predict
    assert [seen["content"] for seen in opened] == [b"one", b"two"]
    kept = list((tmp_path / "tmp").glob("cosmic-model-*/bucket"))
    assert len(kept) == model.startswith("s3:"), "the old download is still there"


@pytest.mark.parametrize(
    "other", [{"engine": "onnx"}, {"precision": "bf16"}, {"threads": 2}], ids=str
)
def test_another_engine_is_opened_on_the_same_download(
    model: str, opened: list[Any], fetched: list[str], tmp_path: Path, other: dict[str, Any]
) -> None:
    load(model, tmp_path)
    load(model, tmp_path, **other)
    load(model, tmp_path)
    assert len(opened) == 3  # one is kept, not two
    assert len(fetched) == 1


def test_a_model_that_cannot_be_loaded_leaves_no_other_in_its_place(
    model: str, opened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(model, tmp_path)
    opener = warm.open_engine

    def fail(path: Path, **how: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm, "open_engine", fail)
    storage.write(model, b"two")
    with pytest.raises(KeyboardInterrupt):
        load(model, tmp_path)
    monkeypatch.setattr(warm, "open_engine", opener)
    assert load(model, tmp_path) is not first
    assert opened[-1]["content"] == b"two"


def test_a_broken_download_leaves_nothing(
    bucket: Path, opened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("s3://bucket/m.safetensors", b"one")

    def fail(url: str, folder: Path) -> Path:
        (folder / "part").write_bytes(b"o")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", fail)
        with pytest.raises(KeyboardInterrupt):
            load("s3://bucket/m.safetensors", tmp_path)
    assert not os.listdir(tmp_path / "tmp")
    load("s3://bucket/m.safetensors", tmp_path)
    assert opened[0]["content"] == b"one"


def test_a_process_of_the_command_line_keeps_nothing(
    model: str, opened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_LAMBDA_RUNTIME_API")
    load(model, tmp_path)
    load(model, tmp_path)
    assert len(opened) == 2
    assert warm._engine is None
    assert warm._file is None
    assert not os.listdir(tmp_path / "tmp")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match=r"none\.safetensors: No such"):
        load(str(tmp_path / "none.safetensors"), tmp_path)


@pytest.mark.parametrize("precision", ["fp32"])
def test_a_real_engine_is_used_again(precision: Precision, tmp_path: Path) -> None:
    save_model(trained(SMALL), tmp_path / "m.safetensors")
    first = load(str(tmp_path / "m.safetensors"), tmp_path, precision=precision)
    assert load(str(tmp_path / "m.safetensors"), tmp_path).predict is first.predict
