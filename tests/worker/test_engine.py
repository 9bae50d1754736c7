"""The torch engine: the model's predictions, whatever the batch and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lambda_worker import engine, slices, torch_engine
from lambda_worker.engine import Array, EngineError, ModelError, Predict, open_engine
from lambda_worker.fold import Attend
from lambda_worker.model import ModelConfig
from lambda_worker.model_file import save_model
from tests.test_layers import loaded_by
from tests.worker.worker_data import SMALL, tensors, trained


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "full.safetensors"
    save_model(trained(ModelConfig()), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_model(trained(SMALL), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def rows(count: int) -> tuple[Array, Array]:
    images, magnitudes, _ = tensors(count)
    return images.numpy(), magnitudes.numpy()


def in_batches(predict: Predict, images: Array, magnitudes: Array, size: int) -> Array:
    starts = range(0, len(images), size)
    return np.concatenate([predict(images[n : n + size], magnitudes[n : n + size]) for n in starts])


def test_full_size_bit_for_bit_in_any_batch_and_on_any_threads(full: Path) -> None:
    images, magnitudes = rows(67)
    one, two = (open_engine(full, threads=threads) for threads in (1, 2))
    whole = one(images, magnitudes)
    with torch.inference_mode():
        plain = trained(ModelConfig())(torch.from_numpy(images), torch.from_numpy(magnitudes))
    assert whole.dtype == np.float32
    assert np.abs(whole - plain.numpy()).max() < 2e-6
    for size in (1, 3, 16, 32, 67):
        assert np.array_equal(in_batches(one, images, magnitudes, size), whole)
        assert np.array_equal(in_batches(two, images, magnitudes, size), whole)


@pytest.mark.skipif(not engine.has_bf16(), reason="this processor has no bf16 instructions")
def test_bf16_is_close_and_as_independent_of_the_batch(full: Path) -> None:
    images, magnitudes = rows(40)
    exact = open_engine(full, threads=1)(images, magnitudes)
    predict = open_engine(full, precision="bf16", threads=1)
    whole = predict(images, magnitudes)
    assert 0 < np.abs(whole - exact).max() < 5e-3
    assert np.array_equal(in_batches(predict, images, magnitudes, 7), whole)


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("avx512f avx512_bf16", True),
        ("amx_bf16 amx_tile", True),
        ("asimd bf16", True),
        ("avx2 avx512f", False),
    ],
)
def test_bf16_needs_a_processor_that_has_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, there: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(engine, "CPUINFO", tmp_path / "cpuinfo")
    assert engine.has_bf16() == there
    if not there:
        with pytest.raises(EngineError, match="bf16"):
            open_engine(small, precision="bf16")


def test_mapped_and_read_only_rows(small: Path) -> None:
    images, magnitudes = rows(5)
    predict = open_engine(small, threads=1)
    expected = predict(images, magnitudes)
    for array in (images, magnitudes):
        array.flags.writeable = False
    assert np.array_equal(predict(images, magnitudes), expected)


def test_the_file_is_not_kept_mapped(small: Path) -> None:
    predict = open_engine(small, threads=1)
    assert str(small) not in Path("/proc/self/maps").read_text()
    assert len(predict(*rows(2))) == 2


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        open_engine(tmp_path / "none.safetensors")


def test_opening_loads_torch_and_importing_does_not() -> None:
    assert "torch" not in loaded_by("import lambda_worker.engine")


@pytest.mark.parametrize(("count", "threads"), [(1, 2), (16, 2), (33, 1), (100, 2), (65, 4)])
def test_slices_are_even_and_keep_every_thread_busy(count: int, threads: int) -> None:
    parts = slices.cut(count, threads)
    sizes = [part.stop - part.start for part in parts]
    assert np.array_equal(np.concatenate([np.arange(count)[part] for part in parts]), range(count))
    assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1 <= slices.SLICE + 1
    assert max(sizes) <= slices.SLICE
    assert len(parts) % threads == 0 or len(parts) == count


def test_own_layers_do_what_those_do_that_they_replace() -> None:
    x = torch.randn((2, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    x[0, 0, 2, 2] = torch.nan
    pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
    assert torch.equal(torch_engine.FastPool()(x).nan_to_num(99), pooled.nan_to_num(99))
    qkv = torch.randn((2, 5, 36), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch_engine.FastAttend(3)(qkv), Attend(3)(qkv), atol=1e-6)
