"""Original checkpoints, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from astromae_original import SMALL, make


@pytest.fixture(scope="session")
def small_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model's checkpoints: see `make`."""
    return make(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="session")
def full_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the published size's checkpoints."""
    return make(tmp_path_factory.mktemp("full"))
