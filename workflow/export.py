"""Export a model for the engines that need no torch: what `cosmic model export` runs."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lambda_worker.atomic import replacing
from lambda_worker.engine import Array, EngineError, ModelError
from lambda_worker.exported import FORMAT, INPUTS, OUTPUT, export_of, fingerprint, open_file
from lambda_worker.fold import fold
from lambda_worker.model import AstroMAE
from lambda_worker.model_file import load_model

TOLERANCE = 2e-6  # largest difference in z, or of z where that is above 1
OPSET = 20  # the first with Gelu as one operation
ROWS = 48  # rows that an export is checked on

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """An export: its file, and the largest difference in z to the plain model, on `rows` rows."""

    path: Path
    difference: float
    rows: int


def export(
    model: Path, out: Path | None = None, step: Callable[[str], None] = lambda text: None
) -> Exported:
    """Write a model as one .onnx file, folded, with its fingerprint and config in the metadata.

    Args:
        model: a .safetensors file of ours.
        out: the file; default: beside the model, where the engines look for it.
        step: told what begins, for people.

    Raises:
        ModelError: the model cannot be read, or what was made of it predicts something else.
        EngineError: a package is missing.
        OSError: the file cannot be written.
        After any error an earlier export is as it was.
    """
    step(f"export: reading {model}")
    plain, source = load_model(model), fingerprint(model)
    step("export: translating, some ten seconds")
    content = _translate(plain, {"format": FORMAT, "source_sha256": source})
    path = out or Path(export_of(str(model)))
    step(f"export: comparing ONNX Runtime with torch on {ROWS} rows")
    with replacing(path) as partial:
        partial.write_bytes(content)
        difference = _difference(plain, partial)
    return Exported(path, difference, ROWS)


def _translate(plain: AstroMAE, facts: dict[str, str]) -> bytes:
    """The folded model as the bytes of an ONNX file."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch asks for it late, and at length)
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    images, magnitudes = (torch.from_numpy(array) for array in _rows(plain, 3))
    any_number = {0: torch.export.Dim("rows")}
    with _quiet():
        program = torch.onnx.export(
            fold(_unscaled(plain)),
            (images, magnitudes),
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_shapes=(any_number, any_number),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto: Any = program.model_proto
    graph = proto.graph
    graph.ClearField("value_info")
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")  # a sixth of a small file: stack traces, names in torch
    config = json.dumps(asdict(plain.config))
    onnx.helper.set_model_props(proto, {**facts, "config": config})
    content: bytes = proto.SerializeToString()
    return content


def _unscaled(plain: AstroMAE) -> AstroMAE:
    """The same model for magnitudes that are scaled already, as the engines do it."""
    bare = AstroMAE(replace(plain.config, magnitude_mean=(), magnitude_mix=()))
    bare.load_state_dict(plain.state_dict(), assign=True)
    return bare.eval()


def _difference(plain: AstroMAE, path: Path) -> float:
    """Largest difference in z between the file in ONNX Runtime and torch.

    Raises:
        ModelError: it is larger than `TOLERANCE`.
    """
    images, magnitudes = _rows(plain, ROWS)
    with torch.inference_mode():
        wanted = plain(torch.from_numpy(images), torch.from_numpy(magnitudes)).numpy()
    try:
        found = open_file(path, "onnx", "fp32", 1)(images, magnitudes)
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    differences = np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)
    if not (differences <= TOLERANCE).all():  # NaN is not
        raise ModelError(
            f"export not written: its predictions differ by up to {differences.max():.1e} from "
            f"torch's, more than {TOLERANCE:.0e}"
        )
    return float(differences.max())


def _missing(error: ModuleNotFoundError) -> EngineError:
    return EngineError(f"{error.name} is not installed: pip install 'cosmic-fmi[export]'")


def _rows(plain: AstroMAE, rows: int) -> tuple[Array, Array]:
    """Rows in the range of real ones: fluxes in nanomaggies, magnitudes."""
    config, random = plain.config, np.random.default_rng(0)
    images = 3 * random.random((rows, config.bands, config.image_size, config.image_size))
    magnitudes = 16 + 6 * random.random((rows, config.bands))
    return images.astype(np.float32), magnitudes.astype(np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
