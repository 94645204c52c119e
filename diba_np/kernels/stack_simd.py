"""Several DiBA factorizations times one vector in one call (AVX-512 and AVX2): small products.

As ``lookup_simd`` does one, to the last bit. How the look-ups work: ``kernels/_permute.py``; layout
of the tiles: ``kernels/layout.py``; plan and workspace: ``kernels/_stack.py``. Nothing is allocated
here. All first stages come before all second stages, and every sum before any result, so that the
result may take the place of an operand.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import block_size  # _lookup.py e780d5b3414a
from diba_np.kernels._permute import AVX2, AVX512  # _permute.py b2d4e71cca30
from diba_np.kernels._stack import (  # _stack.py bb7be61c7a6b
    D3,
    INNER,
    INPUTS,
    N_TILES_1,
    N_TILES_2,
    N_UNITS_1,
    N_UNITS_2,
    SUMS_1,
    SUMS_2,
    TABLES,
    TILES_1,
    TILES_2,
    TOTALS,
    finish_first_stage,
    finish_second_stage,
    start_first_stages,
    write_results,
)

BLOCK_UNITS = 28  # as in ``lookup_simd``, so that sums come out the same
UNIT_FLOATS = 96  # of tables, for AVX-512 and NEON; AVX2 takes 40

_build_tables_avx512 = AVX512.make_build_tables()
_build_tables_avx2 = AVX2.make_build_tables()
_mix_4_tiles_avx512 = AVX512.make_mix_tiles(4)
_mix_3_tiles_avx512 = AVX512.make_mix_tiles(3)
_mix_2_tiles_avx512 = AVX512.make_mix_tiles(2)
_mix_1_tile_avx512 = AVX512.make_mix_tiles(1)
_mix_2_tiles_avx2 = AVX2.make_mix_tiles(2)
_mix_1_tile_avx2 = AVX2.make_mix_tiles(1)


@njit(fastmath=False)
def _mix_avx512(tiles, n_tiles, stride, table, n_units, sums):
    """Add the look-ups of `n_units` units to the sums of all tiles; addresses, `stride` in bytes.

    Tiles go by fours and threes: a single one waits for its own additions.
    """
    while n_tiles > 0:
        if n_tiles == 4 or n_tiles > 6:
            _mix_4_tiles_avx512(tiles, stride, table, n_units, sums, 0)
            size = 4
        elif n_tiles == 3 or n_tiles > 4:
            _mix_3_tiles_avx512(tiles, stride, table, n_units, sums, 0)
            size = 3
        elif n_tiles == 2:
            _mix_2_tiles_avx512(tiles, stride, table, n_units, sums, 0)
            size = 2
        else:
            _mix_1_tile_avx512(tiles, stride, table, n_units, sums, 0)
            size = 1
        tiles += size * stride
        sums += size * 128
        n_tiles -= size


@njit(fastmath=False)
def _mix_avx2(tiles, n_tiles, stride, table, n_units, sums):
    """Do what `_mix_avx512` does."""
    while n_tiles > 0:
        size = min(2, n_tiles)
        if size == 2:
            _mix_2_tiles_avx2(tiles, stride, table, n_units, sums, 0)
        else:
            _mix_1_tile_avx2(tiles, stride, table, n_units, sums, 0)
        tiles += size * stride
        sums += size * 128
        n_tiles -= size


@njit(fastmath=False)
def stack_avx512(x, plan, work, added, out):
    """Multiply several DiBA factorizations by one vector, and add to the results.

    Each of them as ``lookup_simd.product_avx512``: ``out[rows] = d1 * ((B1 - alpha) z) + bias +
    added`` with ``z = d2 * ((B2 - alpha) (d3 * x))``.

    Parameters
    ----------
    x : (n,) float32
    plan : (chains, ``_stack.COLUMNS``) int64, C-order
        See ``kernels/_stack.py``. Neighbours with the same offset of d3 share their tables of x.
    work : float32, from a cache line on
        Workspace with the diagonals, zeros in the rest at first. What is left there of earlier
        calls does not matter.
    added : (rows,) or (0,) float32
        It may be `out`.
    out : (rows,) float32, overwritten only if the number returned is finite
        It may share memory with x.

    Returns
    -------
    float32
        Finite only if all inputs of both stages and all rows' sums are.

    Notes
    -----
    Time k (m + n) / 44 cycles each, no extra memory. naive: ``tests/naive.py::stack_avx512``.
    """
    check = np.float32(0.0)
    total = np.float32(0.0)
    totals = work[plan[0, TOTALS] :]
    n_units = plan[0, N_UNITS_1]
    block = block_size(n_units, BLOCK_UNITS)
    first = 0
    while first < plan.shape[0]:
        after = first + 1
        while after < plan.shape[0] and plan[after, D3] == plan[first, D3]:
            after += 1
        start_first_stages(x, plan, first, after, work)
        total = np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            table = work.ctypes.data + 4 * plan[first, TABLES]
            inputs = work.ctypes.data + 4 * plan[first, INPUTS] + 60 * u
            total += _build_tables_avx512(inputs, width, table, 128)
            for i in range(first, after):
                tiles = plan[i, TILES_1] + 64 * u
                sums = work.ctypes.data + 4 * plan[i, SUMS_1]
                _mix_avx512(tiles, plan[i, N_TILES_1], 64 * n_units, table, width, sums)
        for i in range(first, after):
            check += finish_first_stage(plan[i], total, work)
        first = after
    for i in range(plan.shape[0]):
        n_units = plan[i, N_UNITS_2]
        block = block_size(n_units, BLOCK_UNITS)
        total = np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            table = work.ctypes.data + 4 * plan[i, TABLES]
            inputs = work.ctypes.data + 4 * plan[i, INNER] + 60 * u
            total += _build_tables_avx512(inputs, width, table, 128)
            tiles = plan[i, TILES_2] + 64 * u
            sums = work.ctypes.data + 4 * plan[i, SUMS_2]
            _mix_avx512(tiles, plan[i, N_TILES_2], 64 * n_units, table, width, sums)
        totals[i] = total
        check += finish_second_stage(plan[i], total, work)
    if np.isfinite(check):
        write_results(plan, work, added, out)
    return check


@njit(fastmath=False)
def stack_avx2(x, plan, work, added, out):
    """Do what `stack_avx512` does, with AVX2 alone.

    naive: ``tests/naive.py::stack_avx2``.
    """
    check = np.float32(0.0)
    total = np.float32(0.0)
    totals = work[plan[0, TOTALS] :]
    n_units = plan[0, N_UNITS_1]
    block = block_size(n_units, BLOCK_UNITS)
    first = 0
    while first < plan.shape[0]:
        after = first + 1
        while after < plan.shape[0] and plan[after, D3] == plan[first, D3]:
            after += 1
        start_first_stages(x, plan, first, after, work)
        total = np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            table = work.ctypes.data + 4 * plan[first, TABLES]
            inputs = work.ctypes.data + 4 * plan[first, INPUTS] + 60 * u
            total += _build_tables_avx2(inputs, width, table, 32)
            for i in range(first, after):
                tiles = plan[i, TILES_1] + 64 * u
                sums = work.ctypes.data + 4 * plan[i, SUMS_1]
                _mix_avx2(tiles, plan[i, N_TILES_1], 64 * n_units, table, width, sums)
        for i in range(first, after):
            check += finish_first_stage(plan[i], total, work)
        first = after
    for i in range(plan.shape[0]):
        n_units = plan[i, N_UNITS_2]
        block = block_size(n_units, BLOCK_UNITS)
        total = np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            table = work.ctypes.data + 4 * plan[i, TABLES]
            inputs = work.ctypes.data + 4 * plan[i, INNER] + 60 * u
            total += _build_tables_avx2(inputs, width, table, 32)
            tiles = plan[i, TILES_2] + 64 * u
            sums = work.ctypes.data + 4 * plan[i, SUMS_2]
            _mix_avx2(tiles, plan[i, N_TILES_2], 64 * n_units, table, width, sums)
        totals[i] = total
        check += finish_second_stage(plan[i], total, work)
    if np.isfinite(check):
        write_results(plan, work, added, out)
    return check
