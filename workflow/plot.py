"""Predicted against spectroscopic redshift, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

__all__ = ["redshift_png", "save_plot"]

_DPI = 150
_BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
# |z_phot - z_spec| / (1 + z_spec) beyond which a photometric redshift counts as an outlier, as
# usual (Hildebrandt et al. 2010, A&A 523, A31).
OUTLIER = 0.15


def save_plot(predictions: str, metrics: Mapping[str, float | None], url: str) -> None:
    """Draw the predictions of a run and write the picture to ``url``.

    Args:
        predictions: URL of the run's predictions.npz; rows whose z_phot is NaN are left out, as
            in the metrics. At least one row must remain.
        metrics: as in `redshift_png`.

    Raises:
        StorageError: a file cannot be read or written.
    """
    import numpy as np

    from lambda_worker import storage

    with np.load(io.BytesIO(storage.read(predictions)), allow_pickle=False) as rows:
        z_spec, z_phot = rows["z_spec"], rows["z_phot"]
    used = np.isfinite(z_phot)
    storage.write(url, redshift_png(z_spec[used], z_phot[used], metrics))


def redshift_png(z_spec: Floats, z_phot: Floats, metrics: Mapping[str, float | None]) -> bytes:
    """Draw z_phot and its scaled residual against z_spec, and return the picture as PNG.

    Args:
        z_spec, z_phot: (N,) spectroscopic and predicted redshifts, dimensionless; N ≥ 1.
        metrics: ``nmad``, ``bias`` and ``r2`` of these rows, as `summarize` gives them; r2 is None
            where all z_spec are equal.
    """
    # A Figure of its own, not pyplot's: no window, no global state.
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    norm = LogNorm(vmin=1, vmax=10)
    figure = Figure(figsize=(7, 8), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    limit = _limit(z_spec, z_phot)
    above = _predictions(upper, z_spec, z_phot, limit, norm)
    residual = (z_phot - z_spec) / (1 + z_spec)
    below = _residuals(lower, z_spec, residual, limit, metrics["nmad"] or 0.0, norm)
    norm.vmax = max([10.0, *_counts(above), *_counts(below)])
    figure.colorbar(
        above, ax=[upper, lower], label="galaxies per cell", format="{x:,.0f}", pad=0.02, aspect=40
    )
    figure.suptitle(_title(len(z_spec), metrics))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _predictions(
    axes: Axes, z_spec: Floats, z_phot: Floats, limit: float, norm: LogNorm
) -> PolyCollection:
    density = _density(axes, z_spec, z_phot, (0, limit, 0, limit), norm)
    axes.plot([0, limit], [0, limit], "--", color="black", linewidth=1, label="z_phot = z_spec")
    _outlier_lines(axes, z_spec, z_phot, limit)
    axes.set(xlim=(0, limit), ylim=(0, limit), ylabel="predicted redshift z_phot")
    axes.legend(loc="upper left", framealpha=0.8, edgecolor="none")
    return density


def _outlier_lines(axes: Axes, z_spec: Floats, z_phot: Floats, limit: float) -> None:
    """Draw where |Δz| = OUTLIER, and say how many galaxies lie beyond, outside the panel or in."""
    beyond = int((abs(z_phot - z_spec) > OUTLIER * (1 + z_spec)).sum())
    label = f"|Δz| = {OUTLIER}; beyond: {beyond:,} ({beyond / len(z_spec):.2%})"
    for sign, text in ((1, label), (-1, None)):
        edge = [z + sign * OUTLIER * (1 + z) for z in (0.0, limit)]
        axes.plot([0, limit], edge, ":", color="tab:red", linewidth=1, label=text)


def _residuals(
    axes: Axes, z_spec: Floats, residual: Floats, limit: float, nmad: float, norm: LogNorm
) -> PolyCollection:
    # Wide enough to show the scatter's shape; wild outliers would flatten it, so they are counted.
    reach = max(6 * nmad, 0.02)
    density = _density(axes, z_spec, residual, (0, limit, -reach, reach), norm)
    axes.axhline(0, linestyle="--", color="black", linewidth=1)
    for edge in (-nmad, nmad):
        axes.axhline(edge, linestyle=":", color="black", linewidth=1)
    outside = int((abs(residual) > reach).sum())
    note = f"dotted: ±NMAD; {outside:,} of {len(residual):,} outside this panel"
    axes.text(0.01, 0.03, note, transform=axes.transAxes, fontsize="small", bbox=_BEHIND)
    axes.set(xlim=(0, limit), ylim=(-reach, reach), xlabel="spectroscopic redshift z_spec")
    axes.set_ylabel("(z_phot − z_spec) / (1 + z_spec)", fontsize="small")  # noqa: RUF001
    return density


def _density(
    axes: Axes, x: Floats, y: Floats, extent: tuple[float, float, float, float], norm: LogNorm
) -> PolyCollection:
    inside = (x >= extent[0]) & (x <= extent[1]) & (y >= extent[2]) & (y <= extent[3])
    # Hexagons with nearly equal sides in either panel.
    cells = (60, 35) if extent[2] == 0 else (60, 12)
    return axes.hexbin(
        x[inside], y[inside], gridsize=cells, extent=extent, mincnt=1, cmap="viridis", norm=norm
    )


def _counts(cells: PolyCollection) -> list[float]:
    counts = cells.get_array()
    return [] if counts is None else [float(count) for count in counts]


def _limit(z_spec: Floats, z_phot: Floats) -> float:
    """Return the upper end of the redshift axes: nearly all galaxies lie below it."""
    import numpy as np

    both = np.quantile([z_spec, z_phot], 0.999, axis=1)
    return max(float(both.max()), 0.01) * 1.05


def _title(rows: int, metrics: Mapping[str, float | None]) -> str:
    forms = {"NMAD": ("nmad", ".4f"), "bias": ("bias", "+.4f"), "R²": ("r2", ".3f")}
    values = {name: (metrics[key], form) for name, (key, form) in forms.items()}
    shown = [f"{name} = {v:{form}}" for name, (v, form) in values.items() if v is not None]
    return "   ".join([f"N = {rows:,}", *shown])
