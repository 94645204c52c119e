"""`html_report`: one file that tells about a compressed matrix, for any browser and off line."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from diba_np._version import __version__
from diba_np.matrix import quality
from diba_np.report.pictures import Panel, draw_page, headline, look, panels_of

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 2rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
pre { overflow-x: auto; background: #f4f4f4; padding: 1rem; font-size: .85rem; }
"""


def _facts(matrix: CompressedMatrix, A: ArrayLike | None) -> list[tuple[str, str]]:
    m, n = matrix.shape
    facts = [("shape", f"{m} × {n}"), ("method", matrix.method)]
    if matrix.terms:
        alphabet = "0 and 1" if not matrix.shift else f"{-matrix.shift:g} and {1 - matrix.shift:g}"
        sizes = ", ".join(str(term.k) for term in matrix.terms)
        terms = f" in {len(matrix.terms)} terms of {sizes}" if len(matrix.terms) > 1 else ""
        facts += [("intermediate dimension k", f"{matrix.k}{terms}"), ("bits stand for", alphabet)]
    ratio = matrix.storage_ratio()
    facts += [
        ("stored bits a weight", f"{matrix.bits_per_weight:.4f}"),
        ("share of float32", f"{ratio:.5f} (1/{1 / ratio:.1f})"),
    ]
    if A is not None:
        facts.append(("SNR of the weights", f"{quality.snr_db(A, matrix):.3f} dB"))
    record = matrix.record
    if record.get("snr_db") is not None:
        facts.append(("SNR when made", f"{record['snr_db']:.3f} dB"))
    if "solver" in record:
        facts.append(("made by", f"solver {record['solver']}, seed {record.get('seed')}"))
    return facts


def html_report(
    matrix: CompressedMatrix,
    A: ArrayLike | None = None,
    title: str | None = None,
    panels: Sequence[Panel] | None = None,
) -> str:
    """Return a self-contained HTML page: figures, pictures with text alternatives, the record.

    Parameters
    ----------
    matrix : CompressedMatrix
    A : (m, n) array_like, optional
        The matrix that it stands for.
    title : str, optional
    panels : sequence of Panel, optional
        The pictures; by default all of `panels_of`.

    Returns
    -------
    str
        The page; it asks for nothing from any other place and runs no script.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        As `panels_of`.
    """
    panels = panels_of(matrix, A) if panels is None else panels
    heading = html.escape(title or "A compressed matrix")
    rows = "\n".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in _facts(matrix, A)
    )
    figures = []
    for panel in panels:
        figure = draw_page([panel], columns=1, headings=False)
        picture = io.BytesIO()
        with look():
            figure.savefig(picture, dpi=120, format="png")
        data = base64.b64encode(picture.getvalue()).decode()
        text = html.escape(panel.text)
        figures.append(
            f"<figure id='{panel.name}'><h2>{html.escape(panel.title)}</h2>"
            f"<img alt='{html.escape(panel.title)}: {text}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{text}</figcaption></figure>"
        )
    record = html.escape(json.dumps(matrix.record, indent=1, default=str))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{heading}</h1>
<p>{html.escape(headline(matrix, A))}</p>
<table>
{rows}
</table>
<main>
{"".join(figures)}
</main>
<details><summary>The record of how it was made</summary><pre>{record}</pre></details>
<p>diba_np {__version__}</p>
</body>
</html>
"""
