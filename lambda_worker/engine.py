"""What predicts: a model in an inference engine, as a function of numpy arrays.

Nothing heavy is imported before an engine is opened: events name engines, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lambda_worker.threads import cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Engine = Literal["torch", "onnx", "openvino", "auto"]
Precision = Literal["fp32", "bf16"]

LIBRARIES: dict[Engine, str] = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}
"""The package of each engine."""

Array: TypeAlias = "NDArray[np.float32]"

Predict: TypeAlias = "Callable[[Array, Array], Array]"
"""Images (B, 5, 32, 32) in nanomaggies and magnitudes (B, 5), ugriz, in; z_phot (B,) out."""

# Instructions that multiply in bfloat16, as /proc/cpuinfo names them: of x86, and of ARM.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
CPUINFO = Path("/proc/cpuinfo")

DEMO_MODEL = Path(__file__).parent / "demo_model" / "model.safetensors"


class ModelError(ValueError):
    """A model file is missing, truncated, or not one of ours; the text says which."""


class EngineError(ValueError):
    """This machine cannot run what was asked for; the text says what it lacks."""


def open_engine(
    model: Path,
    *,
    engine: Engine = "torch",
    precision: Precision = "fp32",
    threads: int | None = None,
) -> Predict:
    """Load a model file into an engine.

    Args:
        model: a safetensors file as `save_model` writes it; for onnx and openvino also its export.
        engine: what computes; onnx and openvino run the export beside the model (`exported`).
        precision: "bf16" multiplies in bfloat16: faster, and about 1e-3 off in z.
        threads: of this process; default: as many as it has cores.

    Returns:
        A function that several threads must not call at once. A row's prediction depends neither
        on the rows beside it nor on `threads`.

    Raises:
        ModelError: the file is missing, unreadable, truncated, or not one of ours.
        EngineError: the engine is not there, or the processor has no instructions for bf16.
    """
    if precision == "bf16" and not has_bf16():
        raise EngineError(
            "precision bf16: this processor has no instructions for it "
            f"({', '.join(sorted(BF16_FLAGS))}), so that it would be slower than fp32"
        )
    from lambda_worker.exported import choose, open_exported

    if engine == "auto":
        engine, place = choose(engine, precision, str(model))
        model = Path(place)
    if engine != "torch":
        return open_exported(model, engine, precision, threads or cores())
    from lambda_worker.torch_engine import open_torch

    return open_torch(model, precision, threads or cores())


def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16; elsewhere that is emulated, which is slow."""
    return bool(BF16_FLAGS & set(CPUINFO.read_text().split()))
