"""Draw the README's picture of the idea from a real factorization (matplotlib).

python scripts/draw_idea.py            # writes diba_np/docs/idea.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import diba_np as dn
from diba_np.report.pictures import look

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    A = np.load(ROOT / "data" / "minilm_attention_384x384.npy")[8:40, 96:136]
    f = dn.factorize(A, k=24)
    m, n = f.shape
    spans = [np.abs(d) / np.abs(d).max() for d in (f.d1, f.d2, f.d3)]
    bound = float(np.quantile(np.abs(A), 0.99))
    parts = [
        ("A", "m × n floats", A, "RdBu_r", (-bound, bound)),
        ("D1", "m floats", np.diag(spans[0]), "Oranges", (0, 1)),
        ("B1", "m × k bits", f.b1.to_dense(), "Greys", (0, 1)),
        ("D2", "k floats", np.diag(spans[1]), "Oranges", (0, 1)),
        ("B2", "k × n bits", f.b2.to_dense(), "Greys", (0, 1)),
        ("D3", "n floats", np.diag(spans[2]), "Oranges", (0, 1)),
    ]
    widths = [p[2].shape[1] for p in parts]
    with look():
        figure = Figure(figsize=(11.0, 2.6))
        FigureCanvasAgg(figure)
        gap, unit = 8, 1.0 / (sum(widths) + 8 * (len(parts) + 1))
        left = gap
        for (name, told, values, colours, ends), width in zip(parts, widths, strict=True):
            rows = values.shape[0]
            height = rows * unit * 11.0 / 2.6
            axes = figure.add_axes((left * unit, 0.5 - height / 2, width * unit, height))
            axes.imshow(
                values, cmap=colours, vmin=ends[0], vmax=ends[1], interpolation="nearest",
                aspect="auto",
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(visible=True, color="0.6")
            middle = (left + width / 2) * unit
            figure.text(middle, 0.92, name, ha="center", fontsize=13, fontweight="bold")
            figure.text(middle, 0.02, told, ha="center", fontsize=10)
            if name != "D3":
                sign = "≈" if name == "A" else "·"
                figure.text((left + width + gap / 2) * unit, 0.47, sign, ha="center", fontsize=20)
            left += width + gap
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "diba_np" / "docs" / "idea.png"
        figure.savefig(path, dpi=110)
    print(f"{m} x {n}, k={f.k}: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
