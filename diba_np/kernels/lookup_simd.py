"""Matrix x vector for packed 0/1 matrices with look-ups inside vector registers (AVX-512 and AVX2).

How the look-ups work: ``kernels/_permute.py``. float32 throughout; every row adds its groups in the
same order, whatever the number of threads.
Layout of the tiles: ``kernels/layout.py``.
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
from diba_np.kernels._permute import AVX2, AVX512  # _permute.py b2d4e71cca30
from diba_np.kernels._terms import (  # _terms.py dae9825aeaeb
    first_tiles,
    second_tiles,
    term_inner,
    term_inputs,
)

BLOCK_UNITS = 28  # units whose tables are built at a time: 10.5 KiB (AVX-512), 4 KiB (AVX2)

_build_tables_avx512 = AVX512.make_build_tables()
_build_tables_avx2 = AVX2.make_build_tables()
_mix_4_tiles_avx512 = AVX512.make_mix_tiles(4)
_mix_2_tiles_avx512 = AVX512.make_mix_tiles(2)
_mix_1_tile_avx512 = AVX512.make_mix_tiles(1)
_mix_2_tiles_avx2 = AVX2.make_mix_tiles(2)
_mix_1_tile_avx2 = AVX2.make_mix_tiles(1)


@njit(fastmath=False)
def _mix_part_avx512(inputs, tiles, start, stop, alpha, scale, bias, out):
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
        total += _build_tables_avx512(inputs.ctypes.data + 60 * u, width, table, 128)
        t = start
        while t < stop:
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            if t + 4 <= stop:
                _mix_4_tiles_avx512(source, 64 * n_units, table, width, target, 0)
                t += 4
            elif t + 2 <= stop:
                _mix_2_tiles_avx512(source, 64 * n_units, table, width, target, 0)
                t += 2
            else:
                _mix_1_tile_avx512(source, 64 * n_units, table, width, target, 0)
                t += 1
    finish(sums, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(sums)


@njit(fastmath=False)
def _mix_part_avx2(inputs, tiles, start, stop, alpha, scale, bias, out):
    """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

    It is NaN where a row's sum is not finite.
    """
    n_units = tiles.shape[1]
    block = block_size(n_units, BLOCK_UNITS)
    tables = np.empty(40 * block + 16, dtype=np.float32)
    sums = np.zeros(32 * (stop - start), dtype=np.float32)
    total = np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        total += _build_tables_avx2(inputs.ctypes.data + 60 * u, width, table, 32)
        t = start
        while t < stop:
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            if t + 2 <= stop:
                _mix_2_tiles_avx2(source, 64 * n_units, table, width, target, 0)
                t += 2
            else:
                _mix_1_tile_avx2(source, 64 * n_units, table, width, target, 0)
                t += 1
    finish(sums, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(sums)


@njit(fastmath=False)
def product_avx512(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a vector.

    ``z = d2 * ((B2 - alpha) (d3 * x))``, then ``out = d1 * ((B1 - alpha) z) + bias``. With `tiles1`
    of no tiles only the first stage runs: ``out = d2 * ((B2 - alpha) (d3 * x)) + bias``.

    Parameters
    ----------
    x, d3 : (n,) float32
    tiles2 : (ceil(k / 32), ceil(n / 15), 16) uint32, C-order
    d2 : (k,) float32
    tiles1 : (ceil(m / 32), ceil(k / 15), 16) uint32, C-order, or no tiles at all
    d1 : (m,) float32
    alpha : float32
    bias : (m,) or (k,) or (0,) float32
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) or (k,) float32, overwritten

    Returns
    -------
    float32
        Sum of ``d3 * x`` and z; not finite if any term is not finite, or any row's sum.

    Notes
    -----
    Time k (m + n) / 44 cycles, extra memory O(k) and 12 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_avx512``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part_avx512(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part_avx512(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part_avx512(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_avx512_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx512` does, the output rows cut into `n_parts` pieces for the threads."""
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
        totals[p] = _mix_part_avx512(inputs, tiles2, start, stop, alpha, d2, bias2, z)
        if two and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += _mix_part_avx512(z, tiles1, start, stop, alpha, d1, bias, out)
                q = take(counters)
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_avx2(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx512` does, with AVX2 alone and 3 inputs a look-up.

    naive: ``tests/naive.py::product_avx2``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part_avx2(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part_avx2(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part_avx2(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_avx2_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx2` does, the output rows cut into `n_parts` pieces for the threads."""
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
        totals[p] = _mix_part_avx2(inputs, tiles2, start, stop, alpha, d2, bias2, z)
        if two and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += _mix_part_avx2(z, tiles1, start, stop, alpha, d1, bias, out)
                q = take(counters)
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def _first_stages_avx512(inputs, tiles2, piece, n_pieces, alpha, d2, starts, z):
    """Do a piece of the first stage of every term; return the sum of the inputs, or NaN."""
    none = np.empty(0, dtype=inputs.dtype)
    total = zero_if_finite(none)
    for t in range(inputs.shape[0]):
        tiles = first_tiles(tiles2, starts, t)
        start, stop = len(tiles) * piece // n_pieces, len(tiles) * (piece + 1) // n_pieces
        scale, part = d2[starts[t, 0] : starts[t + 1, 0]], z[starts[t, 3] : starts[t + 1, 3]]
        total += _mix_part_avx512(inputs[t], tiles, start, stop, alpha, scale, none, part)
    return total


@njit(fastmath=False)
def _second_stages_avx512(z, tiles1, piece, n_pieces, alpha, d1, starts, bias, out):
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
        total += _mix_part_avx512(part, tiles, start, stop, alpha, d1[t], before, out)
    return total + zero_if_finite(out[32 * start : 32 * stop])


@njit(fastmath=False)
def _first_stages_avx2(inputs, tiles2, piece, n_pieces, alpha, d2, starts, z):
    """Do a piece of the first stage of every term; return the sum of the inputs, or NaN."""
    none = np.empty(0, dtype=inputs.dtype)
    total = zero_if_finite(none)
    for t in range(inputs.shape[0]):
        tiles = first_tiles(tiles2, starts, t)
        start, stop = len(tiles) * piece // n_pieces, len(tiles) * (piece + 1) // n_pieces
        scale, part = d2[starts[t, 0] : starts[t + 1, 0]], z[starts[t, 3] : starts[t + 1, 3]]
        total += _mix_part_avx2(inputs[t], tiles, start, stop, alpha, scale, none, part)
    return total


@njit(fastmath=False)
def _second_stages_avx2(z, tiles1, piece, n_pieces, alpha, d1, starts, bias, out):
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
        total += _mix_part_avx2(part, tiles, start, stop, alpha, d1[t], before, out)
    return total + zero_if_finite(out[32 * start : 32 * stop])


@njit(fastmath=False)
def product_terms_avx512(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Multiply a sum of several DiBA factorizations by a vector.

    ``out = sum_t d1_t * ((B1_t - alpha) (d2_t * ((B2_t - alpha) (d3_t * x)))) + bias``, the terms
    added in their order.

    Parameters
    ----------
    x : (n,) float32
    d3, tiles2, d2, tiles1, d1, starts
        Those of all terms, see ``kernels/_terms.py``.
    alpha : float32
    bias : (m,) or (0,) float32
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) float32, overwritten

    Returns
    -------
    float32
        Finite only if all ``d3_t * x``, all rows' sums of both stages, and `out` are.

    Notes
    -----
    Time as of `product_avx512` with k the sum of all terms, and the tables of x once for each. The
    `_par` twin is bitwise equal. naive: ``tests/naive.py::product_terms_avx512``.
    """
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    total = _first_stages_avx512(inputs, tiles2, 0, 1, alpha, d2, starts, z)
    return total + _second_stages_avx512(z, tiles1, 0, 1, alpha, d1, starts, bias, out)


@njit(fastmath=False, parallel=True)
def product_terms_avx512_par(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what `product_terms_avx512` does, the output rows cut into `n_parts` pieces."""
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    totals = np.empty(n_parts, dtype=x.dtype)
    counters = barrier()
    for p in numba.prange(n_parts):
        totals[p] = _first_stages_avx512(inputs, tiles2, p, n_parts, alpha, d2, starts, z)
        if arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                totals[q] += _second_stages_avx512(
                    z, tiles1, q, n_parts, alpha, d1, starts, bias, out
                )
                q = take(counters)
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_avx2(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, with AVX2 alone.

    naive: ``tests/naive.py::product_terms_avx2``.
    """
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    total = _first_stages_avx2(inputs, tiles2, 0, 1, alpha, d2, starts, z)
    return total + _second_stages_avx2(z, tiles1, 0, 1, alpha, d1, starts, bias, out)


@njit(fastmath=False, parallel=True)
def product_terms_avx2_par(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what `product_terms_avx2` does, the output rows cut into `n_parts` pieces."""
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    totals = np.empty(n_parts, dtype=x.dtype)
    counters = barrier()
    for p in numba.prange(n_parts):
        totals[p] = _first_stages_avx2(inputs, tiles2, p, n_parts, alpha, d2, starts, z)
        if arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                totals[q] += _second_stages_avx2(
                    z, tiles1, q, n_parts, alpha, d1, starts, bias, out
                )
                q = take(counters)
    return totals[0] + zero_if_finite(totals)
