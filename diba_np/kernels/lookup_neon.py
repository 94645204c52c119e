"""Matrix x vector for packed 0/1 matrices with look-ups in the registers of 64-bit Arm (NEON).

How the look-ups work, in float32 and in 16-bit tables: ``kernels/_neon.py``. Every row adds its
groups in the same order, whatever the number of threads. Layout of the tiles:
``kernels/layout.py``. Compiled on Arm alone: LLVM for another CPU knows no `tbl`.
"""

from __future__ import annotations

import numba
import numpy as np

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import (  # _lookup.py 584f3cc106c1
    block_size,
    finish_rounded,
    zero_if_finite,
)
from diba_np.kernels._neon import (  # _neon.py 87811e382632
    build_float_tables_neon,
    build_word_tables_neon,
    mix_neon,
    mix_word_tile_neon,
)
from diba_np.kernels._stages import (  # _stages.py f8802c000923
    make_mix_part,
    make_rounded_stages,
    make_stages,
    make_term_stages,
    start_pieces,
    start_term_pieces,
)

BLOCK_UNITS_ROUNDED = 32  # units whose 16-bit tables are built at a time: 4 KiB; up to 120
LARGEST_ENTRY = 8190.0  # of 14 bits with a sign; rounding adds up to 1

_mix_part = make_mix_part(build_float_tables_neon, mix_neon, 96)
_product, _piece = make_stages(_mix_part)
_terms, _terms_piece = make_term_stages(_mix_part)


@njit(fastmath=False)
def product_neon(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_avx512`` does, with NEON and 5 inputs a look-up.

    Notes
    -----
    Time k (m + n) / 13 cycles (estimated for Apple's M1), extra memory O(k) and 12 KiB a thread.
    The `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon``.
    """
    return _product(x, d3, tiles2, d2, tiles1, d1, alpha, bias, out)


@njit(fastmath=False, parallel=True)
def product_neon_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_neon` does, the output rows cut into `n_parts` pieces for the threads."""
    shared = start_pieces(x, d3, tiles2, d2, tiles1, bias, n_parts, out)
    for p in numba.prange(n_parts):
        _piece(p, shared, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out)
    totals = shared[3]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_neon(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, with NEON.

    naive: ``tests/naive.py::product_terms_neon``.
    """
    return _terms(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, out)


@njit(fastmath=False, parallel=True)
def product_terms_neon_par(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what `product_terms_neon` does, the output rows cut into `n_parts` pieces."""
    shared = start_term_pieces(x, d3, tiles2, starts, n_parts)
    for p in numba.prange(n_parts):
        _terms_piece(p, shared, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath={"reassoc"})
def _moments(inputs):
    """Return the sum and the sum of squares."""
    zero = inputs.dtype.type(0)
    total, energy = zero, zero
    for i in range(inputs.size):
        total += inputs[i]
        energy += inputs[i] * inputs[i]
    return total, energy


@njit(fastmath=False)
def _measured(inputs, size):
    """Measure `scaled` inputs, of which the first `size` count.

    Returns the value of one step of the tables, the sum, and the roughness: four times the largest
    sum of a group's magnitudes over the root mean square. So the error that belongs to it is that
    of ``lookup_int16.product_int16``.
    """
    largest = np.float32(0.0)
    for j in range(0, inputs.size, 15):
        for g in range(4):
            group = np.float32(0.0)
            for i in range(j + 4 * g, min(j + 4 * g + 4, j + 15)):
                group += abs(inputs[i])
            largest = max(largest, group)  # not max(), which would pass a NaN on
    total, energy = _moments(inputs)
    roughness = np.float32(0.0)
    if largest > 0:
        # squares that leave the range of float32 tell nothing: as rough as can be
        roughness = np.float32(np.inf)
        if 0 < energy < np.inf:
            roughness = np.float32(4.0) * largest / np.sqrt(energy / np.float32(size))
    return np.float32(largest * np.float32(0.5 / LARGEST_ENTRY)), total, roughness


@njit(fastmath=False)
def _mix_part_rounded(inputs, step, tiles, start, stop, offset, weight, addend, scale, bias, out):
    """Write ``scale * ((B - 1/2) inputs + offset + weight * addend) + bias`` for some tiles."""
    n_units = tiles.shape[1]
    block = block_size(n_units, BLOCK_UNITS_ROUNDED)
    tables = np.empty(32 * block + 16, dtype=np.int32)
    sums = np.zeros(32 * (stop - start), dtype=np.int32)
    half_inverse_step = np.float32(0.5) / step if step > 0 else np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        build_word_tables_neon(inputs.ctypes.data + 60 * u, width, half_inverse_step, table)
        for t in range(start, stop):
            tile = tiles.ctypes.data + 64 * (n_units * t + u)
            ahead = tile + 64 * n_units * min(1, stop - 1 - t)
            mix_word_tile_neon(tile, ahead, table, width, sums.ctypes.data + 128 * (t - start))
    finish_rounded(sums, step, 32 * start, offset, weight, addend, scale, bias, out)


_product_rounded, _start_rounded, _piece_rounded, _end_rounded = make_rounded_stages(
    _measured, _mix_part_rounded, 1
)


@njit(fastmath=False)
def product_neon_rounded(x, d3, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, n_parts, out):
    """Do what ``lookup_int16.product_int16`` does, in tables of 14 bits for 4 inputs.

    At most 1 000 000 columns a stage (32-bit sums).

    Notes
    -----
    Time k (m + n) / 28 cycles (estimated for Apple's M1), extra memory O(k) and 5 KiB a thread. The
    `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon_rounded``.
    """
    return _product_rounded(x, d3, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, out)


@njit(fastmath=False, parallel=True)
def product_neon_rounded_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, n_parts, out):
    """Do what `product_neon_rounded` does, the output rows cut into `n_parts` pieces."""
    shared = _start_rounded(x, d3, tiles2, d2, tiles1, alpha, bias, out)
    for p in numba.prange(n_parts):
        _piece_rounded(p, shared, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, n_parts, out)
    return _end_rounded(shared, tiles1)
