"""Train the demo model on the packaged catalogue: what `cosmic model train` runs.

Split "train" is learned from, "val" decides which epoch's weights are kept, and "test" is only
looked at once, at the end.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lambda_worker import metrics
from lambda_worker.atomic import replacing
from lambda_worker.model import AstroMAE, ModelConfig
from lambda_worker.model_file import save_model
from workflow.demo.catalogue import CATALOGUE, Split, load_catalogue
from workflow.demo.galaxies import GalaxyArrays, make_dataset

EPOCHS = 30
BATCH = 128
PEAK_RATE, WEIGHT_DECAY = 2e-3, 1e-2
HUBER = 0.02  # redshift error beyond which the loss grows linearly: outliers must not rule
FIRST_ROWS = 256  # test rows whose metrics are recorded apart, for a quick check of a model file
REALISATIONS = 3  # cutouts simulated per training row
SOFTENING = (0.3, 0.1, 0.15, 0.25, 1.0)  # nanomaggies: about five times each band's sky noise

Progress = Callable[[str, int, int], None]


class Sample(NamedTuple):
    """N objects as tensors: images (N, 5, 32, 32), magnitudes (N, 5), redshift (N,)."""

    images: Tensor
    magnitudes: Tensor
    redshift: Tensor


def train(
    folder: str | Path,
    *,
    epochs: int = EPOCHS,
    rows: int | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Train, keep the epoch that is best on "val", judge it on "test", and write three files.

    `model.safetensors` (weights, config, provenance), `training_log.json` (one record per epoch)
    and `metrics.json` (held-out metrics). The seed fixes data, start and order of batches; sums in
    a different order on another machine still move the last digits.

    Args:
        folder: where the files go.
        epochs: passes over the training rows.
        rows: use only so many rows of each split, for a quick try.
        seed: at least 0.
        progress: called with a stage ("simulate", "train", "evaluate"), steps done and steps.

    Returns:
        What metrics.json holds.

    Raises:
        OSError: the folder cannot be written.
    """
    started = time.perf_counter()
    Path(folder).mkdir(parents=True, exist_ok=True)  # rather than find out after the training
    samples = {split: _simulate(split, rows, seed, progress) for split in ("train", "val")}
    torch.manual_seed(seed)
    model = build(demo_config(samples["train"].magnitudes), float(samples["train"].redshift.mean()))
    log = fit(model, samples["train"], samples["val"], epochs, seed, progress)
    seconds = time.perf_counter() - started
    test = _simulate("test", rows, seed, progress)
    report = _report(model, test, log, seed, seconds, progress)
    _write(Path(folder), model, log, report)
    return report


def demo_config(magnitudes: Tensor) -> ModelConfig:
    """The demo's sizes; magnitudes (N, 5) of the training rows set the scaling.

    They enter whitened (no mean, unit covariance): differences of bands are colours, which carry
    the redshift and hardly vary where brightness varies a lot.
    """
    values = magnitudes.double()
    mean = values.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(values.T))
    mix = axes / variances.sqrt()
    return ModelConfig(
        width=64,
        depth=3,
        heads=4,
        mlp_ratio=2,
        pcm_groups=16,
        stem=16,
        inception=(8, 8, 8, 8, 4),
        magnitude_width=160,
        branch_width=160,
        head_width=160,
        asinh_softening=SOFTENING,
        magnitude_mean=tuple(mean.tolist()),
        magnitude_mix=tuple(tuple(row) for row in mix.tolist()),
    )


def build(config: ModelConfig, mean_redshift: float) -> AstroMAE:
    """A model with fresh weights that starts from the mean redshift."""
    model = AstroMAE(config)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    nn.init.constant_(model.get_parameter("concat_block.2.bias"), mean_redshift)
    return model


