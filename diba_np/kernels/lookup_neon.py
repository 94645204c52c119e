"""Matrix x vector for packed 0/1 matrices with look-ups in the registers of 64-bit Arm (NEON).

How the look-ups work, in float32 and in 16-bit tables: ``kernels/_neon.py``. Every row adds its
groups in the same order, whatever the number of threads. Layout of the tiles:
``kernels/layout.py``. Compiled on Arm alone: LLVM for another CPU knows no `tbl`.
"""

from __future__ import annotations

import numba
import numpy as np

from diba_np.kernels._barrier import arrive, barrier, take  # _barrier.py eaafea187351
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import (  # _lookup.py e780d5b3414a
    block_size,
    finish,
    padded,
    scaled,
    zero_if_finite,
)
from diba_np.kernels._neon import (  # _neon.py b74621ec586d
    build_float_tables_neon,
    build_word_tables_neon,
    mix_float_tile_neon,
    mix_word_tile_neon,
)
from diba_np.kernels._terms import (  # _terms.py dae9825aeaeb
    first_tiles,
    second_tiles,
    term_inner,
    term_inputs,
)

BLOCK_UNITS = 28  # units whose float32 tables are built at a time: 10.5 KiB
BLOCK_UNITS_ROUNDED = 32  # of 16-bit tables: 4 KiB; up to 120 for sums of 16 bits
LARGEST_ENTRY = 8190.0  # of 14 bits with a sign; rounding adds up to 1


