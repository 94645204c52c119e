"""Matrix x matrix for packed 0/1 matrices: the method of four Russians, tables of column vectors.

For a group of 5 inputs the 32 partial sums, each for one cache line of columns (16 float32, 8
float64), form a table; an output row adds one entry a group. The tables of a few units stay in the
cache while all rows pass over them. The vectors are plain LLVM vectors: AVX-512, AVX2, SSE or NEON,
whatever the CPU has. Inside, matrices are kept as panels: a cache line of columns each, row after
row.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import cache_lines  # _lookup.py baa33a2a7297
from diba_np.kernels._terms import first_tiles, second_tiles  # _terms.py eb4c554a8480

BLOCK_UNITS = 5  # units whose tables are built at a time: 30 KiB
# panels done at a time, in all threads together: more would leave the last-level cache
CHUNK_PANELS = 8


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


def _look_up_unit(builder, bits, tables, unit_offset, carried):
    """Add a unit's 3 look-ups for the two rows whose bits a word holds; return their sums."""
    entry_mask = ir.Constant(_ir.I32, 31 * 64)
    vector = carried[0].type
    for g in range(3):
        table = _ir.offset(builder, tables, unit_offset + g * 32 * 64)
        for half in range(2):
            # (bits >> (5 g + 16 half) & 31) * 64
            places = 5 * g + 16 * half - 6
            moved = builder.lshr if places > 0 else builder.shl
            entry = builder.and_(moved(bits, ir.Constant(_ir.I32, abs(places))), entry_mask)
            entry = builder.add(table, builder.zext(entry, _ir.I64))
            carried[half] = builder.fadd(carried[half], _ir.load(builder, entry, vector, 64))
    return carried


def _make_mix_tile(fixed_units):
    @intrinsic
    def mix_tile(typingctx, tile, ahead, tables, n_units, sums, zero):
        """Add the look-ups of some units to the 32 rows of sums of a tile; `zero` sets the type.

        `ahead` is the address of a tile to fetch meanwhile: the tiles lie far apart, and the
        hardware does not guess.
        """
        signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp, zero)
        element, lanes = _element(zero)
        vector = _ir.vector(element, lanes)

        def codegen(context, builder, signature, args):
            tile, ahead, tables, n_units, sums, _ = args

            def lane(i, nothing):
                words = builder.add(tile, builder.mul(i, _ir.index(4)))
                row = builder.add(sums, builder.mul(i, _ir.index(64)))
                rows = [row, _ir.offset(builder, row, 16 * 64)]

                def unit(u, carried):
                    word = builder.add(words, builder.mul(u, _ir.index(64)))
                    bits = _ir.load(builder, word, _ir.I32, 4)
                    table = builder.add(tables, builder.mul(u, _ir.index(3 * 32 * 64)))
                    return _look_up_unit(builder, bits, table, 0, carried)

                carried = [_ir.load(builder, row, vector, 64) for row in rows]
                for u in range(fixed_units):
                    bits = _ir.load(builder, _ir.offset(builder, words, 64 * u), _ir.I32, 4)
                    carried = _look_up_unit(builder, bits, tables, 3 * 32 * 64 * u, carried)
                if not fixed_units:
                    carried = _ir.counted_loop(builder, n_units, carried, unit)
                for value, row in zip(carried, rows, strict=True):
                    _ir.store(builder, value, row, 64)
                return []

            for u in range(fixed_units or 1):
                _ir.prefetch(builder, _ir.offset(builder, ahead, 64 * u))
            _ir.counted_loop(builder, _ir.index(16), [], lane)
            return context.get_dummy_value()

        return signature, codegen

    return mix_tile


_mix_tile = _make_mix_tile(0)  # any number of units
_mix_tile_block = _make_mix_tile(BLOCK_UNITS)  # without a loop: the sums of more rows overlap


