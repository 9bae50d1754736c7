"""The folded model against the plain one, evaluated in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lambda_worker.engine import DEMO_MODEL
from lambda_worker.fold import fold
from lambda_worker.model import AstroMAE, ModelConfig
from lambda_worker.model_file import load_model
from tests.worker.worker_data import SMALL, tensors, trained

SCALED = replace(
    SMALL,
    asinh_softening=(0.1, 0.2, 0.3, 0.4, 0.5),
    magnitude_mean=(19.0, 18.0, 17.5, 17.2, 17.0),
    magnitude_mix=tuple(tuple(0.1 * (row - 2 * column) for column in range(5)) for row in range(5)),
)


def exact(model: AstroMAE, images: Tensor, magnitudes: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.double()(images.double(), magnitudes.double())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SCALED,
        replace(SMALL, pcm_kernel=3),
        replace(SMALL, pcm_groups=1),
        replace(SMALL, norm_eps=0.03),
        replace(SMALL, pcm_groups=3, heads=6, mlp_ratio=2),
        replace(SMALL, image_size=48, patch=16, bands=3),
    ],
    ids=[
        "small",
        "scaled inputs",
        "3x3 PCM",
        "one group",
        "another epsilon",
        "other groups",
        "other images",
    ],
)
def test_the_same_function_for_every_config(config: ModelConfig) -> None:
    model, random = trained(config), torch.Generator().manual_seed(1)
    images = torch.rand((9, config.bands, config.image_size, config.image_size), generator=random)
    magnitudes = torch.rand((9, config.bands), generator=random)
    with torch.inference_mode():
        found = fold(model)(images, magnitudes)
    expected = exact(model, images, magnitudes)
    assert expected.std() > 1e-4  # else nothing is compared
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_full_size(form: torch.memory_format) -> None:
    model = trained(ModelConfig())
    folded = fold(model).to(memory_format=form)
    images, magnitudes, _ = tensors(16)
    with torch.inference_mode():
        found, plain = folded(images, magnitudes), model(images, magnitudes)
    assert (found - plain).abs().max() < 2e-6
    assert (found - exact(model, images, magnitudes)).abs().max() < 2e-6


def test_the_demo_model() -> None:
    model = load_model(DEMO_MODEL)
    images, magnitudes, _ = tensors(16)
    with torch.inference_mode():
        found = fold(model)(images, magnitudes)
    assert (found - exact(model, images, magnitudes)).abs().max() < 2e-6


def test_the_model_itself_stays_as_it_is() -> None:
    model = trained(SCALED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
