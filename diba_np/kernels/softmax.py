"""The rowwise steps of masked attention; exponentials are left to NumPy, whose loops are vectors.

Reductions may be reordered. Arrays are all float32 or all float64 and C-ordered.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from diba_np.kernels._jit import njit

Array = NDArray[Any]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def below_the_most(
    scores: Array, scale: Any, keys: Array, first: Array, last: Array, hidden: Any
) -> None:
    """Turn scores (S, h, R, T) into ``scale scores + keys``, less the most of each row; in place.

    ``keys`` (S, T) is added to every row; row i sees the columns ``first[i]`` to ``last[i]``, both
    (R,) int64, and the others become ``hidden``. The most of a row becomes 0.
    """
    texts, heads, rows, d = scores.shape
    for s in range(texts):
        for h in range(heads):
            for i in range(rows):
                row = scores[s, h, i]
                low, high = first[i], last[i]
                most = row[low] * scale + keys[s, low]
                for j in range(low, high):
                    row[j] = row[j] * scale + keys[s, j]
                    most = max(most, row[j])
                for j in range(low, high):
                    row[j] -= most
                for j in range(low):
                    row[j] = hidden
                for j in range(high, d):
                    row[j] = hidden


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def to_unit_sum(p: Array) -> None:
    """Divide rows (N, d) by their sums, in place."""
    rows, d = p.shape
    for i in range(rows):
        total = p.dtype.type(0)
        for j in range(d):
            total += p[i, j]
        share = p.dtype.type(1) / total
        for j in range(d):
            p[i, j] *= share


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def softmax_back(p: Array, scale: Any, g: Array) -> None:
    """Turn gradients of softmax's outputs p (N, d) into those of its unscaled inputs, in place."""
    rows, d = p.shape
    for i in range(rows):
        along = p.dtype.type(0)
        for j in range(d):
            along += g[i, j] * p[i, j]
        for j in range(d):
            g[i, j] = (g[i, j] - along) * p[i, j] * scale
