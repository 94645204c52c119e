"""Matrix x matrix for packed 0/1 matrices: the method of four Russians, tables of column vectors.

For a group of 5 inputs the 32 partial sums, each for one cache line of columns (16 float32, 8
float64), form a table; an output row adds one entry a group. The tables of a few units stay in the
cache while all rows pass over them. The vectors are plain LLVM vectors: AVX-512, AVX2, SSE or NEON,
whatever the CPU has.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py 2f24896001fa
from diba_np.kernels._jit import njit

BLOCK_UNITS = 5  # units whose tables are built at a time: 30 KiB
# columns done between two synchronisations: bounds the inner k x columns matrix
CHUNK_COLUMNS = 512


def _element(scalar):
    """Return the LLVM element type of a Numba float type and the lanes of a cache line."""
    return (_ir.F32, 16) if scalar == types.float32 else (_ir.F64, 8)


@intrinsic
def _build_tables(typingctx, panel, n_units, tables, totals, zero):
    """Write the tables of ``15 * n_units`` rows of a panel and add the rows to the `totals`.

    `zero` sets the type.
    """
    signature = types.void(types.intp, types.intp, types.intp, types.intp, zero)
    element, lanes = _element(zero)
    vector = _ir.vector(element, lanes)

    def codegen(context, builder, signature, args):
        panel, n_units, tables, totals, _ = args

        def body(i, carried):
            source = builder.add(panel, builder.mul(i, _ir.index(5 * 64)))
            target = builder.add(tables, builder.mul(i, _ir.index(32 * 64)))
            x = [
                _ir.load(builder, _ir.offset(builder, source, 64 * j), vector, 64) for j in range(5)
            ]

            def descend(bit, entry, value):
                """Depth first, so that only one sum a level is alive."""
                if bit < 0:
                    _ir.store(builder, value, _ir.offset(builder, target, 64 * entry), 64)
                    return value
                descend(bit - 1, entry, value)
                return descend(bit - 1, entry + (1 << bit), builder.fadd(value, x[bit]))

            return [builder.fadd(carried[0], descend(4, 0, _ir.splat_constant(vector, 0.0)))]

        before = _ir.load(builder, totals, vector, 64)
        (after,) = _ir.counted_loop(builder, builder.mul(n_units, _ir.index(3)), [before], body)
        _ir.store(builder, after, totals, 64)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _mix_tile(typingctx, tile, ahead, tables, n_units, sums, zero):
    """Add the look-ups of `n_units` units to the 32 rows of sums of a tile; `zero` sets the type.

    `ahead` is the address of a tile to fetch meanwhile: the tiles lie far apart, and the hardware
    does not guess.
    """
    signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp, zero)
    element, lanes = _element(zero)
    vector = _ir.vector(element, lanes)

    def codegen(context, builder, signature, args):
        tile, ahead, tables, n_units, sums, _ = args
        entry_mask = ir.Constant(_ir.I32, 31 * 64)

        def lane(i, nothing):
            words = builder.add(tile, builder.mul(i, _ir.index(4)))
            rows = builder.add(sums, builder.mul(i, _ir.index(64)))
            rows = [rows, _ir.offset(builder, rows, 16 * 64)]

            def unit(u, carried):
                table = builder.add(tables, builder.mul(u, _ir.index(3 * 32 * 64)))
                bits = _ir.load(
                    builder, builder.add(words, builder.mul(u, _ir.index(64))), _ir.I32, 4
                )
                for g in range(3):
                    for half in range(2):
                        # (bits >> (5 g + 16 half) & 31) * 64
                        shift = 5 * g + 16 * half - 6
                        moved = builder.lshr if shift > 0 else builder.shl
                        entry = builder.and_(
                            moved(bits, ir.Constant(_ir.I32, abs(shift))), entry_mask
                        )
                        entry = builder.add(
                            _ir.offset(builder, table, g * 32 * 64), builder.zext(entry, _ir.I64)
                        )
                        carried[half] = builder.fadd(
                            carried[half], _ir.load(builder, entry, vector, 64)
                        )
                return carried

            _ir.prefetch(builder, builder.add(ahead, builder.mul(i, _ir.index(64))))
            first = [_ir.load(builder, row, vector, 64) for row in rows]
            final = _ir.counted_loop(builder, n_units, first, unit)
            for value, row in zip(final, rows, strict=True):
                _ir.store(builder, value, row, 64)
            return []

        _ir.counted_loop(builder, _ir.index(16), [], lane)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def _mix_panel(source, first, scale_in, tiles, start, stop, alpha, scale_out, bias, out, first_out):
    """Do the rows of the tiles ``start ... stop - 1`` for one cache line of columns.

    Column c of the result, ``scale_out * ((B - alpha) (scale_in * source[:, first + c])) + bias``,
    goes to ``out[:, first_out + c]``.
    """
    lanes = 64 // source.itemsize
    n_units = tiles.shape[1]
    block = min(n_units, BLOCK_UNITS)
    # one allocation, every part on a cache line: tables, panel, totals, sums
    lines = 96 * block + 15 * block + 1 + 32 * (stop - start)
    memory = np.zeros((lines + 1) * lanes, dtype=source.dtype)
    skip = (-memory.ctypes.data) % 64 // source.itemsize
    memory = memory[skip : skip + lines * lanes].reshape(lines, lanes)
    panel = memory[96 * block : 111 * block]
    totals = memory[111 * block]
    sums = memory[111 * block + 1 :]
    zero = totals[0]
    for u in range(0, n_units, block):
        units = min(block, n_units - u)
        rows = min(15 * units, source.shape[0] - 15 * u)
        for j in range(rows):
            scale = scale_in[15 * u + j]
            for c in range(lanes):
                panel[j, c] = scale * source[15 * u + j, first + c]
        panel[rows : 15 * units] = 0
        _build_tables(panel.ctypes.data, units, memory.ctypes.data, totals.ctypes.data, zero)
        for t in range(start, stop):
            tile = tiles.ctypes.data + 64 * (n_units * t + u)
            ahead = tile + 64 * n_units * min(2, stop - 1 - t)
            target = sums.ctypes.data + 2048 * (t - start)
            _mix_tile(tile, ahead, memory.ctypes.data, units, target, zero)
    if alpha == 0:
        totals[:] = 0  # 0 * total would be NaN where the total, which no row asked for, overflows
    for i in range(32 * start, min(32 * stop, scale_out.size)):
        shift = bias[i] if bias.size else alpha * 0
        for c in range(lanes):
            mixed = sums[i - 32 * start, c] - alpha * totals[c]
            out[i, first_out + c] = scale_out[i] * mixed + shift


@njit(fastmath=False)
def product_columns(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a matrix.

    ``Z = D2 (B2 - alpha) D3 X``, then ``out = D1 (B1 - alpha) Z + bias``. With `tiles1` of no tiles
    only the first stage runs: ``out = D2 (B2 - alpha) D3 X + bias``. All floats are float32, or all
    are float64. Columns are done by whole cache lines (16 float32, 8 float64).

    Parameters
    ----------
    x : (n, b), C-order
        Columns past the last whole line are left out.
    d3 : (n,)
    tiles2 : (ceil(k / 32), ceil(n / 15), 16) uint32, C-order
    d2 : (k,)
    tiles1 : (ceil(m / 32), ceil(k / 15), 16) uint32, C-order, or no tiles at all
    d1 : (m,)
    alpha : scalar of the same type
    bias : (m,) or (k,) or (0,)
    n_parts : int
        Ignored here; in the parallel twin the number of threads to plan for.
    out : (m, b) or (k, b), C-order, overwritten up to the same column

    Notes
    -----
    Time k (m + n) b / 62 cycles (AVX-512, float32); extra memory two cache lines for every output
    row of a stage and 30 KiB a thread, in the `_par` twin also k by `CHUNK_COLUMNS` floats. The
    twin is bitwise equal. naive: ``tests/naive.py::product_columns``.
    """
    none = np.empty(0, dtype=x.dtype)
    lanes = 64 // x.itemsize
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    z = np.empty((d2.size if n_tiles1 else 0, lanes), dtype=x.dtype)
    ones = np.ones(d2.size if n_tiles1 else 0, dtype=x.dtype)
    for first in range(0, x.shape[1] // lanes * lanes, lanes):
        if n_tiles1 == 0:
            _mix_panel(x, first, d3, tiles2, 0, n_tiles2, alpha, d2, bias, out, first)
        else:
            _mix_panel(x, first, d3, tiles2, 0, n_tiles2, alpha, d2, none, z, 0)
            _mix_panel(z, 0, ones, tiles1, 0, n_tiles1, alpha, d1, bias, out, first)


@njit(fastmath=False, parallel=True)
def product_columns_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_columns` does, cut into panels of columns and, if these are few, rows."""
    none = np.empty(0, dtype=x.dtype)
    lanes = 64 // x.itemsize
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    ones = np.ones(d2.size, dtype=x.dtype)
    n_columns = x.shape[1] // lanes * lanes
    for chunk in range(0, n_columns, CHUNK_COLUMNS):
        columns = min(CHUNK_COLUMNS, n_columns - chunk)
        panels = columns // lanes
        pieces = 1 if panels % n_parts == 0 else n_parts
        two = n_tiles1 > 0
        z = np.empty((d2.size, columns), dtype=x.dtype) if two else out
        z_first = 0 if two else chunk
        bias2 = none if two else bias
        for item in numba.prange(panels * pieces):
            panel, piece = item // pieces, item % pieces
            start, stop = n_tiles2 * piece // pieces, n_tiles2 * (piece + 1) // pieces
            first = panel * lanes
            into = z_first + first
            _mix_panel(x, chunk + first, d3, tiles2, start, stop, alpha, d2, bias2, z, into)
        if two:
            for item in numba.prange(panels * pieces):
                panel, piece = item // pieces, item % pieces
                start, stop = n_tiles1 * piece // pieces, n_tiles1 * (piece + 1) // pieces
                first = panel * lanes
                into = chunk + first
                _mix_panel(z, first, ones, tiles1, start, stop, alpha, d1, bias, out, into)
