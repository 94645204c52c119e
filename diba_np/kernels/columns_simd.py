"""Matrix x matrix for packed 0/1 matrices with look-ups inside vector registers (AVX-512).

Up to four columns at a time share the bits and what is done with them before a look-up. Inside,
every column lies contiguous. How the look-ups work: ``kernels/_permute.py``; layout of the tiles:
``kernels/layout.py``. Where memory holds the tables instead: ``kernels/columns.py``.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import (  # _lookup.py baa33a2a7297
    block_size,
    cache_lines,
    finish,
    zero_if_finite,
)
from diba_np.kernels._permute import AVX512  # _permute.py 843d2749a41a
from diba_np.kernels._terms import first_tiles, second_tiles  # _terms.py eb4c554a8480

# units whose tables are built at a time, 24 KiB for four columns; the same for fewer, so that the
# totals of the inputs come out the same
BLOCK_UNITS = 16
CHUNK_COLUMNS = 128  # done at a time, in all threads together: more would leave the cache

_VECTOR, _MASK = _ir.vector(_ir.F32, 16), _ir.vector(ir.IntType(1), 16)

_build_tables = AVX512.make_build_tables()
_mix_2_columns = AVX512.make_mix_tiles(2, 2)
_mix_3_columns = AVX512.make_mix_tiles(2, 3)
_mix_4_columns = AVX512.make_mix_tiles(2, 4)


def _masks(builder, n_rows, n_lanes):
    """Return a mask for each of 16 rows: its first lanes, or none if there is no such row."""
    lanes = ir.Constant(_ir.vector(_ir.I32, 16), list(range(16)))
    width = _ir.broadcast(builder, builder.trunc(n_lanes, _ir.I32), lanes.type)
    chosen, none = builder.icmp_signed("<", lanes, width), _ir.splat_constant(_MASK, 0)
    return [
        builder.select(builder.icmp_signed("<", _ir.index(i), n_rows), chosen, none)
        for i in range(16)
    ]


def _load_masked(builder, address, mask):
    """Load 16 float32, zeros where the mask is not set; nothing is read there."""
    pointer = _VECTOR.as_pointer()
    name, arguments = "llvm.masked.load.v16f32.p0", [pointer, _ir.I32, _MASK, _VECTOR]
    load = _ir.declare(builder, name, _VECTOR, arguments)
    zeros, align = _ir.splat_constant(_VECTOR, 0.0), ir.Constant(_ir.I32, 4)
    return builder.call(load, [builder.inttoptr(address, pointer), align, mask, zeros])


def _store_masked(builder, value, address, mask):
    """Store 16 float32 where the mask is set."""
    pointer = _VECTOR.as_pointer()
    name, arguments = "llvm.masked.store.v16f32.p0", [_VECTOR, pointer, _ir.I32, _MASK]
    store = _ir.declare(builder, name, ir.VoidType(), arguments)
    align = ir.Constant(_ir.I32, 4)
    builder.call(store, [value, builder.inttoptr(address, pointer), align, mask])


def _rows(builder, start, step):
    """Return the addresses of 16 rows."""
    return [builder.add(start, builder.mul(step, _ir.index(i))) for i in range(16)]


@intrinsic
def _gather_block(typingctx, source, source_step, n_rows, n_lanes, scale, target, target_step):
    """Write the transpose of 16 x 16 float32, each row times its scale; steps in bytes.

    Only `n_rows` x `n_lanes` of it, and as many scales, are read; the others count as zeros.
    """
    signature = types.void(*[types.intp] * 7)

    def codegen(context, builder, signature, args):
        source, source_step, n_rows, n_lanes, scale, target, target_step = args
        masks = _masks(builder, n_rows, n_lanes)
        addresses = _rows(builder, source, source_step)
        rows = [_load_masked(builder, *pair) for pair in zip(addresses, masks, strict=True)]
        scales = _load_masked(builder, scale, _masks(builder, _ir.index(1), n_rows)[0])
        columns = _ir.transposed(builder, rows)
        for column, address in zip(columns, _rows(builder, target, target_step), strict=True):
            _ir.store(builder, builder.fmul(column, scales), address, 4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _scatter_block(typingctx, source, source_step, target, target_step, n_rows, n_lanes):
    """Write `n_rows` x `n_lanes` of the transpose of 16 x 16 float32; steps in bytes."""
    signature = types.void(*[types.intp] * 6)

    def codegen(context, builder, signature, args):
        source, source_step, target, target_step, n_rows, n_lanes = args
        addresses = _rows(builder, source, source_step)
        rows = _ir.transposed(builder, [_ir.load(builder, a, _VECTOR, 4) for a in addresses])
        masks = _masks(builder, n_rows, n_lanes)
        for row, address, mask in zip(
            rows, _rows(builder, target, target_step), masks, strict=True
        ):
            _store_masked(builder, row, address, mask)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def _column_arrays(n_columns, size, like):
    """Return uninitialized float32, for each column a row of at least `size`, from a line on."""
    # an odd number of lines apart: a power of two would put all rows in the same cache sets
    return cache_lines(n_columns, -(-size // 16) | 1, like).reshape(n_columns, -1)


@njit(fastmath=False)
def _gather(x, first, n_columns, scale, start, stop, columns):
    """Write ``scale * x`` of some columns to the rows of `columns`, blocks ``start ... stop - 1``.

    A block is 16 rows of x; those past the last one are zero.
    """
    n, step = scale.size, 4 * columns.shape[1]
    for j in range(16 * start, 16 * stop, 16):
        n_rows = max(0, min(16, n - j))
        for c in range(0, n_columns, 16):
            n_lanes = min(16, n_columns - c)
            source = x.ctypes.data + 4 * (x.shape[1] * j + first + c)
            target = columns.ctypes.data + 4 * j + step * c
            scales = scale.ctypes.data + 4 * j
            _gather_block(source, 4 * x.shape[1], n_rows, n_lanes, scales, target, step)


@njit(fastmath=False)
def _scatter(columns, n_columns, start, stop, out, first):
    """Write the rows of `columns` to some columns of `out`, blocks of 16 of its rows."""
    m, step = out.shape[0], 4 * columns.shape[1]
    for i in range(16 * start, 16 * stop, 16):
        n_rows = min(16, m - i)
        for c in range(0, n_columns, 16):
            n_lanes = min(16, n_columns - c)
            source = columns.ctypes.data + 4 * i + step * c
            target = out.ctypes.data + 4 * (out.shape[1] * i + first + c)
            _scatter_block(source, step, target, 4 * out.shape[1], n_rows, n_lanes)


@njit(fastmath=False)
def _mix_part(columns, tiles, start, stop, shift, scale, out):
    """Do the output rows of the tiles ``start ... stop - 1`` for 2 to 4 columns.

    Returns 0, or NaN where the inputs or a row's sum are not finite.
    """
    n_columns, n_units = columns.shape[0], tiles.shape[1]
    block = block_size(n_units, BLOCK_UNITS)
    tables = cache_lines(1, 6 * block * n_columns, columns)
    # a tile without a partner is its own, and what that adds goes to 32 rows more
    sums = _column_arrays(n_columns, 32 * (stop - start) + 32, columns)
    sums[:] = 0
    totals = np.zeros(n_columns, dtype=np.float32)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = tables.ctypes.data
        for c in range(n_columns):
            inputs = columns.ctypes.data + 4 * (columns.shape[1] * c + 15 * u)
            totals[c] += _build_tables(inputs, width, table + 128 * c, 128 * n_columns)
        for t in range(start, stop, 2):
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            step = 64 * n_units if t + 1 < stop else 0
            row = 4 * sums.shape[1]
            if n_columns == 4:
                _mix_4_columns(source, step, table, width, target, row)
            elif n_columns == 3:
                _mix_3_columns(source, step, table, width, target, row)
            else:
                _mix_2_columns(source, step, table, width, target, row)
    total = zero_if_finite(totals)
    for c in range(n_columns):
        rows = sums[c, : 32 * (stop - start)]
        finish(rows, 32 * start, shift, totals[c], scale, totals[:0], out[c])
        total += zero_if_finite(rows)
    return total


@njit(fastmath=False)
def _inner_columns(n_rows, d2, tiles1):
    """Return room for the first stage's result, zero where the second stage reads beyond it."""
    size = d2.size if tiles1.shape[0] == 0 else 15 * tiles1.shape[1]
    inner = _column_arrays(n_rows, size, d2)
    inner[:, d2.size :] = 0
    return inner


