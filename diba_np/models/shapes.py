"""Arrays of a model as matrices: which shape each has, and into which row blocks it is cut."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

# a tall matrix of more entries than this is cut into row blocks
_LARGE = 1 << 21
# rows of a block over columns: B2 is stored once a block, for a share 1/17 of its bits
_TALL = 16
# entries of a block at least: smaller ones of narrow tables take up to ten times the time and twice
# the file, for no more decibels
_SMALL = 1 << 17

_NARROW = 16  # rows or columns under which many slices are a convolution's, not experts


def is_experts(shape: tuple[int, ...]) -> bool:
    """Tell whether a shape (e, m, n) is that of e matrices; else it is a convolution's (O, I, w).

    >>> is_experts((8, 512, 768)), is_experts((384, 80, 3)), is_experts((4, 4))
    (True, False, False)
    """
    if len(shape) != 3:
        return False
    count, m, n = shape
    return count <= min(m, n) or (min(m, n) >= _NARROW and count <= 2 * max(m, n))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of an array as a matrix.

    A convolution (O, I, ...) is (O, I ...); experts (e, m, n) lie one under the other, (e m, n).

    >>> matrix_shape((24, 3, 3, 3)), matrix_shape((8, 512, 768)), matrix_shape((5, 6))
    ((24, 27), (4096, 768), (5, 6))
    """
    if is_experts(shape):
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def matrix_view(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array of two axes and more as the matrix of `matrix_shape`."""
    return array if array.ndim == 2 else array.reshape(matrix_shape(array.shape))


def row_parts(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut the rows of a matrix: by experts, and large tall ones into even blocks.

    The shape of the array alone decides.

    >>> row_parts((384, 384)), len(row_parts((30522, 384))), row_parts((2, 40, 30))
    ([(0, 384)], 4, [(0, 40), (40, 80)])
    >>> len(row_parts((320_000, 16)))
    39
    """
    count = shape[0] if is_experts(shape) else 1
    m, n = matrix_shape(shape)
    m //= count
    pieces = max(1, m * n // max(_TALL * n * n, _SMALL) if m * n > _LARGE else 1)
    edges = [m * i // pieces for i in range(pieces + 1)]
    return [(e * m + a, e * m + b) for e in range(count) for a, b in pairwise(edges)]
