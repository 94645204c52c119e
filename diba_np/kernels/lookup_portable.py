"""Matrix x vector for packed 0/1 matrices with byte tables in memory: any CPU, any float type.

A unit of 15 inputs has two tables of partial sums, 256 entries for its lower 8 inputs and 128 for
its upper 7. The tables of a few units stay in the L1 cache while all rows pass over them.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba
import numpy as np

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import finish, zero_if_finite  # _lookup.py baa33a2a7297
from diba_np.kernels._stages import (  # _stages.py 2ab30e42ec6b
    make_stages,
    make_term_stages,
    start_pieces,
    start_term_pieces,
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
def _mix_part(inputs, tiles, start, stop, shift, scale, before, out):
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
    finish(results, 32 * start, shift, total, scale, before, out)
    return total + zero_if_finite(results)


_product, _piece = make_stages(_mix_part)
_terms, _terms_piece = make_term_stages(_mix_part)


@njit(fastmath=False)
def product_portable(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what ``lookup_simd.product_avx512`` does, on any CPU; all floats float32, or all float64.

    Notes
    -----
    Time k (m + n) / 10 cycles, extra memory O(k) and 18 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_portable``.
    """
    return _product(x, d3, tiles2, d2, tiles1, d1, shift, out)


@njit(fastmath=False, parallel=True)
def product_portable_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_portable` does, the output rows cut into `n_parts` pieces for threads."""
    shared = start_pieces(x, d3, tiles2, d2, tiles1, n_parts, out)
    for p in numba.prange(n_parts):
        _piece(p, shared, tiles2, d2, tiles1, d1, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_portable(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, on any CPU, in float32 or float64.

    naive: ``tests/naive.py::product_terms_portable``.
    """
    return _terms(x, d3, tiles2, d2, tiles1, d1, starts, shift, out)


@njit(fastmath=False, parallel=True)
def product_terms_portable_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_portable` does, the output rows cut into `n_parts` pieces."""
    shared = start_term_pieces(x, d3, tiles2, starts, n_parts)
    for p in numba.prange(n_parts):
        _terms_piece(p, shared, tiles2, d2, tiles1, d1, starts, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)
