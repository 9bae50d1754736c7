"""What the worker's tests share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MakePt = Callable[..., Path]


def tensors(rows: int, seed: int = 0, wide: torch.dtype = torch.float32) -> list[Tensor]:
    """Images, magnitudes and redshift that the demo model gives moderate answers for."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand((rows, 5, 32, 32), generator=random) * 3
    magnitudes = 17 + torch.rand((rows, 5), generator=random, dtype=wide)
    return [images, magnitudes, 0.05 + 0.3 * torch.rand(rows, generator=random, dtype=wide)]
