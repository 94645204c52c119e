"""Matrix x vector for packed 0/1 matrices with byte tables in memory: any CPU, any float type.

A unit of 15 inputs has two tables of partial sums, 256 entries for its lower 8 inputs and 128 for
its upper 7. The tables of a few units stay in the L1 cache while all rows pass over them.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba
import numpy as np

from diba_np.kernels._barrier import arrive, barrier, take  # _barrier.py eaafea187351
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import (  # _lookup.py e780d5b3414a
    finish,
    padded,
    scaled,
    zero_if_finite,
)
from diba_np.kernels._terms import (  # _terms.py dae9825aeaeb
    first_tiles,
    second_tiles,
    term_inner,
    term_inputs,
)

BLOCK_UNITS = 12  # units whose tables are built at a time: 18 KiB in float32


@njit(fastmath=False)
def _build_tables(inputs, first_unit, n_units, tables):
    """Write 256 + 128 partial sums a unit; return the sum of the inputs."""
    tables[0] = 0
    total = tables[0]
    for u in range(n_units):
        j = 15 * (first_unit + u)
        table = 384 * u
        for part in range(2):
            tables[table] = 0
            for b in range(8 - part):
                value = inputs[j]
                half = 1 << b
                for e in range(half):
                    tables[table + half + e] = tables[table + e] + value
                j += 1
            table += 256
        total += tables[384 * u + 255] + tables[384 * u + 383]
    return total


@njit(fastmath=False)
def _mix_part(inputs, tiles, start, stop, alpha, scale, bias, out):
    """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

    It is NaN where a row's sum is not finite.
    """
    n_units = tiles.shape[1]
    tables = np.empty(384 * BLOCK_UNITS, dtype=inputs.dtype)
    sums = np.zeros((stop - start, 2, 16), dtype=inputs.dtype)
    flat = tiles.reshape(-1)
    tables[0] = 0  # a zero of the inputs' type; `sums` may be empty
    total = tables[0]
    low, high, upper, size = np.uint64(0xFF), np.uint64(0x7F), np.uint64(256), np.uint64(384)
    eight, sixteen = np.uint64(8), np.uint64(16)
    for u in range(0, n_units, BLOCK_UNITS):
        width = min(BLOCK_UNITS, n_units - u)
        total += _build_tables(inputs, u, width, tables)
        for t in range(start, stop):
            for lane in range(16):
                a = sums[t - start, 0, lane]
                b = sums[t - start, 1, lane]
                entry = np.uint64(0)  # unsigned: no test for negative indices
                position = np.uint64(16 * (n_units * t + u) + lane)
                for _ in range(width):
                    bits = np.uint64(flat[position])
                    first = tables[entry + (bits & low)]
                    a += first + tables[entry + upper + ((bits >> eight) & high)]
                    bits >>= sixteen
                    first = tables[entry + (bits & low)]
                    b += first + tables[entry + upper + (bits >> eight)]
                    entry += size
                    position += sixteen
                sums[t - start, 0, lane] = a
                sums[t - start, 1, lane] = b
    results = sums.reshape(-1)
    finish(results, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(results)


@njit(fastmath=False)
def product_portable(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_avx512`` does, on any CPU; all floats float32, or all float64.

    Notes
    -----
    Time k (m + n) / 10 cycles, extra memory O(k) and 18 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_portable``.
    """
    none = np.empty(0, dtype=x.dtype)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_portable_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_portable` does, the output rows cut into `n_parts` pieces for threads."""
    none = np.empty(0, dtype=x.dtype)
    inputs = scaled(x, d3, tiles2.shape[1])
    two = tiles1.shape[0] > 0
    z = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    bias2 = none if two else bias
    totals = np.empty(n_parts, dtype=x.dtype)
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
def product_terms_portable(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, on any CPU, in float32 or float64.

    naive: ``tests/naive.py::product_terms_portable``.
    """
    inputs = term_inputs(x, d3, tiles2.shape[1])
    z = term_inner(starts, x.dtype)
    total = _first_stages(inputs, tiles2, 0, 1, alpha, d2, starts, z)
    return total + _second_stages(z, tiles1, 0, 1, alpha, d1, starts, bias, out)


@njit(fastmath=False, parallel=True)
def product_terms_portable_par(x, d3, tiles2, d2, tiles1, d1, starts, alpha, bias, n_parts, out):
    """Do what `product_terms_portable` does, the output rows cut into `n_parts` pieces."""
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
