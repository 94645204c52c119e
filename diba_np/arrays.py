"""Walks over large arrays, a block of rows at a time; types that hold what others do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# which rows of a matrix, or columns: a vector of indices; or a slice
Index = NDArray[np.intp]
RowIndex = slice | Index

_BLOCK_ENTRIES = 1 << 21  # entries of a row block: 16 MiB in float64

_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def float_type(dtype: DTypeLike) -> np.dtype[Any]:
    """Return float32 where it holds every value of a type of real numbers, else float64."""
    return _SINGLE if np.can_cast(dtype, _SINGLE) else _DOUBLE


def in_float64(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array of longdouble as float64, every other one as it is."""
    if array.dtype.kind != "f" or array.dtype.itemsize <= 8:
        return array
    with np.errstate(over="ignore"):  # infinity is what the caller looks for
        return array.astype(np.float64)


def row_blocks(shape: tuple[int, int], entries: int = _BLOCK_ENTRIES) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of at most `entries` entries, at least a row each."""
    m, n = shape
    step = max(1, entries // max(1, n))
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def largest_magnitude(A: NDArray[Any]) -> float:
    """Return ``max |A|``; dividing by it keeps squares from overflowing or vanishing."""
    largest = 0.0
    for rows in row_blocks(A.shape):
        part = A[rows]  # its extremes, so that nothing is copied
        largest = max(largest, abs(float(part.max())), abs(float(part.min())))
    return largest
