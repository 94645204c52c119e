"""Layer norm, RMS norm and their gradients, each in one pass over its rows where NumPy takes many.

Reductions may be reordered, so results differ from NumPy's in the last digits. Arrays are all
float32 or all float64 and C-ordered, outputs are written to those given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels._jit import njit

Array = NDArray[Any]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def layer_norm(
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


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def layer_norm_back(
    gradient: Array,
    factor: Array,
    unit: Array,
    inverse: Array,
    g: Array,
    to_factor: Array,
    to_shift: Array,
) -> None:
    """Write the gradient of the inputs (N, d); add to those of factor and shift (d,)."""
    rows, d = gradient.shape
    size = gradient.dtype.type(d)
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


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def rms_norm(x: Array, factor: Array, epsilon: Any, inverse: Array, y: Array) -> None:
    """Write one over the root mean square of rows (N,), and the rows times it and factor (N, d)."""
    rows, d = x.shape
    for i in range(rows):
        squares = x.dtype.type(0)
        for j in range(d):
            squares += x[i, j] * x[i, j]
        scale = x.dtype.type(1) / np.sqrt(squares / x.dtype.type(d) + epsilon)
        inverse[i] = scale
        for j in range(d):
            y[i, j] = x[i, j] * scale * factor[j]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def rms_norm_back(
    gradient: Array, factor: Array, x: Array, inverse: Array, g: Array, to_factor: Array
) -> None:
    """Write the gradient of the inputs (N, d); add to that of factor (d,)."""
    rows, d = gradient.shape
    size = gradient.dtype.type(d)
    for i in range(rows):
        scale = inverse[i]
        along = gradient.dtype.type(0)
        for j in range(d):
            to_factor[j] += gradient[i, j] * x[i, j] * scale
            along += gradient[i, j] * factor[j] * x[i, j]
        along *= scale * scale / size
        for j in range(d):
            g[i, j] = (gradient[i, j] * factor[j] - x[i, j] * along) * scale
