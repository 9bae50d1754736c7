"""A model's file: weights, config and provenance in one safetensors file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from lambda_worker.archive import ZIP
from lambda_worker.atomic import replacing
from lambda_worker.engine import ModelError
from lambda_worker.model import AstroMAE, ModelConfig

FORMAT = "cosmic-astromae-1"
# One layer under two names: files carry it once.
TWIN, TWIN_OF = "inception_model.conv2d_init.", "inception_model.vis_inception.0."


def save_model(
    model: AstroMAE, path: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write weights, config and provenance into one safetensors file.

    Args:
        model: the model; its mode and device do not matter.
        path: the file to write; replaced as a whole or not at all.
        provenance: JSON-able facts about the training, kept in the metadata for readers.

    Raises:
        OSError: the folder cannot be made or the file not written (disk full, no permission).
    """
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(TWIN)
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(model.config)),
        "provenance": json.dumps(dict(provenance or {})),
    }
    with replacing(path) as partial:
        partial.write_bytes(serialise(tensors, metadata))


def load_model(path: str | Path, *, mapped: bool = False) -> AstroMAE:
    """Read a model that `save_model` wrote.

    Args:
        path: a safetensors file; `DEMO_MODEL` is the packaged one.
        mapped: leave the weights in the file, of which pages are read when they are used. For
            who makes others of them, as `fold` does; to predict with them is not reproducible.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        ModelError: the file is missing, unreadable, truncated, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = _parse_config(file.metadata() or {})
            # Cloned into aligned memory: in the mapped file an offset decides which kernel
            # torch picks, and the last bit of its result.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not mapped:
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return assemble(config, tensors)
    except FileNotFoundError as error:
        raise ModelError(f"no model file at {path}") from error
    except (OSError, SafetensorError) as error:
        hint = _hint(Path(path), error)
        raise ModelError(f"{path} is no whole safetensors file{hint}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _hint(path: Path, error: Exception) -> str:
    if path.is_dir():
        return ": it is a folder, name a file in it"
    with suppress(OSError), path.open("rb") as file:
        if file.read(4) == ZIP:
            return f", but one of PyTorch: make one of it by cosmic model convert {path}"
    return f": copy it again, or make it again ({error})"


def _parse_config(metadata: Mapping[str, str]) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"not an AstroMAE model of ours (format {metadata.get('format')!r}): "
            "expected what cosmic model train or convert has written"
        )
    try:
        values = json.loads(metadata["config"])
        return ModelConfig(**{name: _as_tuple(value) for name, value in values.items()})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"its config cannot be read: {error}") from error


def _as_tuple(value: Any) -> Any:
    """JSON knows lists only; a frozen config holds tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def assemble(config: ModelConfig, tensors: dict[str, Tensor]) -> AstroMAE:
    """The model of these weights, in eval mode; they are not copied.

    Raises:
        ModelError: names, shapes or types do not fit the config.
    """
    # The meta device allocates and initialises nothing: the file's tensors become the weights,
    # and a config that asks for absurd sizes costs no memory before the shapes are compared.
    try:
        if config.depth > len(tensors):
            raise ValueError(f"{len(tensors)} tensors for {config.depth} blocks")
        with torch.device("meta"):
            model = AstroMAE(config)
        for leaf in ("weight", "bias"):
            tensors[TWIN + leaf] = tensors[TWIN_OF + leaf]
        for name, expected in model.state_dict().items():
            if name in tensors and tensors[name].dtype != expected.dtype:
                raise TypeError(f"{name} is {tensors[name].dtype}")
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"its tensors do not fit its config: {_first(error)}") from error
    return model.eval()


def _first(error: Exception) -> str:
    """The first of torch's many lines that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[1:] if len(lines) > 1 and lines[0].endswith(":") else lines
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return told[0][:200] + more if told else type(error).__name__