@intrinsic
def _scale_lines(typingctx, source, source_step, n, scale, target, target_step, totals):
    """Write ``scale * line`` of `n` cache lines, and add what is written to the `totals`.

    Lines are `source_step` and `target_step` bytes apart; the scale sets the type.
    """
    address = types.intp
    signature = types.void(*(address, address, address, scale, address, address, address))
    element, lanes = _element(scale)
    vector = _ir.vector(element, lanes)

    def codegen(context, builder, signature, args):
        source, source_step, n, scale, target, target_step, totals = args
        scales = _ir.broadcast(builder, scale, vector)

        def body(i, carried):
            line = builder.add(source, builder.mul(i, source_step))
            line = _ir.load(builder, line, vector, 64 // lanes)
            line = builder.fmul(line, scales)
            address = builder.add(target, builder.mul(i, target_step))
            _ir.store(builder, line, address, 64 // lanes)
            return [builder.fadd(carried[0], line)]

        before = _ir.load(builder, totals, vector, 64)
        (after,) = _ir.counted_loop(builder, n, [before], body)
        _ir.store(builder, after, totals, 64)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _add_lines(typingctx, source, n, scale, target):
    """Add ``scale * line`` of `n` cache lines, one after the other, to those of the target."""
    signature = types.void(types.intp, types.intp, scale, types.intp)
    element, lanes = _element(scale)
    vector = _ir.vector(element, lanes)

    def codegen(context, builder, signature, args):
        source, n, scale, target = args
        scales = _ir.broadcast(builder, scale, vector)

        def body(i, carried):
            step = builder.mul(i, _ir.index(64))
            line = _ir.load(builder, builder.add(source, step), vector, 64)
            address = builder.add(target, step)
            before = _ir.load(builder, address, vector, 64)
            sums = builder.fadd(before, builder.fmul(line, scales))
            _ir.store(builder, sums, address, 64)
            return []

        _ir.counted_loop(builder, n, [], body)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def _gather(source, first, scale, start, stop, panels, totals):
    """Write ``scale * source`` of some rows to panels, a cache line of columns each.

    Rows past the last one are zero. Reading and writing both go along the rows: a panel alone
    would take one line of each row, and wait for every one. What is written is added to the
    `totals`, one cache line.
    """
    size = 64 * panels.shape[1]
    for j in range(start, min(stop, scale.size)):
        row = source.ctypes.data + source.itemsize * (source.shape[1] * j + first)
        line = panels.ctypes.data + 64 * j
        _scale_lines(row, 64, panels.shape[0], scale[j], line, size, totals.ctypes.data)
    panels[:, max(start, scale.size) : stop] = 0


@njit(fastmath=False)
def _scatter(panels, scale, start, stop, out, first, totals):
    """Write ``scale * panels`` of some rows to the columns of `out` from `first` on.

    What is written is added to the `totals`, one cache line.
    """
    size = 64 * panels.shape[1]
    for i in range(start, min(stop, scale.size)):
        row = out.ctypes.data + out.itemsize * (out.shape[1] * i + first)
        line = panels.ctypes.data + 64 * i
        _scale_lines(line, size, panels.shape[0], scale[i], row, 64, totals.ctypes.data)


@njit(fastmath=False)
def _mix_panel(panel, tiles, start, stop, shift, sums):
    """Write ``(B - shift) panel`` to the rows of `sums` of the tiles ``start ... stop - 1``."""
    n_units = tiles.shape[1]
    block = min(n_units, BLOCK_UNITS)
    memory = cache_lines(1, 96 * block + 1, panel)[0]
    totals = memory[96 * block]
    totals[:] = 0
    zero = totals[0]
    sums[32 * start : 32 * stop] = 0
    for u in range(0, n_units, block):
        units = min(block, n_units - u)
        source = panel.ctypes.data + 15 * 64 * u
        _build_tables(source, units, memory.ctypes.data, totals.ctypes.data, zero)
        for t in range(start, stop):
            tile = tiles.ctypes.data + 64 * (n_units * t + u)
            ahead = tile + 64 * n_units * min(2, stop - 1 - t)
            target = sums.ctypes.data + 2048 * t
            if units == BLOCK_UNITS:
                _mix_tile_block(tile, ahead, memory.ctypes.data, units, target, zero)
            else:
                _mix_tile(tile, ahead, memory.ctypes.data, units, target, zero)
    if shift != 0:  # 0 * total would be NaN where the total, which no row asked for, overflows
        for i in range(32 * start, 32 * stop):
            for c in range(sums.shape[1]):
                sums[i, c] -= shift * totals[c]


@njit(fastmath=False)
def _scale_rows(scale, start, stop, panel, totals):
    """Multiply some rows of a panel by their scale; those past the last one become zero.

    What is written is added to the `totals`, one cache line.
    """
    for i in range(start, min(stop, scale.size)):
        line = panel.ctypes.data + 64 * i
        _scale_lines(line, 64, 1, scale[i], line, 64, totals.ctypes.data)
    panel[max(start, scale.size) : stop] = 0


@njit(fastmath=False)
def _inner_rows(tiles2, tiles1):
    """Return how many rows the first stage's result takes: whole tiles, and whole units to read."""
    return max(32 * tiles2.shape[0], 15 * tiles1.shape[1])


@njit(fastmath=False)
def product_columns(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a matrix.

    ``Z = D2 (B2 - shift) D3 X``, then ``out = D1 (B1 - shift) Z``. With `tiles1` of no tiles
    only the first stage runs: ``out = D2 (B2 - shift) D3 X``. All floats are float32, or all
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
    shift : scalar of the same type
    n_parts : int
        Ignored here; in the parallel twin the number of threads to plan for.
    out : (m, b) or (k, b), C-order, overwritten up to the same column

    Returns
    -------
    float
        Finite only if ``d3 * x``, both stages' results and `out` are finite, in these columns.

    Notes
    -----
    Time k (m + n) b / 59 cycles (AVX-512, float32; one load and one addition a cycle would be 80);
    extra memory 64 (n + k + m) times `CHUNK_PANELS`, or the threads if they are more, and 30 KiB
    a thread, in bytes. The `_par` twin's `out` is bitwise equal.
    naive: ``tests/naive.py::product_columns``.
    """
    lanes = 64 // x.itemsize
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    totals = cache_lines(1, 1, x)[0, 0]
    totals[:] = 0
    chunk = lanes * CHUNK_PANELS
    for first in range(0, x.shape[1] // lanes * lanes, chunk):
        n_panels = min(chunk, x.shape[1] - first) // lanes
        panels = cache_lines(n_panels, 15 * tiles2.shape[1], x)
        inner = cache_lines(n_panels, _inner_rows(tiles2, tiles1), x)
        _gather(x, first, d3, 0, panels.shape[1], panels, totals)
        for p in range(n_panels):
            _mix_panel(panels[p], tiles2, 0, n_tiles2, shift, inner[p])
        if n_tiles1 == 0:
            _scatter(inner, d2, 0, 32 * n_tiles2, out, first, totals)
        else:
            results = cache_lines(n_panels, 32 * n_tiles1, x)
            for p in range(n_panels):
                _scale_rows(d2, 0, inner.shape[1], inner[p], totals)
                _mix_panel(inner[p], tiles1, 0, n_tiles1, shift, results[p])
            _scatter(results, d1, 0, 32 * n_tiles1, out, first, totals)
    return totals.sum()


@njit(fastmath=False, parallel=True)
def product_columns_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_columns` does, cut into panels of columns and, if these are few, rows."""
    lanes = 64 // x.itemsize
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    chunk = lanes * n_parts * max(1, CHUNK_PANELS // n_parts)
    totals = cache_lines(1, max(CHUNK_PANELS, n_parts) * n_parts, x)[0]
    totals[:] = 0
    for first in range(0, x.shape[1] // lanes * lanes, chunk):
        n_panels = min(chunk, x.shape[1] - first) // lanes
        pieces = 1 if n_panels % n_parts == 0 else n_parts
        panels = cache_lines(n_panels, 15 * tiles2.shape[1], x)
        inner = cache_lines(n_panels, _inner_rows(tiles2, tiles1), x)
        results = cache_lines(n_panels, 32 * n_tiles1, x)
        for part in numba.prange(n_parts):
            size = panels.shape[1]
            start, stop = size * part // n_parts, size * (part + 1) // n_parts
            _gather(x, first, d3, start, stop, panels, totals[part])
        for item in numba.prange(n_panels * pieces):
            p, piece = item // pieces, item % pieces
            start, stop = n_tiles2 * piece // pieces, n_tiles2 * (piece + 1) // pieces
            _mix_panel(panels[p], tiles2, start, stop, shift, inner[p])
            if n_tiles1:
                last = inner.shape[1] if piece == pieces - 1 else 32 * stop
                _scale_rows(d2, 32 * start, last, inner[p], totals[item])
        if n_tiles1:
            for item in numba.prange(n_panels * pieces):
                p, piece = item // pieces, item % pieces
                start, stop = n_tiles1 * piece // pieces, n_tiles1 * (piece + 1) // pieces
                _mix_panel(inner[p], tiles1, start, stop, shift, results[p])
        for part in numba.prange(n_parts):
            if n_tiles1:
                start, stop = 32 * n_tiles1 * part // n_parts, 32 * n_tiles1 * (part + 1) // n_parts
                _scatter(results, d1, start, stop, out, first, totals[part])
            else:
                start, stop = 32 * n_tiles2 * part // n_parts, 32 * n_tiles2 * (part + 1) // n_parts
                _scatter(inner, d2, start, stop, out, first, totals[part])
    return totals.sum()


@njit(fastmath=False)
def _add_rows(panel, scale, start, stop, first, sums):
    """Add ``scale * panel`` of some rows to the sums; with `first` they begin with that."""
    if first:
        sums[start:stop] = 0
    for i in range(start, min(stop, scale.size)):
        _add_lines(panel.ctypes.data + 64 * i, 1, scale[i], sums.ctypes.data + 64 * i)


@njit(fastmath=False)
def _largest_inner(starts):
    """Return how many rows the first stage's result takes, of the term with most."""
    rows = 0
    for t in range(starts.shape[0] - 1):
        rows = max(rows, 32 * (starts[t + 1, 1] - starts[t, 1]), starts[t + 1, 3] - starts[t, 3])
    return rows


@njit(fastmath=False)
def _ones(size, like):
    """Return ones. A function of its own: in a parallel one Numba would start its threads."""
    return np.ones(size, dtype=like.dtype)


@njit(fastmath=False)
def product_terms_columns(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Multiply a sum of several DiBA factorizations by a matrix.

    ``out = sum_t D1_t (B1_t - shift) D2_t (B2_t - shift) D3_t X``; all floats are float32,
    or all are float64. Columns are done by whole cache lines.

    Parameters
    ----------
    x : (n, b), C-order
        Columns past the last whole line are left out.
    d3, tiles2, d2, tiles1, d1, starts
        Those of all terms, see ``kernels/_terms.py``.
    shift : scalar of the same type
    n_parts : int
        Ignored here; in the parallel twin the number of threads to plan for.
    out : (m, b), C-order, overwritten up to the same column

    Returns
    -------
    float
        Finite only if all terms' ``D3_t X`` and first stages, and `out`, are, in these columns.

    Notes
    -----
    Time as of `product_columns` with k the sum of all terms, and a pass over x and the sums for
    each. The `_par` twin's `out` is bitwise equal. naive:
    ``tests/naive.py::product_terms_columns``.
    """
    lanes, n_tiles1 = 64 // x.itemsize, -(-out.shape[0] // 32)
    totals = cache_lines(1, 1, x)[0, 0]
    totals[:] = 0
    ones, n_inner = _ones(out.shape[0], x), _largest_inner(starts)
    chunk = lanes * CHUNK_PANELS
    for first in range(0, x.shape[1] // lanes * lanes, chunk):
        n_panels = min(chunk, x.shape[1] - first) // lanes
        panels = cache_lines(n_panels, 15 * tiles2.shape[1], x)
        inner = cache_lines(n_panels, n_inner, x)
        result = cache_lines(1, 32 * n_tiles1, x)[0]  # of one term and panel
        sums = cache_lines(n_panels, 32 * n_tiles1, x)
        for t in range(d3.shape[0]):
            tiles, others = first_tiles(tiles2, starts, t), second_tiles(tiles1, starts, t)
            scale = d2[starts[t, 0] : starts[t + 1, 0]]
            _gather(x, first, d3[t], 0, panels.shape[1], panels, totals)
            for p in range(n_panels):
                _mix_panel(panels[p], tiles, 0, len(tiles), shift, inner[p])
                _scale_rows(scale, 0, _inner_rows(tiles, others), inner[p], totals)
                _mix_panel(inner[p], others, 0, n_tiles1, shift, result)
                _add_rows(result, d1[t], 0, 32 * n_tiles1, t == 0, sums[p])
        _scatter(sums, ones, 0, 32 * n_tiles1, out, first, totals)
    return totals.sum()


@njit(fastmath=False, parallel=True)
def product_terms_columns_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_columns` does, cut as `product_columns_par`, term after term."""
    lanes, n_tiles1 = 64 // x.itemsize, -(-out.shape[0] // 32)
    chunk = lanes * n_parts * max(1, CHUNK_PANELS // n_parts)
    totals = cache_lines(1, max(CHUNK_PANELS, n_parts) * n_parts, x)[0]
    totals[:] = 0
    ones, n_inner = _ones(out.shape[0], x), _largest_inner(starts)
    for first in range(0, x.shape[1] // lanes * lanes, chunk):
        n_panels = min(chunk, x.shape[1] - first) // lanes
        pieces = 1 if n_panels % n_parts == 0 else n_parts
        panels = cache_lines(n_panels, 15 * tiles2.shape[1], x)
        inner = cache_lines(n_panels, n_inner, x)
        results = cache_lines(n_panels, 32 * n_tiles1, x)
        sums = cache_lines(n_panels, 32 * n_tiles1, x)
        for t in range(d3.shape[0]):
            tiles, others = first_tiles(tiles2, starts, t), second_tiles(tiles1, starts, t)
            scale = d2[starts[t, 0] : starts[t + 1, 0]]
            n_rows, n_tiles2 = _inner_rows(tiles, others), len(tiles)
            for part in numba.prange(n_parts):
                size = panels.shape[1]
                start, stop = size * part // n_parts, size * (part + 1) // n_parts
                _gather(x, first, d3[t], start, stop, panels, totals[part])
            for item in numba.prange(n_panels * pieces):
                p, piece = item // pieces, item % pieces
                start, stop = n_tiles2 * piece // pieces, n_tiles2 * (piece + 1) // pieces
                _mix_panel(panels[p], tiles, start, stop, shift, inner[p])
                last = n_rows if piece == pieces - 1 else 32 * stop
                _scale_rows(scale, 32 * start, last, inner[p], totals[item])
            for item in numba.prange(n_panels * pieces):
                p, piece = item // pieces, item % pieces
                start, stop = n_tiles1 * piece // pieces, n_tiles1 * (piece + 1) // pieces
                _mix_panel(inner[p], others, start, stop, shift, results[p])
                _add_rows(results[p], d1[t], 32 * start, 32 * stop, t == 0, sums[p])
        for part in numba.prange(n_parts):
            start, stop = 32 * n_tiles1 * part // n_parts, 32 * n_tiles1 * (part + 1) // n_parts
            _scatter(sums, ones, start, stop, out, first, totals[part])
    return totals.sum()
