"""Pictures of one compressed matrix (matplotlib, an optional extra): what it keeps and loses.

`panels_of` makes the list that `plot_factors` draws on one page and `html_report` writes one after
the other, each with a sentence that says in words what the picture shows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import largest_magnitude, row_blocks
from diba_np.checks import as_matrix
from diba_np.matrix import quality
from diba_np.matrix.diagonals import DIAGONALS
from diba_np.matrix.packed_bits import PackedBits
from diba_np.report.curves import check_matplotlib

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix

# Okabe and Ito's colours, told apart with every kind of colour vision; each line also has a dash
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"

_LOOK = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}

# a heat map has at most this many cells a side, larger matrices share them; an error is random from
# entry to entry, so that its map tells more in coarse cells
_CELLS, _ERROR_CELLS = 512, 48
# singular values are computed for matrices up to this size on the shorter side
_LARGEST_SPECTRUM = 2048


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes
    ----------
    name : str
        Short and without spaces, for ids and file names.
    title : str
        Heading.
    text : str
        What the picture shows, in words and figures; the text alternative.
    draw : callable
        Draws on given matplotlib axes.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Any], None]


@contextmanager
def look() -> Iterator[None]:
    """Draw inside this context and every picture of the package looks the same."""
    import matplotlib as mpl

    with mpl.rc_context(_LOOK):
        yield


# -- heat maps -------------------------------------------------------------------------------------


def _starts(size: int, most: int) -> NDArray[np.intp]:
    """Return the first entry of each of at most `most` cells along a side."""
    return np.arange(min(size, most)) * size // min(size, most)


def cell_means(
    shape: tuple[int, int], rows_of: Callable[[slice], NDArray[Any]], most: int = _CELLS
) -> NDArray[np.float64]:
    """Return the mean of a matrix over cells; it is read in row blocks.

    Parameters
    ----------
    shape : (int, int)
    rows_of : callable
        Returns a slice of rows as an array.
    most : int, default 512
        Cells a side; sides up to that are left as they are.

    Returns
    -------
    (min(m, most), min(n, most)) float64
    """
    m, n = shape
    top, left = _starts(m, most), _starts(n, most)
    heights = np.diff(np.append(top, m))
    widths = np.diff(np.append(left, n))
    sums = np.zeros((top.size, left.size))
    row_of = np.repeat(np.arange(top.size), heights)
    for rows in row_blocks(shape):
        block = np.asarray(rows_of(rows), np.float64)
        np.add.at(sums, row_of[rows], np.add.reduceat(block, left, axis=1))
    return sums / heights[:, None] / widths


def _heat(
    values: NDArray[Any],
    shape: tuple[int, int],
    label: str,
    ends: tuple[float, float],
    colours: str,
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        m, n = shape
        image = axes.imshow(
            values,
            cmap=colours,
            vmin=ends[0],
            vmax=ends[1],
            aspect="auto",
            interpolation="nearest",
            extent=(0, n, m, 0),
        )
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        axes.figure.colorbar(image, ax=axes, label=label)

    return draw


def _matrix_panel(matrix: CompressedMatrix) -> Panel:
    values = cell_means(matrix.shape, matrix.row_expander())
    sizes = np.abs(values)
    largest = float(np.quantile(sizes, 0.995)) or float(sizes.max()) or 1.0
    m, n = matrix.shape
    shared = "" if max(m, n) <= _CELLS else "; a cell is the mean of its entries"
    return Panel(
        "matrix",
        "The compressed matrix, expanded",
        f"{m} × {n} entries, blue where negative and red where positive{shared}.",
        _heat(values, matrix.shape, "entry", (-largest, largest), "RdBu_r"),
    )


def _error_panel(matrix: CompressedMatrix, A: NDArray[Any]) -> Panel:
    expand = matrix.row_expander()
    unit = 1.0 / (largest_magnitude(A) or 1.0)

    def squared(rows: slice) -> NDArray[Any]:
        error = (A[rows].astype(np.float64) - expand(rows)) * unit
        return np.asarray(error * error)

    def energy(rows: slice) -> NDArray[Any]:
        return np.asarray((A[rows].astype(np.float64) * unit) ** 2)

    whole = math.sqrt(float(cell_means(matrix.shape, energy, 1)[0, 0]))
    cells = np.sqrt(cell_means(matrix.shape, squared, _ERROR_CELLS)) * (100 / (whole or 1.0))
    snr = quality.snr_db(A, matrix)
    return Panel(
        "error",
        "Where the error is",
        "Root mean square of the error in each cell, in percent of that of all entries: from "
        f"{cells.min():.0f} to {cells.max():.0f} %. Darker cells lose more. SNR {snr:.2f} dB.",
        _heat(
            cells,
            matrix.shape,
            "error (% of the rms entry)",
            (0, float(cells.max()) or 1.0),
            "cividis_r",
        ),
    )


def _joined(parts: list[PackedBits], axis: int) -> PackedBits:
    """Return the bits of all terms side by side."""
    if len(parts) == 1:
        return parts[0]
    return PackedBits(np.concatenate([bits.to_dense() for bits in parts], axis=axis))


def _bits_panel(bits: PackedBits, name: str, sides: tuple[str, str]) -> Panel:
    values = cell_means(bits.shape, lambda rows: bits[rows].to_dense())
    share = 100 * bits.count() / (bits.shape[0] * bits.shape[1])
    rows, columns = bits.shape

    def draw(axes: Any) -> None:
        _heat(values, bits.shape, "share of ones", (0, 1), "Greys")(axes)
        axes.set_ylabel(sides[0])
        axes.set_xlabel(sides[1])

    return Panel(
        name.lower(),
        f"{name}: {rows} × {columns} bits",
        f"{share:.1f} % of the bits are ones, drawn dark. A well-used bit matrix looks like noise; "
        "stripes are rows or components that do little.",
        draw,
    )


# -- curves ----------------------------------------------------------------------------------------


def _values(A: NDArray[Any]) -> NDArray[np.float64]:
    import scipy.linalg

    # SciPy's, not NumPy's: one BLAS for the whole package
    values: NDArray[np.float64] = scipy.linalg.svdvals(np.asarray(A, np.float64))
    return values


def _spectrum_panel(matrix: CompressedMatrix, A: NDArray[Any] | None) -> Panel:
    dense = matrix.to_dense()
    ours = _values(dense)
    curves = [("compressed", ours, BLUE, "-")]
    text = f"{ours.size} singular values of the compressed matrix, from {ours[0]:.3g} down."
    if A is not None:
        theirs, lost = _values(A), _values(A - dense.astype(np.float64))
        curves = [
            ("the matrix", theirs, "black", ":"),
            *curves,
            ("the error", lost, ORANGE, "--"),
        ]
        above = int(np.count_nonzero(theirs > lost[0]))
        text = (
            f"Singular values of the matrix, of its compressed form and of the error. {above} of "
            f"{theirs.size} stand above the largest of the error, {lost[0]:.3g}: these directions "
            "stand out of what was lost."
        )

    def draw(axes: Any) -> None:
        floor = max(values[0] for _, values, _, _ in curves) * 1e-5
        for label, values, colour, dash in curves:
            shown = np.where(values > floor, values, np.nan)
            axes.plot(np.arange(1, values.size + 1), shown, dash, color=colour, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("index, largest first")
        axes.set_ylabel("singular value")
        axes.grid(True)
        axes.legend()

    return Panel("spectrum", "Singular values kept", text, draw)


def _few_labels(value: float, _: int) -> str:
    """Label 2 and 5 between the powers of ten, and no other."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _diagonals_panel(matrix: CompressedMatrix) -> Panel:
    spans = []
    for name in DIAGONALS:
        sizes = [np.abs(getattr(term, name).astype(np.float64)) for term in matrix.terms]
        units = [np.sqrt(np.mean(size**2)) or 1.0 for size in sizes]
        scaled = [size / unit for size, unit in zip(sizes, units, strict=True)]
        spans.append(np.sort(np.concatenate(scaled))[::-1])

    def draw(axes: Any) -> None:
        for values, name, colour, dash in zip(
            spans, DIAGONALS, (BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=True
        ):
            share = 100 * (np.arange(values.size) + 0.5) / values.size
            shown = np.where(values > 1e-4, values, np.nan)
            axes.plot(share, shown, dash, color=colour, label=f"{name} ({values.size})")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_few_labels)
        axes.set_xlabel("share of the entries, largest first (%)")
        axes.set_ylabel("magnitude / rms of its diagonal")
        axes.grid(True)
        axes.legend()

    ranges = [f"{name} {s[0]:.2f}" for name, s in zip(DIAGONALS, spans, strict=True)]
    several = len(matrix.terms) > 1
    return Panel(
        "diagonals",
        f"The three diagonals of {len(matrix.terms)} terms" if several else "The three diagonals",
        "Magnitudes of the entries, sorted, in units of the root mean square of their diagonal. "
        f"Largest: {', '.join(ranges)}. A flat d2 means that all components matter alike.",
        draw,
    )