@njit(fastmath=False)
def _plan(n_columns, n_parts):
    """Return how many groups of columns to make, and into how many pieces to cut their rows.

    Groups have 2 to 4 columns. They are dealt out whole if each thread gets as many.
    """
    groups = -(-n_columns // 4)
    even = -(-groups // n_parts) * n_parts
    return (even, 1) if 2 * even <= n_columns else (groups, n_parts)


@njit(fastmath=False)
def product_columns_avx512(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what ``columns.product_columns`` does, in float32, for any number of columns from 2 on.

    Returns
    -------
    float32
        Finite only if ``d3 * x``, the first stage's result and all rows' sums are.

    Notes
    -----
    Time k (m + n) b / 110 cycles (Zen 5); extra memory 4 (n + k + m) min(b, `CHUNK_COLUMNS`) bytes,
    and 24 KiB and 16 max(k, m) bytes a thread. If `shift` is 0 every column has the bits that
    ``lookup_simd.product_avx512`` gives. The `_par` twin's `out` is bitwise equal. naive:
    ``tests/naive.py::product_columns_avx512``.
    """
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    total = np.float32(0.0)
    n_chunks = -(-x.shape[1] // CHUNK_COLUMNS)
    for chunk in range(n_chunks):
        first = x.shape[1] * chunk // n_chunks
        n_columns = x.shape[1] * (chunk + 1) // n_chunks - first
        n_rows = -(-n_columns // 16) * 16  # transposed by whole blocks
        columns = _column_arrays(n_rows, 15 * tiles2.shape[1], x)
        _gather(x, first, n_columns, d3, 0, columns.shape[1] // 16, columns)
        inner = _inner_columns(n_rows, d2, tiles1)
        results = _column_arrays(n_rows, d1.size, x) if n_tiles1 else inner
        groups = -(-n_columns // 4)
        for g in range(groups):
            a, b = n_columns * g // groups, n_columns * (g + 1) // groups
            total += _mix_part(columns[a:b], tiles2, 0, n_tiles2, shift, d2, inner[a:b])
            if n_tiles1:
                total += _mix_part(inner[a:b], tiles1, 0, n_tiles1, shift, d1, results[a:b])
        _scatter(results, n_columns, 0, -(-out.shape[0] // 16), out, first)
    return total


@njit(fastmath=False, parallel=True)
def product_columns_avx512_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_columns_avx512` does, cut into columns and, if these are few, rows."""
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    total = np.float32(0.0)
    n_chunks = -(-x.shape[1] // max(CHUNK_COLUMNS, 4 * n_parts))
    for chunk in range(n_chunks):
        first = x.shape[1] * chunk // n_chunks
        n_columns = x.shape[1] * (chunk + 1) // n_chunks - first
        n_rows = -(-n_columns // 16) * 16  # transposed by whole blocks
        groups, pieces = _plan(n_columns, n_parts)
        columns = _column_arrays(n_rows, 15 * tiles2.shape[1], x)
        inner = _inner_columns(n_rows, d2, tiles1)
        results = _column_arrays(n_rows, d1.size, x) if n_tiles1 else inner
        totals = np.empty(groups * pieces, dtype=np.float32)
        for p in numba.prange(n_parts):
            blocks = columns.shape[1] // 16
            start, stop = blocks * p // n_parts, blocks * (p + 1) // n_parts
            _gather(x, first, n_columns, d3, start, stop, columns)
        for item in numba.prange(groups * pieces):
            g, piece = item // pieces, item % pieces
            a, b = n_columns * g // groups, n_columns * (g + 1) // groups
            start, stop = n_tiles2 * piece // pieces, n_tiles2 * (piece + 1) // pieces
            totals[item] = _mix_part(columns[a:b], tiles2, start, stop, shift, d2, inner[a:b])
            if n_tiles1 and pieces == 1:
                totals[item] += _mix_part(inner[a:b], tiles1, 0, n_tiles1, shift, d1, results[a:b])
        if n_tiles1 and pieces > 1:
            for item in numba.prange(groups * pieces):
                g, piece = item // pieces, item % pieces
                a, b = n_columns * g // groups, n_columns * (g + 1) // groups
                start, stop = n_tiles1 * piece // pieces, n_tiles1 * (piece + 1) // pieces
                totals[item] += _mix_part(inner[a:b], tiles1, start, stop, shift, d1, results[a:b])
        for p in numba.prange(n_parts):
            blocks = -(-out.shape[0] // 16)
            start, stop = blocks * p // n_parts, blocks * (p + 1) // n_parts
            _scatter(results, n_columns, start, stop, out, first)
        total += totals.sum()
    return total


@njit(fastmath=False)
def _add_columns(part, n_columns, start, stop, first, sums):
    """Add some rows of a term's columns to the sums; the first term's are copied."""
    for c in range(n_columns):
        source, target = part[c, start:stop], sums[c, start:stop]
        if first:
            target[:] = source
        else:
            for i in range(target.size):
                target[i] += source[i]


@njit(fastmath=False)
def product_terms_columns_avx512(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what ``columns.product_terms_columns`` does, in float32, for 2 columns and more.

    Returns
    -------
    float32
        Finite only if all terms' ``D3_t X``, all rows' sums of both stages, and `out` are.

    Notes
    -----
    Time as of `product_columns_avx512` with k the sum of all terms, and a pass over x and the sums
    for each. The `_par` twin's `out` is bitwise equal. naive:
    ``tests/naive.py::product_terms_columns_avx512``.
    """
    m, n_tiles1 = out.shape[0], -(-out.shape[0] // 32)
    total = np.float32(0.0)
    n_chunks = -(-x.shape[1] // CHUNK_COLUMNS)
    for chunk in range(n_chunks):
        first = x.shape[1] * chunk // n_chunks
        n_columns = x.shape[1] * (chunk + 1) // n_chunks - first
        n_rows = -(-n_columns // 16) * 16  # transposed by whole blocks
        columns = _column_arrays(n_rows, 15 * tiles2.shape[1], x)
        results, sums = _column_arrays(n_rows, m, x), _column_arrays(n_rows, m, x)
        groups = -(-n_columns // 4)
        for t in range(d3.shape[0]):
            tiles, others = first_tiles(tiles2, starts, t), second_tiles(tiles1, starts, t)
            scale = d2[starts[t, 0] : starts[t + 1, 0]]
            inner = _inner_columns(n_rows, scale, others)
            _gather(x, first, n_columns, d3[t], 0, columns.shape[1] // 16, columns)
            for g in range(groups):
                a, b = n_columns * g // groups, n_columns * (g + 1) // groups
                total += _mix_part(columns[a:b], tiles, 0, len(tiles), shift, scale, inner[a:b])
                total += _mix_part(inner[a:b], others, 0, n_tiles1, shift, d1[t], results[a:b])
            _add_columns(results, n_columns, 0, m, t == 0, sums)
        _scatter(sums, n_columns, 0, -(-m // 16), out, first)
        total += _zero_if_finite_columns(sums, n_columns, 0, m)
    return total


@njit(fastmath=False)
def _zero_if_finite_columns(columns, n_columns, start, stop):
    """Return 0, or NaN if an entry of some rows is not finite."""
    total = np.float32(0.0)
    for c in range(n_columns):
        total += zero_if_finite(columns[c, start:stop])
    return total


@njit(fastmath=False, parallel=True)
def product_terms_columns_avx512_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_columns_avx512` does, cut as `product_columns_avx512_par`."""
    m, n_tiles1 = out.shape[0], -(-out.shape[0] // 32)
    total = np.float32(0.0)
    n_chunks = -(-x.shape[1] // max(CHUNK_COLUMNS, 4 * n_parts))
    for chunk in range(n_chunks):
        first = x.shape[1] * chunk // n_chunks
        n_columns = x.shape[1] * (chunk + 1) // n_chunks - first
        n_rows = -(-n_columns // 16) * 16  # transposed by whole blocks
        groups, pieces = _plan(n_columns, n_parts)
        columns = _column_arrays(n_rows, 15 * tiles2.shape[1], x)
        results, sums = _column_arrays(n_rows, m, x), _column_arrays(n_rows, m, x)
        totals = np.empty(groups * pieces, dtype=np.float32)
        for t in range(d3.shape[0]):
            tiles, others = first_tiles(tiles2, starts, t), second_tiles(tiles1, starts, t)
            scale = d2[starts[t, 0] : starts[t + 1, 0]]
            n_tiles2 = len(tiles)
            inner = _inner_columns(n_rows, scale, others)
            for p in numba.prange(n_parts):
                blocks = columns.shape[1] // 16
                start, stop = blocks * p // n_parts, blocks * (p + 1) // n_parts
                _gather(x, first, n_columns, d3[t], start, stop, columns)
            for item in numba.prange(groups * pieces):
                g, piece = item // pieces, item % pieces
                a, b = n_columns * g // groups, n_columns * (g + 1) // groups
                start, stop = n_tiles2 * piece // pieces, n_tiles2 * (piece + 1) // pieces
                totals[item] = _mix_part(columns[a:b], tiles, start, stop, shift, scale, inner[a:b])
            for item in numba.prange(groups * pieces):
                g, piece = item // pieces, item % pieces
                a, b = n_columns * g // groups, n_columns * (g + 1) // groups
                start, stop = n_tiles1 * piece // pieces, n_tiles1 * (piece + 1) // pieces
                totals[item] += _mix_part(
                    inner[a:b], others, start, stop, shift, d1[t], results[a:b]
                )
                rows, last = 32 * start, min(32 * stop, m)
                _add_columns(results[a:b], b - a, rows, last, t == 0, sums[a:b])
                totals[item] += _zero_if_finite_columns(sums[a:b], b - a, rows, last)
            total += totals.sum()
        for p in numba.prange(n_parts):
            blocks = -(-m // 16)
            start, stop = blocks * p // n_parts, blocks * (p + 1) // n_parts
            _scatter(sums, n_columns, start, stop, out, first)
    return total
