"""Compress a grey picture, and compare with a truncated singular value decomposition.

python scripts/examples/image.py             # prints a table
python scripts/examples/image.py out.png     # and saves the pictures side by side (matplotlib)
"""

from __future__ import annotations

import sys

import numpy as np

import diba_np as dn


def picture(size: int = 256) -> np.ndarray:
    """A drawn scene, 0 to 1: a sky, hills with texture, a sun and a fence of sharp edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    rng = np.random.default_rng(0)
    scene = 0.85 - 0.35 * y
    for height, grey, waves in ((0.55, 0.5, 9.0), (0.68, 0.35, 5.0), (0.8, 0.2, 12.0)):
        hill = y > height + 0.06 * np.sin(waves * x + 7 * height)
        scene[hill] = grey + 0.08 * rng.normal(size=int(hill.sum()))
    scene[(x - 0.75) ** 2 + (y - 0.2) ** 2 < 0.008] = 1.0
    scene[(np.sin(60 * x) > 0.8) & (y > 0.72)] = 0.95
    return np.clip(scene, 0, 1)


def psnr(picture_: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, for values from 0 to 1."""
    return float(-10 * np.log10(np.mean((picture_ - np.clip(other, 0, 1)) ** 2)))


def truncated(A: np.ndarray, bits: float) -> np.ndarray:
    """Truncated SVD whose factors, kept in 16 bits, take as much room."""
    rank = max(1, int(bits * A.size / (16 * sum(A.shape))))
    u, s, v = np.linalg.svd(A, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def main() -> None:
    A = picture()
    shown = [("original", A)]
    print("PSNR in dB, 256 x 256 grey values")
    print("bits a pixel   diba 0/1   diba +-1   truncated SVD")
    for bits in (1.0, 2.0):
        ours = [
            dn.factorize(A, bits=bits, shift=s, scale_bits="auto", effort="fast").to_dense()
            for s in (0.0, 0.5)
        ]
        svd = truncated(A, bits)
        row = [psnr(A, B) for B in (*ours, svd)]
        print(f"{bits:12.1f}   {row[0]:8.2f}   {row[1]:8.2f}   {row[2]:13.2f}")
        shown += [(f"diba +-1, {bits:g} bits", ours[1]), (f"SVD, {bits:g} bits", svd)]
    if len(sys.argv) > 1:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 * len(shown), 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (name, values) in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), i + 1)
            axes.imshow(values, cmap="gray", vmin=0, vmax=1)
            axes.set_title(name)
            axes.set_axis_off()
        figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
