"""Elementwise steps of `bert`, each in one pass over its rows where NumPy takes many.

Exponentials are left to NumPy, whose loops over them are vectors; LLVM has only the scalar ones.
Reductions may be reordered, so results differ from NumPy's in the last digits. Arrays are float32
or float64 and C-ordered, outputs are written to those given; nothing is checked here.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

Array = np.ndarray

# a division that could raise would keep loops from becoming vectors
_compiled: Any = numba.njit(
    cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)


@_compiled
def gelu(x: Array, density: Array, y: Array, slope: Array) -> None:
    """Write ``x Phi(x)`` and its derivative, given ``density = exp(-x^2 / 2)``; all float32 (N,).

    Phi is a polynomial times the density, of absolute error 1e-7
    (M. Abramowitz, I. Stegun, "Handbook of Mathematical Functions", 7.1.26).
    """
    one = np.float32(1)
    near = np.float32(0.3275911 * math.sqrt(0.5))
    unit = np.float32(1 / math.sqrt(2 * math.pi))
    a, b = np.float32(0.5 * 1.061405429), np.float32(-0.5 * 1.453152027)
    c, d = np.float32(0.5 * 1.421413741), np.float32(-0.5 * 0.284496736)
    e = np.float32(0.5 * 0.254829592)
    for i in range(x.size):
        v = x[i]
        t = one / (one + near * abs(v))
        tail = density[i] * t * (e + t * (d + t * (c + t * (b + t * a))))
        below = one - tail if v > 0 else tail
        y[i] = v * below
        slope[i] = below + v * density[i] * unit


@_compiled
def norm(
    x: Array, factor: Array, shift: Array, epsilon: Any, unit: Array, inverse: Array, y: Array
) -> None:
    """Write rows at mean 0 and variance 1 (N, d), one over their spread (N,), the norm (N, d)."""
    rows, d = x.shape
    for i in range(rows):
        total = x.dtype.type(0)
        for j in range(d):
            total += x[i, j]
        mean = total / x.dtype.type(d)
        squares = x.dtype.type(0)
        for j in range(d):
            squares += (x[i, j] - mean) * (x[i, j] - mean)
        scale = x.dtype.type(1) / np.sqrt(squares / x.dtype.type(d) + epsilon)
        inverse[i] = scale
        for j in range(d):
            unit[i, j] = (x[i, j] - mean) * scale
            y[i, j] = unit[i, j] * factor[j] + shift[j]


@_compiled
def norm_back(
    gradient: Array,
    factor: Array,
    unit: Array,
    inverse: Array,
    g: Array,
    to_factor: Array,
    to_shift: Array,
) -> None:
    """Write the gradient of the norm's inputs (N, d), and sums for its factor and shift (d,)."""
    rows, d = gradient.shape
    size = gradient.dtype.type(d)
    to_factor[:] = 0
    to_shift[:] = 0
    for i in range(rows):
        mean = gradient.dtype.type(0)
        along = gradient.dtype.type(0)
        for j in range(d):
            to_factor[j] += gradient[i, j] * unit[i, j]
            to_shift[j] += gradient[i, j]
            mean += gradient[i, j] * factor[j]
            along += gradient[i, j] * factor[j] * unit[i, j]
        mean /= size
        along /= size
        for j in range(d):
            g[i, j] = (gradient[i, j] * factor[j] - mean - unit[i, j] * along) * inverse[i]


@_compiled
def below_the_most(scores: Array, scale: Any, bias: Array) -> None:
    """Turn scores (S, h, T, T) into ``scale scores + bias``, less the most of each row; in place.

    ``bias`` (S, T) is of the keys; the most of a row becomes 0.
    """
    texts, heads, rows, d = scores.shape
    for s in range(texts):
        for h in range(heads):
            for i in range(rows):
                row = scores[s, h, i]
                most = row[0] * scale + bias[s, 0]
                for j in range(d):
                    row[j] = row[j] * scale + bias[s, j]
                    most = max(most, row[j])
                for j in range(d):
                    row[j] -= most


@_compiled
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


@_compiled
def softmax_back(p: Array, scale: Any, g: Array) -> None:
    """Turn gradients of softmax's outputs p (N, d) into those of its unscaled inputs, in place."""
    rows, d = p.shape
    for i in range(rows):
        along = p.dtype.type(0)
        for j in range(d):
            along += g[i, j] * p[i, j]
        for j in range(d):
            g[i, j] = (g[i, j] - along) * p[i, j] * scale
