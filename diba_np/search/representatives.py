"""Rows and columns that stand for all of a matrix."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import Index

Floats = NDArray[np.float64]

_LARGEST = 4  # one in so many is taken for its size


def representatives(energy: Floats, most: int) -> tuple[Index, Floats]:
    """Choose rows (or columns) that stand for all, and what each is to be multiplied by.

    Those of the largest energy, and others evenly spaced. A few rows may hold most of the energy,
    as what a layer of a transformer reads does: without them, or with one of them for all, a part
    says nothing about the whole.

    Parameters
    ----------
    energy : (m,) float64
        Of each row.
    most : int
        How many are taken, where there are more.

    Returns
    -------
    index : (min(m, most),) of intp
        Rising.
    scale : (min(m, most),) float64
        1, but for the evenly spaced ones, which have the energy of all but the largest.
    """
    count = len(energy)
    if count <= most:
        return np.arange(count), np.ones(count)
    largest = most // _LARGEST
    order = np.argsort(-energy, kind="stable")
    rest = np.sort(order[largest:])
    chosen = rest[np.linspace(0, len(rest) - 1, most - largest).astype(int)]
    scale = np.ones(count)
    held = float(energy[chosen].sum())
    if held > 0:
        scale[chosen] = math.sqrt(float(energy[rest].sum()) / held)
    index = np.sort(np.concatenate([order[:largest], chosen]))
    return index, scale[index]
