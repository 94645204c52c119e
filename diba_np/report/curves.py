"""Plots of comparisons (matplotlib, an optional extra)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diba_np.methods.comparison import Row

_BOUND = 6.0206  # dB a bit
_STYLES = ("-", "--", "-.", ":")
_SHADES = ("0.1", "0.35", "0.55")
_MARKERS = "os^vD<>Pp*hXd"


def check_matplotlib() -> None:
    """Raise an ImportError that says what to install, unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'diba-np[plot]'") from error


def plot_comparison(
    rows: Sequence[Row],
    path: str | os.PathLike[str],
    quality: str = "snr",
    title: str | None = None,
    kind: str | None = None,
) -> None:
    """Draw rate against quality, one labelled curve a method, and save the picture.

    Curves differ in marker, dash and shade of grey, and each carries its name at its right
    end, so nothing depends on colour. The Gaussian bound, 6.02 dB a bit, is the grey line.

    Parameters
    ----------
    rows : sequence of Row
        As `compare` returns them; rows with errors are left out.
    path : path-like
        File to write; its suffix is the format.
    quality : {"snr", "output_snr"}
    title : str, optional
    kind : str, optional
        File format, if the suffix does not tell it.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If no row has a finite value to draw.
    """
    if quality not in ("snr", "output_snr"):
        raise ValueError(f"quality must be snr or output_snr, got {quality!r}")
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        value = getattr(row, quality)
        if not row.error and np.isfinite(value):
            curves.setdefault(row.method, {})[row.bits_per_weight] = value
    if not curves:
        raise ValueError(f"rows must hold at least one finite {quality}, got none")

    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    right = max(max(points) for points in curves.values())
    top = max(max(points.values()) for points in curves.values())
    bottom = min(0.0, *(min(points.values()) for points in curves.values()))
    limit = top + 0.06 * max(top - bottom, 1e-9)
    axes.set_ylim(bottom, limit)
    axes.set_xlim(0, 1.22 * right)
    if quality == "snr":
        _draw_bound(axes, right, limit - bottom)
    ends = [
        _draw_curve(axes, index, method, points)
        for index, (method, points) in enumerate(curves.items())
    ]
    _label_ends(axes, ends, 1.06 * right, bottom, limit)
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("SNR of the weights (dB)" if quality == "snr" else "SNR of the outputs (dB)")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, parse_math=False)
    figure.savefig(path, dpi=130, format=kind)


class _End(NamedTuple):
    """The right end of a curve, to be labelled; ends sort by their height."""

    height: float
    rate: float
    method: str
    shade: str
    own: bool


def _draw_bound(axes: Axes, right: float, height: float) -> None:
    """Draw the Gaussian bound up to the rate `right`, and its name where the plot shows it."""
    axes.plot([0, right], [0, _BOUND * right], color="0.75", linewidth=3, zorder=0)
    at = min(right, height / _BOUND) * 0.8
    axes.annotate(
        "Gaussian bound",
        (at, _BOUND * at),
        (-8, 4),
        textcoords="offset points",
        color="0.4",
        ha="right",
    )


def _draw_curve(axes: Axes, index: int, method: str, points: dict[float, float]) -> _End:
    """Draw the curve of one method; ours, if it is the first, stands out."""
    x = sorted(points)
    y = [points[rate] for rate in x]
    own = index == 0 and method == "diba"
    shade = "black" if own else _SHADES[index % len(_SHADES)]
    axes.plot(
        x,
        y,
        linestyle="-" if own else _STYLES[index % len(_STYLES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markerfacecolor=shade if index % 2 == 0 else "white",
        markersize=6,
        color=shade,
        linewidth=2.4 if own else 1.1,
    )
    return _End(y[-1], x[-1], method, shade, own)


def _apart(heights: Sequence[float], bottom: float, limit: float) -> list[float]:
    """Return sorted heights pushed apart, so that labels there do not touch."""
    gap = (limit - bottom) / max(28, len(heights) + 1)
    places: list[float] = []
    for height in heights:
        lowest = places[-1] + gap if places else bottom + 0.5 * gap
        places.append(max(height, lowest))
    overflow = places[-1] - (limit - 0.5 * gap)
    if overflow > 0:
        places[-1] -= overflow
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    return places


def _label_ends(
    axes: Axes, ends: Sequence[_End], column: float, bottom: float, limit: float
) -> None:
    """Write the names of the curves in one column, each tied to the end of its curve."""
    ends = sorted(ends)
    places = _apart([end.height for end in ends], bottom, limit)
    for place, end in zip(places, ends, strict=True):
        axes.annotate(
            end.method,
            (end.rate, end.height),
            (column, place),
            fontsize=9,
            fontweight="bold" if end.own else "normal",
            color=end.shade if end.own else "0.1",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.7",
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )
