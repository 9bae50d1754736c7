"""Demo data and demo model: real catalogue rows, simulated pixels, a small AstroMAE."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SOURCES = ("catalogue.csv", "catalogue.py", "galaxies.py", "psf_sky_epochs.csv", "render.py")


def data_path(name: str, split: str, seed: int) -> Path:
    """Return where a demo dataset is kept; another simulator would make another file.

    Args:
        name: a size's name, or a number of rows.
    """
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    return Path("data", f"demo-{name}-{split}-{seed}-{digest.hexdigest()[:8]}.pt")
