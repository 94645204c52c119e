"""Diagonals as they are stored: half precision with one power of two taken out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

HALF, SINGLE = 16, 32


def power_of_two(vector: NDArray[np.floating]) -> float:
    """Return the power of two that brings the largest magnitude into [1, 2); 1.0 for zeros."""
    largest = float(np.abs(vector).max(initial=0.0))
    return float(2.0 ** np.floor(np.log2(largest))) if largest > 0 else 1.0


def round_half(vector: NDArray[np.floating], scale: float = 1.0) -> Vector:
    """Round to ``scale`` times a half-precision number, as float32; overflow is clipped."""
    limit = float(np.finfo(np.float16).max)
    scaled = np.clip(np.asarray(vector, np.float64) / scale, -limit, limit)
    return (scaled.astype(np.float16).astype(np.float64) * scale).astype(np.float32)


def stored_scale_bits(d1: Vector, d2: Vector, d3: Vector) -> int:
    """Return 16 if half precision keeps the three diagonals exactly, else 32.

    In a file d1 and d3 stand as they are and d2 over an overall scale.
    """
    exact = (
        np.array_equal(round_half(d1), d1)
        and np.array_equal(round_half(d2, power_of_two(d2)), d2)
        and np.array_equal(round_half(d3), d3)
    )
    return HALF if exact else SINGLE


def round_diagonals(
    d1: NDArray[np.floating], d2: NDArray[np.floating], d3: NDArray[np.floating]
) -> tuple[Vector, Vector, Vector]:
    """Return the diagonals as 16 bits hold them, mean magnitudes of d1 and d3 moved into d2."""
    d1, d2, d3 = (np.array(d, np.float64) for d in (d1, d2, d3))
    mean1, mean3 = (float(np.abs(outer).mean()) or 1.0 for outer in (d1, d3))
    d2 *= mean1 * mean3
    return round_half(d1 / mean1), round_half(d2, power_of_two(d2)), round_half(d3 / mean3)
