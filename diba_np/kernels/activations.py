"""Activation functions and their slopes in one pass; exponentials are left to NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels._jit import njit

Array = NDArray[Any]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
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
