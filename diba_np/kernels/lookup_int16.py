"""Matrix x vector for packed 0/1 matrices with 16-bit tables (AVX-512 BW, VNNI): fast, not exact.

For 5 inputs the 32 sums ``sum((b_j - 1/2) x_j)`` are rounded to 16 bits on one step for the whole
vector and fill one register; `vpermw` looks up 32 rows at once. The step is such that the sums of
6 look-ups, of a pair of units, fit in 16 bits; `vpdpwssd` widens and adds them to 32-bit sums. Only
the +-1 part goes through the tables: offsets are added in float32, so they cost no precision.
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
from diba_np.kernels._lookup import block_size, finish_rounded  # _lookup.py baa33a2a7297
from diba_np.kernels._stages import make_rounded_stages  # _stages.py 2ab30e42ec6b

BLOCK_UNITS = 32  # units whose tables are built at a time: 6 KiB; even, for whole pairs
PAIR = 30  # columns of two units
LARGEST_SUM = 32760.0  # of a pair's six entries; rounding adds up to 3

_V_FLOAT = _ir.vector(_ir.F32, 16)
_V_INT = _ir.vector(_ir.I32, 16)
_V_WORD = _ir.vector(_ir.I16, 32)


@intrinsic
def _build_tables(typingctx, inputs, n_units, half_inverse_step, tables):
    """Write the centred 16-bit tables of ``15 * n_units`` float32 inputs."""
    signature = types.void(types.intp, types.intp, types.float32, types.intp)

    def codegen(context, builder, signature, args):
        inputs, n_units, half_inverse_step, tables = args
        # in entry e input j has the sign of bit j of e; the fifth is minus in the lower half
        signs = [
            ir.Constant(_V_FLOAT, [1.0 if e >> j & 1 else -1.0 for e in range(16)])
            for j in range(4)
        ]
        # adding 1.5 * 2**23 leaves the rounded integer in the low bits
        magic = _ir.splat_constant(_V_FLOAT, 12582912.0)
        low_halves = ir.Constant(_ir.vector(_ir.I32, 32), list(range(0, 64, 2)))
        scale = _ir.broadcast(builder, half_inverse_step, _V_FLOAT)
        fused = _ir.declare(builder, "llvm.fma.v16f32", _V_FLOAT, [_V_FLOAT] * 3)

        def body(i, carried):
            source = builder.add(inputs, builder.mul(i, _ir.index(20)))
            x = [
                _ir.load(builder, _ir.offset(builder, source, 4 * j), _ir.F32, 4) for j in range(5)
            ]
            x = [_ir.broadcast(builder, value, _V_FLOAT) for value in x]
            common = builder.fmul(x[0], signs[0])
            for j in range(1, 4):
                common = builder.call(fused, [x[j], signs[j], common])
            words = []
            for last in (builder.fsub(common, x[4]), builder.fadd(common, x[4])):
                rounded = builder.call(fused, [last, scale, magic])
                words.append(builder.bitcast(rounded, _V_WORD))
            table = builder.shuffle_vector(words[0], words[1], low_halves)
            _ir.store(builder, table, builder.add(tables, builder.mul(i, _ir.index(64))), 64)
            return []

        _ir.counted_loop(builder, builder.mul(n_units, _ir.index(3)), [], body)
        return context.get_dummy_value()

    return signature, codegen


def _make_mix_tiles(n_tiles):
    @intrinsic
    def mix_tiles(typingctx, tiles, tile_stride, tables, n_units, sums):
        """Add the look-ups of `n_units` units to the 32 int32 sums of each of the tiles."""
        signature = types.void(*[types.intp] * 5)

        def codegen(context, builder, signature, args):
            tiles, tile_stride, tables, n_units, sums = args
            permute = _ir.declare(
                builder, "llvm.x86.avx512.permvar.hi.512", _V_WORD, [_V_WORD, _V_WORD]
            )
            multiply = _ir.declare(
                builder, "llvm.x86.avx512.pmulhu.w.512", _V_WORD, [_V_WORD, _V_WORD]
            )
            accumulate = _ir.declare(builder, "llvm.x86.avx512.vpdpwssd.512", _V_INT, [_V_INT] * 3)
            # a product instead of one of the shifts: these share ports with the permutations
            multiplier = _ir.opaque(builder, _ir.splat_constant(_V_WORD, 2 ** (16 - 5)))
            ten = _ir.splat_constant(_V_WORD, 10)
            pick = [
                _ir.opaque(builder, _ir.splat_constant(_V_INT, 1)),
                _ir.opaque(builder, _ir.splat_constant(_V_INT, 1 << 16)),
            ]
            # the next tiles lie far apart, and the hardware does not guess
            ahead = builder.mul(tile_stride, _ir.index(n_tiles))
            addresses = [_ir.offset(builder, sums, 64 * a) for a in range(2 * n_tiles)]
            first = [_ir.load(builder, address, _V_INT, 4) for address in addresses]

            def look_up(count, start, table, carried):
                """Add the look-ups of `count` units, from the addresses of a tile and of tables."""
                entries = [
                    _ir.load(builder, _ir.offset(builder, table, 64 * g), _V_WORD, 64)
                    for g in range(3 * count)
                ]
                for t in range(n_tiles):
                    address = builder.add(start, builder.mul(tile_stride, _ir.index(t)))
                    found = []
                    for q in range(count):
                        bits = _ir.load(builder, _ir.offset(builder, address, 64 * q), _V_WORD, 4)
                        _ir.prefetch(
                            builder, builder.add(address, _ir.offset(builder, ahead, 64 * q))
                        )
                        middle = builder.call(multiply, [bits, multiplier])
                        for g, moved in enumerate((bits, middle, builder.lshr(bits, ten))):
                            found.append(builder.call(permute, [entries[3 * q + g], moved]))
                    total = found[0]
                    for other in found[1:]:
                        total = builder.add(total, other)
                    total = builder.bitcast(total, _V_INT)
                    for h in range(2):  # the low 16 bits of each lane, then the high ones
                        operands = [carried[2 * t + h], total, pick[h]]
                        carried[2 * t + h] = builder.call(accumulate, operands)
                return carried

            def pair(u, carried):
                start = builder.add(tiles, builder.mul(u, _ir.index(2 * 64)))
                table = builder.add(tables, builder.mul(u, _ir.index(2 * 192)))
                return look_up(2, start, table, carried)

            pairs = builder.lshr(n_units, _ir.index(1))
            carried = _ir.counted_loop(builder, pairs, first, pair)
            start = builder.add(tiles, builder.mul(pairs, _ir.index(2 * 64)))
            table = builder.add(tables, builder.mul(pairs, _ir.index(2 * 192)))
            final = _ir.counted_loop(
                builder,
                builder.and_(n_units, _ir.index(1)),
                carried,
                lambda _, carried: look_up(1, start, table, carried),
            )
            for value, address in zip(final, addresses, strict=True):
                _ir.store(builder, value, address, 4)
            return context.get_dummy_value()

        return signature, codegen

    return mix_tiles


_mix_4_tiles = _make_mix_tiles(4)
_mix_1_tile = _make_mix_tiles(1)


@intrinsic
def _measure(typingctx, inputs, n_pairs, results):
    """Measure ``30 * n_pairs`` float32 inputs.

    Writes their sums by lanes (16), the sums of squares by lanes (16), and the largest sum of the
    magnitudes of a pair of units (1).
    """
    signature = types.void(types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        inputs, n_pairs, results = args
        magnitude = _ir.declare(builder, "llvm.fabs.v16f32", _V_FLOAT, [_V_FLOAT])
        add_up = _ir.declare(
            builder, "llvm.vector.reduce.fadd.v16f32", _ir.F32, [_ir.F32, _V_FLOAT]
        )
        zero, none = _ir.splat_constant(_V_FLOAT, 0.0), ir.Constant(_ir.F32, 0.0)
        # the second 16 begin with the last two of the first
        fresh = ir.Constant(_ir.vector(ir.IntType(1), 16), [0, 0] + [1] * 14)

        def body(i, carried):
            total, energy, largest = carried
            source = builder.add(inputs, builder.mul(i, _ir.index(4 * PAIR)))
            one = _ir.load(builder, source, _V_FLOAT, 4)
            other = _ir.load(builder, _ir.offset(builder, source, 4 * 14), _V_FLOAT, 4)
            other = builder.select(fresh, other, zero)
            total = builder.fadd(total, builder.fadd(one, other))
            squares = builder.fadd(builder.fmul(one, one), builder.fmul(other, other))
            sizes = builder.fadd(*(builder.call(magnitude, [value]) for value in (one, other)))
            size = builder.call(add_up, [none, sizes], fastmath=("reassoc",))
            larger = builder.fcmp_ordered(">", size, largest)
            largest = builder.select(larger, size, largest)
            return [total, builder.fadd(energy, squares), largest]

        measured = _ir.counted_loop(builder, n_pairs, [zero, zero, none], body)
        for i, value in enumerate(measured):
            _ir.store(builder, value, _ir.offset(builder, results, 64 * i), 4)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def _measured(inputs, size):
    """Measure `scaled` inputs, of which the first `size` count.

    Returns the value of one step of the tables, the sum, and the roughness: the largest sum of a
    pair's magnitudes over the root mean square.
    """
    results = np.empty(33, dtype=np.float32)
    _measure(inputs.ctypes.data, inputs.size // PAIR, results.ctypes.data)
    total = np.float32(0.0)
    energy = np.float32(0.0)
    for lane in range(16):
        total += results[lane]
        energy += results[16 + lane]
    largest = results[32]
    roughness = np.float32(0.0)
    if largest > 0:
        # squares that leave the range of float32 tell nothing: as rough as can be
        roughness = np.float32(np.inf)
        if 0 < energy < np.inf:
            roughness = largest / np.sqrt(energy / np.float32(size))
    return np.float32(largest * np.float32(0.5 / LARGEST_SUM)), total, roughness


@njit(fastmath=False)
def _mix_part(inputs, step, tiles, start, stop, offset, weight, addend, scale, out):
    """Write ``scale * ((B - 1/2) inputs + offset + weight * addend)`` for some tiles."""
    n_units = tiles.shape[1]
    block = 2 * block_size((n_units + 1) // 2, BLOCK_UNITS // 2)
    tables = np.empty(48 * block + 16, dtype=np.int32)
    sums = np.zeros(32 * (stop - start), dtype=np.int32)
    half_inverse_step = np.float32(0.5) / step if step > 0 else np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        _build_tables(inputs.ctypes.data + 60 * u, width, half_inverse_step, table)
        t = start
        while t < stop:
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            if t + 4 <= stop:
                _mix_4_tiles(source, 64 * n_units, table, width, target)
                t += 4
            else:
                _mix_1_tile(source, 64 * n_units, table, width, target)
                t += 1
    finish_rounded(sums, step, 32 * start, offset, weight, addend, scale, out)


_product, _start, _piece, _end = make_rounded_stages(_measured, _mix_part, 2)  # whole pairs


@njit(fastmath=False)
def product_int16(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a vector, in 16-bit tables.

    As ``lookup_simd.product_avx512``, in the split form that keeps offsets out of the tables: with
    ``s = sum(d3 * x)``, ``c = (1/2 - shift) s`` and ``w = d2 * ((B2 - 1/2) (d3 * x))`` the inner
    vector is ``z = w + c d2``, and ``(B1 - shift) z = (B1 - 1/2) w + (1/2 - shift) sum(w)
    + c (B1 - shift) d2``.

    Parameters
    ----------
    x, d3, tiles2, d2, tiles1, d1, shift
        As in ``lookup_simd.product_avx512``. At most 1 900 000 columns a stage (32-bit sums).
    mixed_d2 : (m,) float32, or (0,) if `tiles1` has no tiles
        ``(B1 - shift) d2``, which does not depend on x.
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) or (k,) float32, overwritten

    Returns
    -------
    float32
        Sum of ``d3 * x`` and w; not finite if any term is not finite.
    float32
        Roughness R of the two stages' inputs together. The look-ups of a group are off by at most
        half a step, so by a random ``4e-6 R`` of the +-1 part's usual size in all.

    Notes
    -----
    Time k (m + n) / 75 cycles, extra memory O(k) and 6 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_int16``.
    """
    return _product(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, out)


@njit(fastmath=False, parallel=True)
def product_int16_par(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Do what `product_int16` does, the output rows cut into `n_parts` pieces for the threads."""
    shared = _start(x, d3, tiles2, d2, tiles1, out)
    for p in numba.prange(n_parts):
        _piece(p, shared, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out)
    return _end(shared, tiles1)
