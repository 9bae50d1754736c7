"""Engines that need no torch: ONNX Runtime and OpenVINO, on what `cosmic model export` wrote.

An export is one .onnx file beside the model's .safetensors file. Its metadata say what it is and
of which model file: after a change of the model, the old export is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lambda_worker import storage
from lambda_worker.engine import (
    LIBRARIES,
    Array,
    Engine,
    EngineError,
    ModelError,
    Precision,
    Predict,
)
from lambda_worker.slices import SLICE, in_slices

FORMAT = "cosmic-astromae-onnx-1"
INPUTS, OUTPUT = ("images", "magnitudes"), "z_phot"
METADATA_FIELD = 14  # of ONNX's ModelProto: key and value, fields 1 and 2 of an entry
MAX_ENTRY = 1 << 20

Scale = Callable[[Array], Array]


def export_of(model: str) -> str:
    """Path or URL of a model's export, `m.onnx` for `m.safetensors`; an export's is its own."""
    return model if model.endswith(".onnx") else f"{model.removesuffix('.safetensors')}.onnx"


def choose(engine: Engine, precision: Precision, model: str) -> tuple[Engine, str]:
    """What "auto" means here and now, and the file that the engine reads.

    Args:
        engine: "auto" takes the fastest engine whose package is installed here and whose export
            is there, torch at last; any other is taken at its word.
        model: path or URL, of a .safetensors file or of its export.

    Raises:
        EngineError: the engine cannot do that. ModelError: its export is missing or stale.
        StorageError: the model is not there, or its folder cannot be listed.
    """
    export = export_of(model)
    if engine == "auto":
        engine = _fastest(precision) if _is_there(export) else "torch"
    if engine == "torch":
        if model == export:
            raise EngineError(f"engine torch: reads .safetensors files, not {model}")
        storage.check_there(model)  # else each rank would find out for itself
        return engine, model
    _check_precision(engine, precision)
    if not _is_there(export):
        raise _missing(export, model)
    if path := storage.local_path(export):
        check(path)
    return engine, export


def _fastest(precision: Precision) -> Engine:
    if find_spec(LIBRARIES["openvino"]):
        return "openvino"
    return "onnx" if find_spec(LIBRARIES["onnx"]) and precision == "fp32" else "torch"


def _is_there(url: str) -> bool:
    if path := storage.local_path(url):
        return path.is_file()
    folder, _, name = url.rpartition("/")
    return name in storage.names(folder)


def open_exported(model: Path, engine: Engine, precision: Precision, threads: int) -> Predict:
    """Load the export of a model; `engine.open_engine` says more.

    Args:
        model: the .safetensors file or its export.
        engine: "onnx" or "openvino".

    Raises:
        ModelError: no export there, or a stale or damaged one, or none of ours.
        EngineError: the engine's package is not installed, or cannot compute in this precision.
    """
    _check_precision(engine, precision)
    path = Path(export_of(str(model)))
    check(path)
    try:
        return open_file(path, engine, precision, threads)
    except ModuleNotFoundError as error:
        if error.name != LIBRARIES[engine]:
            raise
        raise EngineError(
            f"engine {engine}: {LIBRARIES[engine]} is not installed here: "
            f"pip install 'cosmic-fmi[{engine}]'"
        ) from None


def open_file(path: Path, engine: Engine, precision: Precision, threads: int) -> Predict:
    """Load an export that is known to be good; errors are `open_exported`'s, and ImportError."""
    scale = _scaling(read_metadata(path), path)
    if engine == "openvino":
        predict = in_slices(_openvino(path, precision, threads), size=SLICE * threads)
    else:
        # Its own threads would divide every operation, and spin between them, at a neighbour's
        # expense. Ours divide the batch, which is faster, too.
        mapped: Any = map if threads == 1 else ThreadPoolExecutor(threads, "onnx").map
        predict = in_slices(_onnx(path), mapped, threads)
    return lambda images, magnitudes: predict(images, scale(magnitudes))


