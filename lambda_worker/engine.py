"""What predicts: a model in an inference engine, as a function of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Predict = Callable[[Array, Array], Array]
"""Images (B, 5, 32, 32) in nanomaggies and magnitudes (B, 5), ugriz, in; z_phot (B,) out."""


def open_engine(model: Path, *, threads: int | None = None) -> Predict:
    """Load a model file.

    Args:
        model: a safetensors file as `save_model` writes it.
        threads: of this process; default: as many as torch thinks best.

    Raises:
        ModelError: the file is missing, unreadable, truncated, or not one of ours.
    """
    import torch

    from lambda_worker.model import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    module = load_model(model)

    def predict(images: Array, magnitudes: Array) -> Array:
        with torch.inference_mode():
            z_phot = module(torch.from_numpy(images), torch.from_numpy(magnitudes))
        out: Array = z_phot.numpy()
        return out

    return predict
