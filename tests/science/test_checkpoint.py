"""`cosmic model convert`: the published checkpoint and what becomes of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from astromae_numpy import predict
from astromae_original import SMALL
from pickles import edited, pack, text, unpack
from safetensors import safe_open

from lambda_worker.checkpoint import convert
from lambda_worker.engine import DEMO_MODEL, ModelError
from lambda_worker.model import AstroMAE, ModelConfig
from lambda_worker.model_file import load_model
from workflow.cli_model import commands

FORMS = ["parallel", "protocol_4", "module", "state_dict", "parallel_state_dict"]


def errors(model: AstroMAE, folder: Path) -> tuple[float, float]:
    """Largest differences of predictions from the original's, and from the ones in float64."""
    known = np.load(folder / "predictions.npz")
    with torch.inference_mode():
        z_phot = model(torch.from_numpy(known["images"]), torch.from_numpy(known["magnitudes"]))
    exact = predict(
        {name: value.numpy() for name, value in model.state_dict().items()},
        known["images"],
        known["magnitudes"],
        heads=model.config.heads,
        norm_eps=model.config.norm_eps,
    )
    assert z_phot.std() > 0.3, "weights whose predictions are all alike would prove nothing"
    ours = z_phot.numpy()
    return float(abs(ours - known["z_phot"]).max()), float(abs(ours - exact).max())


def test_the_full_size_predicts_what_the_original_does(full_original: Path, tmp_path: Path) -> None:
    done = convert(full_original / "parallel.pt", tmp_path / "m.safetensors")
    assert done.config == ModelConfig()
    assert done.parameters == 15_902_889
    from_original, from_exact = errors(load_model(tmp_path / "m.safetensors"), full_original)
    assert from_original <= 1e-5
    assert from_exact <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(small_original: Path, tmp_path: Path, form: str) -> None:
    # A state_dict says neither heads nor epsilon: 3 and 1e-5 in the small original.
    told = "state_dict" not in form
    done = convert(
        small_original / f"{form}.pt", tmp_path / "m.safetensors", heads=None if told else 3
    )
    assert done.config == ModelConfig(
        width=48,
        depth=2,
        heads=3,
        mlp_ratio=2,
        pcm_groups=12,
        pcm_kernel=3,
        norm_eps=1e-5 if told else 1e-6,
        stem=8,
        inception=(4, 4, 2, 2, 1),
        magnitude_width=24,
        branch_width=40,
        head_width=16,
    )
    assert done.heads_from == ("checkpoint" if told else "--heads")
    from_original, from_exact = errors(load_model(tmp_path / "m.safetensors"), small_original)
    assert from_original <= (1e-5 if told else 1e-4)
    assert from_exact <= 1e-5


def test_the_small_originals_name_a_gpu(small_original: Path) -> None:
    assert b"cuda:0" in unpack(small_original / "parallel.pt")[0]


def test_the_file_says_where_it_is_from(small_original: Path, tmp_path: Path) -> None:
    source, target = small_original / "parallel.pt", tmp_path / "m.safetensors"
    done = convert(source, target)
    assert done.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    with safe_open(target, framework="pt") as file:
        assert json.loads(file.metadata()["provenance"]) == {
            "made_by": "cosmic model convert",
            "source": "parallel.pt",
            "source_sha256": done.sha256,
            "source_form": "a DataParallel module",
            "heads_from": "checkpoint",
        }


def test_the_command_says_what_it_made(
    small_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    commands(["convert", str(small_original / "parallel.pt"), str(out)], standalone_mode=False)
    said = capsys.readouterr()
    assert "84,765 parameters, from a DataParallel module" in said.out
    assert "width 48, depth 2, 3 heads" in said.out
    assert "sha256" in said.out
    assert said.out.endswith(f"use it: cosmic run --model {out}\n")
    assert said.err == ""


def test_the_command_says_that_it_guessed_the_heads(
    small_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_original / "state_dict.pt"), str(tmp_path / "m.safetensors")]
    commands(["convert", *words], standalone_mode=False)
    assert "does not say its attention heads; 6 as published" in capsys.readouterr().err
    commands(["convert", *words, "--heads", "3"], standalone_mode=False)
    assert capsys.readouterr().err == ""
    assert load_model(words[1]).config.heads == 3


def test_the_command_fails_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands(["convert", str(tmp_path / "none.pt"), "m"], standalone_mode=False)
    assert end.value.code == 1
    assert capsys.readouterr().err == f"Error: {tmp_path / 'none.pt'}: no such file\n"