def _convergence_panel(record: dict[str, Any]) -> Panel | None:
    history = [float(v) for v in record.get("objective_history", []) if v and v > 0]
    if len(history) < 2:
        return None
    reached = [-10 * math.log10(v) for v in history]

    def draw(axes: Any) -> None:
        axes.plot(range(len(reached)), reached, "-o", color=BLUE, markersize=3.5)
        axes.set_xlabel("recorded step of the search")
        axes.set_ylabel("quality of the objective (dB)")
        axes.grid(True)

    seconds = record.get("seconds")
    took = "" if seconds is None else f" in {seconds:.3g} s"
    return Panel(
        "convergence",
        "How the search went",
        f"From {reached[0]:.2f} to {reached[-1]:.2f} dB in {record.get('sweeps', len(reached))} "
        f"sweeps{took}; the last tenth of the steps gained "
        f"{reached[-1] - reached[-max(2, len(reached) // 10)]:.3f} dB.",
        draw,
    )


def _storage_panel(matrix: CompressedMatrix) -> Panel:
    m, n = matrix.shape
    parts = {name: bits / 8 for name, bits in matrix.storage_breakdown().items() if bits}
    total = sum(parts.values())
    dense = 4.0 * m * n
    shades = dict(zip(parts, (BLUE, ORANGE, GREEN, GREY), strict=False))

    def draw(axes: Any) -> None:
        axes.barh(["float32", "float16"], [dense / 1000, dense / 2000], color="0.8")
        left = 0.0
        for name, size in parts.items():
            axes.barh(
                ["compressed"], [size / 1000], left=left, color=shades[name], label=name, height=0.8
            )
            left += size / 1000
        for place, size in enumerate((dense, dense / 2, total)):
            axes.annotate(
                f"1/{dense / size:.1f}" if size < dense else "1",
                (size / 1000, place),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xlim(0, 1.15 * dense / 1000)
        axes.invert_yaxis()
        axes.set_xlabel("size (kB)")
        axes.legend(loc="lower right")

    shares = ", ".join(f"{name} {size / 1000:.1f} kB" for name, size in parts.items())
    return Panel(
        "storage",
        "What is stored",
        f"{total / 1000:.1f} kB ({shares}), {matrix.bits_per_weight:.3f} bits a weight, against "
        f"{dense / 1000:.1f} kB in float32: 1/{dense / total:.1f}.",
        draw,
    )


# -- pages -----------------------------------------------------------------------------------------


def panels_of(matrix: CompressedMatrix, A: ArrayLike | None = None) -> list[Panel]:
    """Return the pictures of a compressed matrix, each with its text alternative.

    Parameters
    ----------
    matrix : CompressedMatrix
    A : (m, n) array_like, optional
        The matrix that it stands for: adds the error map and compares the singular values.

    Returns
    -------
    list of Panel
        Bits, diagonals and convergence only where there are any; singular values up to 2048 on
        the shorter side.

    Raises
    ------
    TypeError, ValueError
        `A` is no matrix of finite real numbers, or of another shape; the compressed one is empty.
    """
    if not matrix.storage_bits():
        raise ValueError("there is nothing to draw of an empty array")
    reference = None if A is None else as_matrix(A)
    if reference is not None and reference.shape != matrix.shape:
        raise ValueError(f"A must have shape {matrix.shape}, got {reference.shape}")
    panels = [_matrix_panel(matrix)]
    if reference is not None:
        panels.append(_error_panel(matrix, reference))
    if min(matrix.shape) <= _LARGEST_SPECTRUM:
        panels.append(_spectrum_panel(matrix, reference))
    if matrix.terms:
        b1 = _joined([term.b1 for term in matrix.terms], 1)
        b2 = _joined([term.b2 for term in matrix.terms], 0)
        panels.append(_bits_panel(b1, "B1", ("row", "component")))
        panels.append(_bits_panel(b2, "B2", ("component", "column")))
        panels.append(_diagonals_panel(matrix))
    convergence = _convergence_panel(matrix.record)
    if convergence is not None:
        panels.append(convergence)
    panels.append(_storage_panel(matrix))
    return panels


def draw_page(
    panels: list[Panel], title: str | None = None, columns: int = 4, headings: bool = True
) -> Any:
    """Return a matplotlib figure with the panels side by side, row after row.

    Parameters
    ----------
    panels : list of Panel
    title : str, optional
    columns : int, default 4
    headings : bool, default True
        Write the title of each panel over it.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with look():
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            panel.draw(axes)
            if headings:
                axes.set_title(panel.title)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    return figure


def plot_factors(
    matrix: CompressedMatrix,
    path: str | os.PathLike[str],
    A: ArrayLike | None = None,
    title: str | None = None,
    kind: str | None = None,
) -> list[Panel]:
    """Draw a compressed matrix on one page and save it.

    Parameters
    ----------
    matrix : CompressedMatrix
    path : path-like
        File to write; its suffix is the format (png, svg, pdf).
    A : (m, n) array_like, optional
        The matrix that it stands for.
    title : str, optional
        By default shape, size and, with `A`, the SNR.
    kind : str, optional
        File format, if the suffix does not tell it.

    Returns
    -------
    list of Panel
        What was drawn, with the texts that say it in words.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        As `panels_of`.
    """
    check_matplotlib()
    panels = panels_of(matrix, A)
    figure = draw_page(panels, headline(matrix, A) if title is None else title)
    with look():
        figure.savefig(path, dpi=110, format=kind)
    return panels


def headline(matrix: CompressedMatrix, A: ArrayLike | None = None) -> str:
    """Return one line of figures: shape, method, size and, with `A`, the SNR."""
    m, n = matrix.shape
    inner = f"k = {matrix.k}" if matrix.terms else matrix.method
    reached = "" if A is None else f", SNR {quality.snr_db(A, matrix):.2f} dB"
    return f"{m} × {n}, {inner}, {matrix.bits_per_weight:.3f} stored bits a weight{reached}"