@njit(fastmath=False)
def _mix_part(inputs, tiles, start, stop, alpha, scale, bias, out):
    """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

    It is NaN where a row's sum is not finite.
    """
    n_units = tiles.shape[1]
    block = block_size(n_units, BLOCK_UNITS)
    tables = np.empty(96 * block + 16, dtype=np.float32)
    sums = np.zeros(32 * (stop - start), dtype=np.float32)
    total = np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        total += build_float_tables_neon(inputs.ctypes.data + 60 * u, width, table)
        for t in range(start, stop):
            tile = tiles.ctypes.data + 64 * (n_units * t + u)
            ahead = tile + 64 * n_units * min(1, stop - 1 - t)
            mix_float_tile_neon(tile, ahead, table, width, sums.ctypes.data + 128 * (t - start))
    finish(sums, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(sums)


@njit(fastmath=False)
def product_neon(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_avx512`` does, with NEON and 5 inputs a look-up.

    Notes
    -----
    Time k (m + n) / 13 cycles (estimated for Apple's M1), extra memory O(k) and 12 KiB a thread.
    The `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_neon_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_neon` does, the output rows cut into `n_parts` pieces for the threads."""
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    two = tiles1.shape[0] > 0
    z = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    bias2 = none if two else bias
    totals = np.empty(n_parts, dtype=np.float32)
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    counters = barrier()
    for p in numba.prange(n_parts):
        start, stop = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        totals[p] = _mix_part(inputs, tiles2, start, stop, alpha, d2, bias2, z)
        if two and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += _mix_part(z, tiles1, start, stop, alpha, d1, bias, out)
                q = take(counters)
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def _first_stages(inputs, tiles2, piece, n_pieces, alpha, d2, starts, z):
    """Do a piece of the first stage of every term; return the sum of the inputs, or NaN."""
    none = np.empty(0, dtype=inputs.dtype)
    total = zero_if_finite(none)
    for t in range(inputs.shape[0]):
        tiles = first_tiles(tiles2, starts, t)
        start, stop = len(tiles) * piece // n_pieces, len(tiles) * (piece + 1) // n_pieces
        scale, part = d2[starts[t, 0] : starts[t + 1, 0]], z[starts[t, 3] : starts[t + 1, 3]]
        total += _mix_part(inputs[t], tiles, start, stop, alpha, scale, none, part)
    return total


@njit(fastmath=False)
def _second_stages(z, tiles1, piece, n_pieces, alpha, d1, starts, bias, out):
    """Do a piece of the second stage of every term, each added to those before it.

    Returns the sum of `z`, or NaN where a row's sum is not finite, with its scale or without.
    """
    total = zero_if_finite(out[:0])
    start, stop = 0, 0
    for t in range(d1.shape[0]):
        tiles = second_tiles(tiles1, starts, t)
        start, stop = len(tiles) * piece // n_pieces, len(tiles) * (piece + 1) // n_pieces
        before = out if t else bias
        part = z[starts[t, 3] : starts[t + 1, 3]]
        total += _mix_part(part, tiles, start, stop, alpha, d1[t], before, out)
    return total + zero_if_finite(out[32 * start : 32 * stop])


@njit(fastmath=False)
def product_terms_neon(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, with NEON.

    naive: ``tests/naive.py::product_terms_neon``.
    """
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    total = _first_stages(inputs, tiles2, 0, 1, alpha, d2, starts, z)
    return total + _second_stages(z, tiles1, 0, 1, alpha, d1, starts, bias, out)


@njit(fastmath=False, parallel=True)
def product_terms_neon_par(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what `product_terms_neon` does, the output rows cut into `n_parts` pieces."""
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    totals = np.empty(n_parts, dtype=x.dtype)
    counters = barrier()
    for p in numba.prange(n_parts):
        totals[p] = _first_stages(inputs, tiles2, p, n_parts, alpha, d2, starts, z)
        if arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                totals[q] += _second_stages(z, tiles1, q, n_parts, alpha, d1, starts, bias, out)
                q = take(counters)
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
    # slices: with offsets in the indices the loops would not be vectorized
    first = 32 * start
    last = min(32 * stop, scale.size)
    part, scale = out[first:last], scale[first:last]
    for i in range(part.size):
        part[i] = scale[i] * (step * np.float32(sums[i]) + offset)
    if addend.size:
        addend = addend[first:last]
        for i in range(part.size):
            part[i] += scale[i] * (weight * addend[i])
    if bias.size:
        bias = bias[first:last]
        for i in range(part.size):
            part[i] += bias[i]


@njit(fastmath=False)
def product_neon_rounded(x, d3, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, n_parts, out):
    """Do what ``lookup_int16.product_int16`` does, in tables of 14 bits for 4 inputs.

    At most 1 000 000 columns a stage (32-bit sums).

    Notes
    -----
    Time k (m + n) / 28 cycles (estimated for Apple's M1), extra memory O(k) and 5 KiB a thread. The
    `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon_rounded``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    step, total, rough = _measured(inputs, x.size)
    centre = np.float32(np.float32(0.5) - alpha)
    c = np.float32(centre * total)
    zero = np.float32(0.0)
    if tiles1.shape[0] == 0:
        _mix_part_rounded(inputs, step, tiles2, 0, tiles2.shape[0], c, zero, none, d2, bias, out)
        return total, rough
    w = padded(d2.size, tiles1.shape[1], x.dtype)
    _mix_part_rounded(inputs, step, tiles2, 0, tiles2.shape[0], zero, zero, none, d2, none, w)
    step, inner, rough1 = _measured(w, d2.size)
    offset = np.float32(centre * inner)
    _mix_part_rounded(w, step, tiles1, 0, tiles1.shape[0], offset, c, mixed_d2, d1, bias, out)
    return total + inner, np.sqrt(rough * rough + rough1 * rough1)


@njit(fastmath=False, parallel=True)
def product_neon_rounded_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, mixed_d2, n_parts, out):
    """Do what `product_neon_rounded` does, the output rows cut into `n_parts` pieces."""
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    step, total, rough = _measured(inputs, x.size)
    centre = np.float32(np.float32(0.5) - alpha)
    c = np.float32(centre * total)
    zero = np.float32(0.0)
    two = tiles1.shape[0] > 0
    w = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    bias2 = none if two else bias
    offset = zero if two else c
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    measured = np.empty(2, dtype=np.float32)  # of w: its sum, its roughness
    counters = barrier()
    for p in numba.prange(n_parts):
        start, stop = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        _mix_part_rounded(inputs, step, tiles2, start, stop, offset, zero, none, d2, bias2, w)
        if two and arrive(counters, n_parts):
            step1, inner, rough1 = _measured(w, d2.size)
            offset1 = np.float32(centre * inner)
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                _mix_part_rounded(
                    w, step1, tiles1, start, stop, offset1, c, mixed_d2, d1, bias, out
                )
                if q == 0:
                    measured[0], measured[1] = inner, rough1
                q = take(counters)
    if two:
        total += measured[0]
        rough = np.sqrt(rough * rough + measured[1] * measured[1])
    return total, rough
