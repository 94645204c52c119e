"""Several DiBA factorizations times one vector in one call, on 64-bit Arm (NEON).

As ``lookup_neon.product_neon`` does one, to the last bit; the rest as in ``stack_simd``.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import block_size  # _lookup.py e780d5b3414a
from diba_np.kernels._neon import (  # _neon.py b74621ec586d
    build_float_tables_neon,
    mix_float_tile_neon,
)
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

BLOCK_UNITS = 28  # as in ``lookup_neon``, so that sums come out the same


@njit(fastmath=False)
def _mix(tiles, n_tiles, stride, table, n_units, sums):
    """Add the look-ups of some units to the sums of all tiles; addresses, `stride` in bytes."""
    for t in range(n_tiles):
        tile = tiles + stride * t
        ahead = tile + stride * min(1, n_tiles - 1 - t)
        mix_float_tile_neon(tile, ahead, table, n_units, sums + 128 * t)


@njit(fastmath=False)
def stack_neon(x, plan, work, added, out):
    """Do what ``stack_simd.stack_avx512`` does, with NEON.

    naive: ``tests/naive.py::stack_neon``.
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
            total += build_float_tables_neon(inputs, width, table)
            for i in range(first, after):
                tiles = plan[i, TILES_1] + 64 * u
                sums = work.ctypes.data + 4 * plan[i, SUMS_1]
                _mix(tiles, plan[i, N_TILES_1], 64 * n_units, table, width, sums)
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
            total += build_float_tables_neon(inputs, width, table)
            tiles = plan[i, TILES_2] + 64 * u
            sums = work.ctypes.data + 4 * plan[i, SUMS_2]
            _mix(tiles, plan[i, N_TILES_2], 64 * n_units, table, width, sums)
        totals[i] = total
        check += finish_second_stage(plan[i], total, work)
    if np.isfinite(check):
        write_results(plan, work, added, out)
    return check
