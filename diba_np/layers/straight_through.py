"""Straight-through gradients: latent values under codes, and what all layers of them share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix

Array = NDArray[Any]


def rounded_codes(latent: Array, most: int) -> Array:
    """Return the nearest integers in ``[-most, most]`` as int64."""
    return np.clip(np.rint(latent), -most, most).astype(np.int64)


def inward(gradient: Array, latent: Array, most: float) -> Array:
    """Return a gradient with zeros where its descent would leave ``[-most, most]`` further behind.

    Parameters
    ----------
    gradient, latent : ndarrays of one shape
    most : float
        Largest magnitude that the latent values stand for.
    """
    outward = (np.abs(latent) > most) & (gradient * latent < 0)
    return np.where(outward, np.zeros_like(gradient), gradient)


def check_weight(weight: ArrayLike, shape: tuple[int, int]) -> Array:
    """Return the dense weights at which latent values start, float64.

    Raises
    ------
    TypeError, ValueError
        They are not real and finite, or not of that shape.
    """
    dense = np.asarray(as_matrix(weight, "weight"), np.float64)
    if dense.shape != shape:
        raise ValueError(f"weight must have shape {shape}, got {dense.shape}")
    return dense