def fit(
    model: AstroMAE, sample: Sample, val: Sample, epochs: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """Train in place; the model ends with the weights of the epoch with the lowest "val" loss.

    Returns:
        One record per epoch: epoch, train_loss, val_loss, val metrics, seconds since the start.
    """
    optimiser = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=WEIGHT_DECAY)
    batches = max(1, len(sample.redshift) // REALISATIONS // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=epochs * batches, pct_start=0.15
    )
    generator = torch.Generator().manual_seed(seed)
    log: list[dict[str, Any]] = []
    best = deepcopy(model.state_dict())
    started = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for number, batch in enumerate(_batches(sample, batches, generator)):
            losses.append(_step(model, batch, optimiser))
            schedule.step()
            progress("train", epoch * batches + number + 1, epochs * batches)
        record = {"epoch": epoch + 1, "train_loss": float(np.mean(losses)), **_judge(model, val)}
        log.append({**record, "seconds": round(time.perf_counter() - started, 1)})
        if record["val_loss"] == min(entry["val_loss"] for entry in log):
            best = deepcopy(model.state_dict())
    model.load_state_dict(best)
    model.eval()
    return log


def predict(model: AstroMAE, sample: Sample, progress: Progress | None = None) -> Tensor:
    """z_phot (N,) in eval mode."""
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(sample.redshift), 256):
            chunk = Sample(*(column[start : start + 256] for column in sample))
            parts.append(model(chunk.images, chunk.magnitudes))
            if progress:
                progress("evaluate", start + len(chunk.redshift), len(sample.redshift))
    return torch.cat(parts)


def _simulate(split: Split, rows: int | None, seed: int, progress: Progress) -> Sample:
    available = int((load_catalogue().split == split).sum())
    count = min(rows or available, available)
    if split == "train":
        # A full cycle of the split's rows first, then the same rows with new pixels.
        count *= REALISATIONS
    return to_sample(
        make_dataset(count, seed, split, lambda done, total: progress("simulate", done, total))
    )


def to_sample(arrays: GalaxyArrays) -> Sample:
    return Sample(*map(torch.from_numpy, (arrays.images, arrays.magnitudes, arrays.redshift)))


def _batches(sample: Sample, count: int, generator: torch.Generator) -> Iterator[Sample]:
    """One epoch: shuffled, mirrored and turned by quarters, since the sky has no upright."""
    order = torch.randperm(len(sample.redshift), generator=generator)
    for number in range(count):
        rows = order[number * BATCH : (number + 1) * BATCH]
        batch = Sample(*(column[rows] for column in sample))
        turns, mirror = torch.randint(4, (2,), generator=generator).tolist()
        images = batch.images.rot90(turns, (2, 3))
        images = images.flip(3) if mirror % 2 else images
        # Channels last: max pooling of channels-first images runs on one core, a quarter of a step.
        yield batch._replace(images=images.contiguous(memory_format=torch.channels_last))


def _step(model: AstroMAE, batch: Sample, optimiser: torch.optim.Optimizer) -> float:
    model.train()
    z_phot = model(batch.images, batch.magnitudes)
    loss = functional.smooth_l1_loss(z_phot, batch.redshift, beta=HUBER)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def _judge(model: AstroMAE, val: Sample) -> dict[str, Any]:
    z_phot = predict(model, val)
    loss = functional.smooth_l1_loss(z_phot, val.redshift, beta=HUBER)
    return {"val_loss": loss.item(), "val": metrics.compute(z_phot.numpy(), val.redshift.numpy())}


def _report(
    model: AstroMAE,
    test: Sample,
    log: list[dict[str, Any]],
    seed: int,
    seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    z_phot, z_spec = predict(model, test, progress).numpy(), test.redshift.numpy()
    few = min(FIRST_ROWS, len(z_spec))
    return {
        "split": "test",
        "n": len(z_spec),
        **metrics.compute(z_phot, z_spec),
        "first_rows": {"n": few, **metrics.compute(z_phot[:few], z_spec[:few])},
        "seed": seed,
        "epochs": len(log),
        "best_epoch": min(log, key=lambda entry: entry["val_loss"])["epoch"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "catalogue_sha256": hashlib.sha256(CATALOGUE.read_bytes()).hexdigest(),
    }


def _write(
    folder: Path, model: AstroMAE, log: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    provenance = {"data": "real SDSS magnitudes and redshifts, simulated pixels", **report}
    save_model(model, folder / "model.safetensors", provenance)
    for name, content in (("training_log.json", log), ("metrics.json", report)):
        with replacing(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