def _scaling(facts: dict[str, str], path: Path) -> Scale:
    """The scaling of the magnitudes, which an export leaves out: bfloat16 has too few digits."""
    try:
        config = json.loads(facts["config"])
        mean, mix = (np.array(config[f"magnitude_{name}"], np.float32) for name in ("mean", "mix"))
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    if not mean.size:
        return lambda magnitudes: magnitudes
    # Not as a matrix product: its last bits depend on how many rows there are.
    return lambda magnitudes: ((magnitudes - mean)[:, :, None] * mix).sum(1)


def _check_precision(engine: Engine, precision: Precision) -> None:
    if engine == "onnx" and precision != "fp32":
        raise EngineError(f"engine onnx: computes in fp32, not {precision}; openvino and torch do")


def _onnx(path: Path) -> Predict:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings tell of its own optimisations
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except (states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.NotImplemented) as bad:
        raise _damaged(path, bad) from bad

    def run(images: Array, magnitudes: Array) -> Array:
        inputs = dict(zip(INPUTS, (images, magnitudes), strict=True))
        found: Array = session.run([OUTPUT], inputs)[0]
        return found

    return run


def _openvino(path: Path, precision: Precision, threads: int) -> Predict:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Unless told, it takes bf16 wherever the processor has it.
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        # Two ranks on one machine would pin their threads to the same core.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    except RuntimeError as bad:
        raise _damaged(path, bad) from bad

    def run(images: Array, magnitudes: Array) -> Array:
        inputs = dict(zip(INPUTS, (images, magnitudes), strict=True))
        found: Array = request.infer(inputs, share_inputs=True)[OUTPUT]
        return found

    return run


def check(path: Path) -> None:
    """Refuse what is no export of ours, or the export of another model than the one beside it.

    Raises:
        ModelError: says what to do.
    """
    facts = read_metadata(path)
    if facts.get("format") != FORMAT:
        raise ModelError(f"{path}: an ONNX file, but none that cosmic model export wrote")
    source = path.with_suffix(".safetensors")
    if source.is_file() and fingerprint(source) != facts.get("source_sha256"):
        raise ModelError(
            f"{path}: exported from another model than {source.name} beside it; "
            f"export that again: cosmic model export {source}"
        )


def fingerprint(path: Path) -> str:
    """SHA-256 of a model file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file, read without its weights and without a library.

    Raises:
        ModelError: missing, truncated, or no ONNX file.
    """
    try:
        with path.open("rb") as file:
            entries = [
                dict(_fields(io.BytesIO(entry), {1, 2}))
                for _, entry in _fields(file, {METADATA_FIELD})
            ]
        return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}
    except FileNotFoundError:
        raise _missing(str(path), str(path.with_suffix(".safetensors"))) from None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no whole ONNX file; export it again") from error


def _fields(file: BinaryIO, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Number and content of the wanted fields of a protobuf message that fills the file.

    Raises:
        ValueError: it is none, or does not end where the file does.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    while (at := file.tell()) < size:
        number, kind = divmod(_varint(file), 8)
        length = _varint(file) if kind in (0, 2) else -1
        if kind == 0:
            continue  # a number, which is read
        at = file.tell()
        if not 0 <= length <= size - at:
            raise ValueError(f"field {number} at {at} does not fit into the file")
        if number in wanted and length <= MAX_ENTRY:
            yield number, file.read(length)
        file.seek(at + length)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("ends within a number")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than 64 bits")


def _missing(export: str, model: str) -> ModelError:
    if model == export:
        model = f"{export.removesuffix('.onnx')}.safetensors"
    return ModelError(f"no export at {export}; make it: cosmic model export {model}")


def _damaged(path: Path, error: Any) -> ModelError:
    first = str(error).strip().partition("\n")[0]
    return ModelError(f"{path}: cannot be loaded, export it again: {first[:200]}")
