"""What the worker's tests share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lambda_worker.model import AstroMAE, ModelConfig

MakePt = Callable[..., Path]

RECORD = {  # the reference's ten keys
    "total_cpu_time (seconds)",
    "total_cpu_memory (MB)",
    "execution_time (seconds/batch)",
    "num_batches",
    "batch_size",
    "device",
    "throughput_bps",
    "sample_persec",
    "result_path",
    "data_path",
}
RECORD |= {"rank", "world_size", "rows", "rows_excluded", "bits"}
RECORD |= {"MAE", "MSE", "bias", "NMAD", "R2"}
RECORD |= {"wall_time (seconds)", "join_time (seconds)", "peak_memory (MB)", "links"}
RECORD |= {"read_time (seconds)", "bytes_read", "read_requests"}
RECORD |= {"init_time (seconds)", "memory_limit (MB)", "spans"}
"""What every rank's record holds."""


def tensors(rows: int, seed: int = 0, wide: torch.dtype = torch.float32) -> list[Tensor]:
    """Images, magnitudes and redshift that the demo model gives moderate answers for."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand((rows, 5, 32, 32), generator=random) * 3
    magnitudes = 17 + torch.rand((rows, 5), generator=random, dtype=wide)
    return [images, magnitudes, 0.05 + 0.3 * torch.rand(rows, generator=random, dtype=wide)]


SMALL = ModelConfig(
    width=48,
    depth=2,
    heads=3,
    pcm_groups=12,
    stem=8,
    inception=(4, 4, 4, 4, 2),
    magnitude_width=16,
    branch_width=24,
    head_width=16,
)


def trained(config: ModelConfig, seed: int = 0) -> AstroMAE:
    """A model with random weights of which none is left at its neutral start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AstroMAE(config)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                    value.uniform_(0.5, 2)  # of norms
                elif name.endswith(("running_mean", "bias", "cls_token", "pos_embed")):
                    value.normal_(0, 0.1)
    return model.eval()
