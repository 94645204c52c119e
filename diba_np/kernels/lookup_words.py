"""Matrix x vector for packed 0/1 matrices with 16-bit tables (AVX2): fast, not exact.

`vpshufb` looks 32 bytes up in tables of 16: those of ``kernels/_words.py``, the same in both halves
of a register. The bytes of 16 rows stand beside those of 16 others, so sums are kept twice: as
words, both bytes together, and of the upper bytes alone. Layout of the tiles:
``kernels/layout.py``.
"""

from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._stages import make_rounded_stages  # _stages.py 2ab30e42ec6b
from diba_np.kernels._words import (  # _words.py 81254ded4302
    UNIT,
    make_mix_part_words,
    measured_words,
    moved,
    write_tables,
)

_TABLE = _ir.vector(ir.IntType(8), 16)
_BYTES = _ir.vector(ir.IntType(8), 32)
_WORDS = _ir.vector(_ir.I16, 16)
_INTS = _ir.vector(_ir.I32, 8)


@intrinsic
def _build_tables(typingctx, inputs, n_units, half_inverse_step, tables):
    """Write the centred 16-bit tables of ``15 * n_units`` float32 inputs."""
    signature = types.void(types.intp, types.intp, types.float32, types.intp)

    def codegen(context, builder, signature, args):
        write_tables(builder, *args, lanes=8)
        return context.get_dummy_value()

    return signature, codegen


def _indices(builder, words, shift):
    """Return the four indices of 4 bits, as bytes, of two vectors of 16-bit lanes.

    Rows of the first vector are the even bytes, of the second the odd ones.
    """
    one, other = words
    even = ir.Constant(_ir.vector(ir.IntType(1), 32), [1, 0] * 16)
    mask, four = _ir.splat_constant(_BYTES, 15), _ir.splat_constant(_WORDS, 4)
    multiply = _ir.declare(builder, "llvm.x86.avx2.pmulhu.w", _WORDS, [_WORDS, _WORDS])
    # products instead of shifts: these share ports with the look-ups
    up, down = builder.mul(other, shift), builder.call(multiply, [one, shift])
    low = builder.select(even, builder.bitcast(one, _BYTES), builder.bitcast(up, _BYTES))
    high = builder.select(even, builder.bitcast(down, _BYTES), builder.bitcast(other, _BYTES))

    def upper(bytes_):
        moved_ = builder.lshr(builder.bitcast(bytes_, _WORDS), four)
        return builder.and_(builder.bitcast(moved_, _BYTES), mask)

    # a look-up heeds the lowest four bits and the highest, which is zero in the bytes of 7 columns
    return builder.and_(low, mask), upper(low), high, upper(high)


def _sums_of_bytes(builder, both, odd):
    """Return the sums of the even bytes and those of the odd ones, as 16-bit lanes.

    `both` are sums of whole words, modulo 2**16, `odd` those of the upper bytes.
    """
    return builder.sub(both, builder.shl(odd, _ir.splat_constant(_WORDS, 8))), odd


def _lower_and_upper(builder, words):
    """Return the 16-bit lanes of rows r, and those of rows 16 + r, each as 8 int32."""
    value = builder.bitcast(words, _INTS)
    mask, sixteen = _ir.splat_constant(_INTS, 0xFFFF), _ir.splat_constant(_INTS, 16)
    return builder.and_(value, mask), builder.lshr(value, sixteen)


@intrinsic
def _mix_tile(typingctx, tile, ahead, tables, n_units, sums):
    """Add the look-ups of up to 128 units of a tile to its 32 int32 sums, and fetch another one."""
    signature = types.void(*[types.intp] * 5)

    def codegen(context, builder, signature, args):
        tile, ahead, tables, n_units, sums = args
        permute = _ir.declare(builder, "llvm.x86.avx2.pshuf.b", _BYTES, [_BYTES, _BYTES])
        shift = _ir.opaque(builder, _ir.splat_constant(_WORDS, 256))
        eight = _ir.splat_constant(_WORDS, 8)
        twice = ir.Constant(_ir.vector(_ir.I32, 32), [*range(16)] * 2)

        def body(u, carried):
            here = builder.mul(u, _ir.index(64))
            start = builder.add(tile, here)
            words = [
                _ir.load(builder, _ir.offset(builder, start, 32 * h), _WORDS, 4) for h in range(2)
            ]
            _ir.prefetch(builder, builder.add(ahead, here))
            indices = _indices(builder, words, shift)
            unit = builder.add(tables, builder.mul(u, _ir.index(UNIT)))
            found = {}  # by group of columns, and plane: the lowest 7 bits, what is above
            for g, index in enumerate(indices):
                for p in range(2):
                    table = _ir.load(
                        builder, _ir.offset(builder, unit, 32 * g + 16 * p), _TABLE, 16
                    )
                    table = builder.shuffle_vector(table, table, twice)
                    found[g, p] = builder.call(permute, [table, index])
            for g in (0, 2):
                for p in range(2):
                    both = builder.add(found[g, p], found[g + 1, p])
                    both = builder.bitcast(both, _WORDS)
                    carried[2 * p] = builder.add(carried[2 * p], both)
                    odd = builder.lshr(both, eight)
                    carried[2 * p + 1] = builder.add(carried[2 * p + 1], odd)
            return carried

        zero = _ir.splat_constant(_WORDS, 0)
        both, odd, both_above, odd_above = _ir.counted_loop(builder, n_units, [zero] * 4, body)
        lowest = _sums_of_bytes(builder, both, odd)
        above = _sums_of_bytes(builder, both_above, odd_above)
        seven, excess = _ir.splat_constant(_INTS, 7), moved(builder, n_units, _INTS)
        for h in range(2):  # rows 8 h ... 8 h + 7, and the same of the upper 16
            parts = (_lower_and_upper(builder, plane[h]) for plane in (lowest, above))
            for upper, (low, high) in enumerate(zip(*parts, strict=True)):
                total = builder.add(low, builder.shl(high, seven))
                address = _ir.offset(builder, sums, 64 * upper + 32 * h)
                before = _ir.load(builder, address, _INTS, 4)
                _ir.store(builder, builder.add(before, builder.sub(total, excess)), address, 4)
        return context.get_dummy_value()

    return signature, codegen


_product, _start, _piece, _end = make_rounded_stages(
    measured_words, make_mix_part_words(_build_tables, _mix_tile), 1
)


@njit(fastmath=False)
def product_avx2_rounded(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Do what ``lookup_int16.product_int16`` does, in tables of bytes for 4 inputs.

    At most 980 000 columns a stage (32-bit sums).

    Notes
    -----
    Time k (m + n) / 40 cycles (Zen 3), extra memory O(k) and 9 KiB a thread. The `_par` twin is
    bitwise equal. naive: ``tests/naive.py::product_avx2_rounded``.
    """
    return _product(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, out)


@njit(fastmath=False, parallel=True)
def product_avx2_rounded_par(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Do what `product_avx2_rounded` does, the output rows cut into `n_parts` pieces."""
    shared = _start(x, d3, tiles2, d2, tiles1, out)
    for p in numba.prange(n_parts):
        _piece(p, shared, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out)
    return _end(shared, tiles1)
