"""Products of a packed 0/1 matrix with a vector by look-ups of whole bytes; any machine.

For eight inputs at a time the 256 possible partial sums are tabulated once; a row then costs one
look-up and one addition for eight bits.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from diba_np.kernels._jit import njit

# columns a block: 64 bytes of a row, whose tables (64 KiB in float32) stay near the core
BLOCK_BYTES = 64


@njit(fastmath=False)
def tabulate_bytes(x, start, tables):
    """Tabulate the sums of the 256 subsets of each group of eight inputs.

    Parameters
    ----------
    x : (n,) float32 or float64
    start : int
        First input of the first group; inputs past n count as zero.
    tables : (groups, 256) of x's dtype, overwritten
        ``tables[g, v]`` is the sum of ``x[start + 8 g + b]`` over the bits b set in v.
    """
    for g in range(tables.shape[0]):
        tables[g, 0] = 0
        for b in range(8):
            j = start + 8 * g + b
            value = x[j] if j < x.size else x[0] * 0
            for v in range(1 << b):
                tables[g, (1 << b) + v] = tables[g, v] + value


@njit(fastmath=False)
def _mix_rows(packed, first, last, at, tables, out):
    for i in range(first, last):
        total = out[i]
        for g in range(tables.shape[0]):
            total += tables[g, packed[i, at + g]]
        out[i] = total


@njit(fastmath=False)
def mix_vector(packed, x, out):
    """Write ``B x`` for a packed B.

    Parameters
    ----------
    packed : (m, p) uint8, C-order
        The words of a `PackedBits` as little-endian bytes; p is a multiple of 8.
    x : (n,) float32 or float64, n <= 8 p
    out : (m,) of x's dtype, overwritten

    Notes
    -----
    Time O(m n / 8 + 32 n). naive: ``tests/naive.py::mix_vector``.
    """
    out[:] = 0
    groups = min(BLOCK_BYTES, packed.shape[1])
    tables = np.empty((groups, 256), x.dtype)
    for at in range(0, packed.shape[1], groups):
        part = tables[: min(groups, packed.shape[1] - at)]
        tabulate_bytes(x, 8 * at, part)
        _mix_rows(packed, 0, packed.shape[0], at, part, out)


@njit(fastmath=False, parallel=True)
def mix_vector_par(packed, x, out):
    """`mix_vector` with blocks of rows spread over threads; the same sums in the same order."""
    out[:] = 0
    groups = min(BLOCK_BYTES, packed.shape[1])
    tables = np.empty((groups, 256), x.dtype)
    rows = packed.shape[0]
    for at in range(0, packed.shape[1], groups):
        part = tables[: min(groups, packed.shape[1] - at)]
        tabulate_bytes(x, 8 * at, part)
        for block in prange((rows + 255) // 256):
            _mix_rows(packed, 256 * block, min(rows, 256 * block + 256), at, part, out)
