"""Versions of what is installed, for whoever compares results."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Python's version and those of packages, by name."""
    return {"python": platform.python_version()} | {each: installed(each) for each in packages}
