"""The plan of a sweep of four runs."""

from __future__ import annotations

from typing import Any

from workflow.sweep_plan import Plan

SMALL: dict[str, Any] = {"world_sizes": (1, 2), "batch_sizes": (8, 16), "data_sizes": ("small",)}


def plan(**fields: Any) -> Plan:
    """Make it, with some fields otherwise."""
    return Plan(**{**SMALL, "repeat": 1, "seed": 7} | fields)
