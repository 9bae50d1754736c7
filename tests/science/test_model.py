"""The AstroMAE family: published names and shapes, files, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambda_worker.engine import DEMO_MODEL, ModelError
from lambda_worker.model import AstroMAE, ModelConfig
from lambda_worker.model_file import load_model, save_model

PUBLISHED = Path(__file__).parent.parent / "fixtures" / "astromae_state_dict.txt"

SMALL = ModelConfig(
    width=16,
    depth=2,
    heads=4,
    mlp_ratio=2,
    pcm_groups=4,
    stem=4,
    inception=(4, 4, 4, 4, 4),
    magnitude_width=8,
    branch_width=8,
    head_width=8,
    asinh_softening=(0.3, 0.1, 0.1, 0.2, 1.0),
    magnitude_mean=(19.0, 18.0, 17.0, 17.0, 16.0),
    magnitude_mix=tuple(tuple(float(i == j) for j in range(5)) for i in range(5)),
)


def small_model() -> AstroMAE:
    torch.manual_seed(7)
    model = AstroMAE(SMALL)
    inputs = rows(64)
    model.train()
    model(*inputs)  # so that the running statistics differ from their start
    return model.eval()


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 5, 32, 32, generator=generator)
    return images, 18 + torch.randn(count, 5, generator=generator)


def published() -> Iterator[tuple[str, tuple[int, ...], str]]:
    for line in PUBLISHED.read_text().splitlines():
        match = re.fullmatch(r"(\S+) \((.*)\) (\S+)", line)
        if match:
            name, shape, dtype = match.groups()
            yield name, tuple(int(part) for part in shape.split(",") if part.strip()), dtype


def test_full_size_has_the_published_names_shapes_and_types() -> None:
    with torch.device("meta"):
        model = AstroMAE(ModelConfig())
    ours = [(k, tuple(v.shape), str(v.dtype)[6:]) for k, v in model.state_dict().items()]
    assert ours == list(published())
    assert len(ours) == 508
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_902_889


def test_the_full_size_scales_no_input() -> None:
    torch.manual_seed(0)
    model = AstroMAE(replace(ModelConfig(), depth=1)).eval()
    images, magnitudes = rows(2)
    seen: list[torch.Tensor] = []
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.inception_model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.inference_mode():
        assert model(images, magnitudes).shape == (2,)
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1], magnitudes)


def test_forward_gives_one_float32_per_row() -> None:
    with torch.inference_mode():
        z_phot = small_model()(*rows(5))
        none = small_model()(*rows(0))
    assert z_phot.shape == (5,)
    assert z_phot.dtype == torch.float32
    assert torch.isfinite(z_phot).all()
    assert none.shape == (0,)


def test_rows_of_a_batch_do_not_mix_in_eval_mode() -> None:
    model, (images, magnitudes) = small_model(), rows(9)
    with torch.inference_mode():
        together = model(images, magnitudes)
        alone = torch.cat([model(images[k : k + 1], magnitudes[k : k + 1]) for k in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.std() > 1e-3, "a constant would pass"


def test_both_inputs_matter() -> None:
    model, (images, magnitudes) = small_model(), rows(4)
    with torch.inference_mode():
        base = model(images, magnitudes)
        assert not torch.allclose(base, model(images.flip(0), magnitudes), atol=1e-5)
        assert not torch.allclose(base, model(images, magnitudes.flip(0)), atol=1e-5)


def test_pcm_leaves_the_class_token_alone_and_reads_the_blocks_input() -> None:
    block = small_model().blocks[0]
    tokens = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        grid = tokens[:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
        local = block.PCM(grid).permute(0, 2, 3, 1).reshape(2, 16, 16)
        x = tokens + block.attn(block.norm1(tokens))
        x[:, 1:] += local
        expected = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(block(tokens), expected)


def test_input_scaling_is_what_the_config_says() -> None:
    mix = tuple(tuple(float(i + 2 * j) for j in range(5)) for i in range(5))
    model = AstroMAE(replace(SMALL, magnitude_mix=mix))
    images, magnitudes = rows(3)
    seen: list[tuple[torch.Tensor, ...]] = []
    model.inception_model.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.inference_mode():
        model.eval()(images, magnitudes)
    softening = torch.tensor(SMALL.asinh_softening).view(1, 5, 1, 1)
    torch.testing.assert_close(seen[0][0], torch.asinh(images / softening))
    centred = magnitudes - torch.tensor(SMALL.magnitude_mean)
    torch.testing.assert_close(seen[0][1], centred @ torch.tensor(mix))


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "new folder" / "m.safetensors", {"seed": 7})
    again = load_model(tmp_path / "new folder" / "m.safetensors")
    assert again.config == SMALL
    assert not again.training
    for (name, old), (same, new) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(old, new), name
    with torch.inference_mode():
        assert torch.equal(model(*rows(6)), again(*rows(6)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in again.parameters())


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    before = path.read_bytes()

    def disk_full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*m\.safetensors: No space left"):
        save_model(small_model(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model file at .*nowhere"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 5, 200, 5_000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"m\.safetensors is no whole safetensors file"):
        load_model(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no whole safetensors file: it is a folder"):
        load_model(tmp_path)


def test_a_checkpoint_of_torch_says_what_to_do(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"but one of PyTorch: .* cosmic model convert .*m\.pt"):
        load_model(tmp_path / "m.pt")


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"other\.safetensors: not an AstroMAE model of ours"):
        load_model(path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{", "config cannot be read"),
        ("[]", "config cannot be read"),
        ('{"colour": 1}', "config cannot be read"),
        ('{"width": "wide"}', "do not fit"),
        ('{"width": 100000000, "heads": 1, "pcm_groups": 1}', "do not fit"),
        ('{"depth": 1000000000}', "do not fit"),
        ('{"depth": "deep"}', "do not fit"),
        ('{"width": 0}', "sizes must be positive"),
        ('{"inception": [1, 2]}', "five Inception blocks"),
        ('{"heads": 7}', "multiple of heads"),
        ('{"patch": 7}', "multiple of 8 and of patch"),
        ('{"pcm_kernel": 2}', "pcm_kernel must be odd"),
        ('{"norm_eps": 0}', "norm_eps must be a small positive number"),
        ('{"norm_eps": NaN}', "norm_eps must be a small positive number"),
        ('{"norm_eps": "small"}', "do not fit"),
        ('{"asinh_softening": [1.0]}', "one per band"),
        ('{"magnitude_mean": [1, 1, 1, 1, 1]}', "together"),
        ('{"magnitude_mix": [[1], [1], [1], [1], [1]]}', "one per band"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, config: str, complaint: str) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    save_file(load_file(path), path, {"format": "cosmic-astromae-1", "config": config})
    with pytest.raises(ModelError, match=complaint):
        load_model(path)


def test_a_missing_or_surplus_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    tensors = load_file(path)
    metadata = {"format": "cosmic-astromae-1", "config": json.dumps(SMALL.__dict__)}
    for change in ({"extra": torch.zeros(1)}, {"cls_token": None}):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, path, metadata)
        with pytest.raises(ModelError, match="do not fit its config") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_half_precision_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    tensors = {**load_file(path), "cls_token": torch.zeros(1, 1, 16, dtype=torch.float16)}
    save_file(tensors, path, {"format": "cosmic-astromae-1", "config": json.dumps(SMALL.__dict__)})
    with pytest.raises(ModelError, match=r"cls_token is torch\.float16"):
        load_model(path)


def test_the_packaged_model_is_small() -> None:
    assert DEMO_MODEL.stat().st_size <= 3_000_000
    assert sum(parameter.numel() for parameter in load_model(DEMO_MODEL).parameters()) < 750_000