def test_an_older_result_stays_when_the_conversion_fails(
    small_original: Path, tmp_path: Path
) -> None:
    target = tmp_path / "m.safetensors"
    target.write_text("older")
    with pytest.raises(ModelError):
        convert(small_original / "predictions.npz", target)
    assert target.read_text() == "older"
    convert(small_original / "parallel.pt", target)
    assert load_model(target).config.width == 48
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_the_checkpoint_itself_is_not_overwritten(small_original: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.pt"
    source.write_bytes((small_original / "parallel.pt").read_bytes())
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(ModelError, match=r"m\.pt: would be overwritten"):
            convert(source, target)


@pytest.mark.parametrize("folder", [".", "/", "sub"])
def test_a_folder_as_the_target_is_refused(
    small_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    with pytest.raises(OSError, match="it is a folder, name a file in it"):
        convert(small_original / "parallel.pt", folder)


def test_heads_that_contradict_the_checkpoint_are_refused(
    small_original: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="says itself that it has 3 heads"):
        convert(small_original / "parallel.pt", tmp_path / "m", heads=6)
    with pytest.raises(ModelError, match=r"multiple of heads \(7\)"):
        convert(small_original / "state_dict.pt", tmp_path / "m", heads=7)


def attribute(name: str) -> bytes:
    """Where a pickle sets this attribute for the first time."""
    return text(name).replace(b"\0", rb"\0") + rb"(?:q.|r....)"


@pytest.mark.parametrize(
    ("before", "old", "new", "complaint"),
    [
        (attribute("class_token"), b"\x88", b"\x89", "has another class_token than True"),
        (attribute("is_custom"), b"\x89", b"\x88", "has another is_custom than False"),
        (attribute("uk_paper"), b"\x89", b"\x88", "has another uk_paper than False"),
        (attribute("scale"), b"G........", b"G" + 8 * b"\x3f", "has another scale than 0.25"),
        (attribute("approximate"), b"X....none", text("tanh"), "has another approximate than none"),
        (attribute("padding_mode"), b"X....zeros", text("reflect"), "another padding_mode than"),
        (attribute("num_heads"), b"K\x03", b"K\x04", "differ in their number of heads"),
        (attribute("num_heads"), b"K\x03", b"N", "differ in their number of heads"),
        (attribute("eps"), b"G........", b"G" + 8 * b"\x3f", r"fc_norm has another eps than 1e-06"),
        (
            b"norm1.*?",
            b"G" + re.escape(struct.pack(">d", 1e-5)),
            b"G" + struct.pack(">d", 2.0),
            "the eps of blocks.0.norm1 is no small number",
        ),
        (b"torch.nn.modules.activation\n", b"GELU", b"ReLU", "act is a ReLU, which AstroMAE"),
        (b"torch.nn.modules.pooling\n", b"AvgPool2d", b"MaxPool2d", "is a MaxPool2d, where"),
        (attribute("_modules"), b".", b"N", "DataParallel._modules is no dict|cannot be read"),
    ],
)
def test_a_module_that_would_compute_something_else_is_refused(
    small_original: Path, tmp_path: Path, before: bytes, old: bytes, new: bytes, complaint: str
) -> None:
    path = edited(small_original / "parallel.pt", tmp_path / "m.pt", before, old, new)
    with pytest.raises(ModelError, match=complaint):
        convert(path, tmp_path / "out")


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / "state_dict.pt", map_location="cpu")
    return loaded


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cls_token": None}, "has no cls_token of AstroMAE's shape"),
        ({"cls_token": torch.zeros(48)}, "has no cls_token of AstroMAE's shape"),
        ({"head.bias": None}, r"head\.bias"),
        ({"extra\x1b[31m": torch.zeros(1)}, r"Unexpected key.*extra\?\[31m"),
        ({"head.bias": torch.zeros(47)}, r"head\.bias.*48"),
        ({"head.bias": torch.zeros(48, dtype=torch.int64)}, r"head\.bias is torch\.int64"),
        (
            {"head.bias": torch.zeros(48).half()},
            r"head\.bias is float16, expected float32: save",
        ),
        ({"head.bias": torch.full((48,), torch.inf)}, r"head\.bias holds NaN or infinity"),
        ({"head.bias": 5}, r"head\.bias is no tensor"),
        ({"head.bias": torch.zeros(1).expand(48)}, "reaches beyond its storage"),
        ({"head.bias": torch.zeros(0)}, "empty or negative shape"),
        ({"inception_model.conv2d_init.bias": torch.ones(8)}, "be the same"),
        ({"blocks.x.norm1.bias": torch.ones(48)}, "do not fit"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    small_original: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    changed = {k: v for k, v in {**state_dict(small_original), **change}.items() if v is not None}
    torch.save(changed, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=complaint) as caught:
        convert(tmp_path / "m.pt", tmp_path / "out", heads=3)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tensors_in_another_memory_order_are_the_same_weights(
    small_original: Path, tmp_path: Path
) -> None:
    state = state_dict(small_original)
    state = {
        k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()
    }
    state["head.weight"] = torch.stack([state["head.weight"].T] * 2)[1].T  # strided, with offset
    torch.save(state, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "one", heads=3)
    convert(small_original / "state_dict.pt", tmp_path / "two", heads=3)
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (5, "holds int, expected AstroMAE's ViT_Astro"),
        ({}, "has no cls_token"),
        ({"state_dict": {}}, "holds a dict with 'state_dict' in it, .* save that alone"),
        (torch.nn.Sequential(), r"holds torch\.nn\.modules\.container\.Sequential, expected"),
        (torch.nn.DataParallel(torch.nn.Linear(1, 1)), r"holds torch.*Linear, expected"),
        ({"model": torch.zeros(1), "epoch": {"of": 5}}, "'epoch' in it"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=complaint):
        convert(tmp_path / "m.pt", tmp_path / "out")


def test_a_missing_field_of_a_module_means_the_published_value(
    small_original: Path, tmp_path: Path
) -> None:
    """As in files of older versions of torch, whose GELU had no `approximate`."""
    name = text("approximate").replace(b"\0", rb"\0")
    path = edited(small_original / "parallel.pt", tmp_path / "m.pt", b"", name, text("unknown"))
    assert convert(path, tmp_path / "out").config.depth == SMALL["depth"]


def test_an_uninteresting_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"m\.pt: holds NoneType, expected"):
        convert(pack(tmp_path / "m.pt", b"\x80\x02N."), tmp_path / "out")


def test_heads_that_were_guessed_are_told(tmp_path: Path) -> None:
    """A width of 64 is no multiple of the published 6."""
    torch.save(load_model(DEMO_MODEL).state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        ModelError, match=r"does not say how many heads; 6 were taken: give --heads"
    ):
        convert(tmp_path / "m.pt", tmp_path / "out")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, expected a file"):
        convert(tmp_path, tmp_path / "out")
