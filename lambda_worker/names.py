"""What an event may ask for by name; apart, so that reading an event needs not even numpy."""

from __future__ import annotations

from typing import Literal

Engine = Literal["torch", "onnx", "openvino", "auto"]
Precision = Literal["fp32", "bf16"]

LIBRARIES: dict[Engine, str] = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}
"""The package of each engine."""
