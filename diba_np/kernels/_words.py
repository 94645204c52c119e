"""16-bit tables kept as bytes, for look-ups of bytes (NEON, AVX2): all but the look-ups.

For 4 inputs (3 at the end of a unit) the 16 sums ``sum((b_j - 1/2) x_j)`` are rounded on one step
for the whole vector and moved up, and make two tables of 16 bytes: of the lowest 7 bits, and of
what is above. Look-ups of two neighbouring groups are added as bytes before they are widened; the
step is such that their sum fits in 15 bits, so it does not matter if a byte alone wraps round.
Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import block_size, finish_rounded  # _lookup.py baa33a2a7297

GROUPS = (4, 4, 4, 3)  # inputs of the tables of a unit
UNIT = len(GROUPS) * 2 * 16  # bytes of a unit's tables
MOVED = 8192  # up: the sum of two look-ups by 2**14
LARGEST_SUM = 16120.0  # of two; rounding adds up to 1, and the lowest 7 bits are each at least 0
# units whose tables are built at a time: 8 KiB; 16 bits hold two bytes a unit of 128
BLOCK_UNITS = 64

_FOUR = _ir.vector(_ir.F32, 4)


def joined(builder, parts):
    """Return vectors, a power of two of them, as one."""
    while len(parts) > 1:
        lanes = ir.Constant(
            _ir.vector(_ir.I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count))
        )
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(one, other, lanes) for one, other in pairs]
    return parts[0]


def write_tables(builder, inputs, n_units, half_inverse_step, tables, lanes):
    """Write the tables of ``15 * n_units`` float32 inputs, in vectors of 4 or 8 lanes."""
    floats, ints = (_ir.vector(type_, lanes) for type_ in (_ir.F32, _ir.I32))
    words_ = _ir.vector(_ir.I16, 16)
    # in entry e input j has the sign of bit j of e
    inside = lanes.bit_length() - 1
    signs = [
        ir.Constant(floats, [1.0 if e >> j & 1 else -1.0 for e in range(lanes)])
        for j in range(inside)
    ]
    # adding 1.5 * 2**23 leaves the rounded integer in the low bits
    magic = _ir.splat_constant(floats, 12582912.0 + MOVED)
    seven, lowest = (_ir.splat_constant(words_, value) for value in (7, 127))
    scale = _ir.broadcast(builder, half_inverse_step, floats)
    fused = _ir.declare(builder, f"llvm.fma.v{lanes}f32", floats, [floats] * 3)

    def body(u, carried):
        source = builder.add(inputs, builder.mul(u, _ir.index(60)))
        target = builder.add(tables, builder.mul(u, _ir.index(UNIT)))
        for g, size in enumerate(GROUPS):
            x = []
            for j in range(size):
                value = _ir.load(builder, _ir.offset(builder, source, 16 * g + 4 * j), _ir.F32, 4)
                x.append(_ir.broadcast(builder, value, floats))
            table = [builder.fmul(x[0], signs[0])]
            for j in range(1, inside):
                table = [builder.call(fused, [x[j], signs[j], table[0]])]
            for value in x[inside:]:
                table = [builder.fsub(entries, value) for entries in table] + [
                    builder.fadd(entries, value) for entries in table
                ]
            table *= 16 // (lanes * len(table))  # of 3 inputs, bit 3 is never set
            rounded = [builder.call(fused, [value, scale, magic]) for value in table]
            raw = joined(builder, [builder.bitcast(value, ints) for value in rounded])
            words = builder.trunc(raw, words_)
            bytes_ = [builder.and_(words, lowest), builder.lshr(words, seven)]
            bytes_ = builder.trunc(joined(builder, bytes_), _ir.vector(ir.IntType(8), 32))
            _ir.store(builder, bytes_, _ir.offset(builder, target, 32 * g), 4)
        return []

    _ir.counted_loop(builder, n_units, [], body)


def moved(builder, n_units, ints):
    """Return by how much the sums of so many units are too large, as a vector."""
    total = builder.mul(builder.trunc(n_units, _ir.I32), ir.Constant(_ir.I32, MOVED * len(GROUPS)))
    return _ir.broadcast(builder, total, ints)


@intrinsic
def _measure(typingctx, inputs, n_units, results):
    """Measure ``15 * n_units`` float32 inputs, each by lanes (4).

    Writes their sums, the sums of squares, and the largest sum of the magnitudes of two groups
    whose look-ups are added.
    """
    signature = types.void(types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        inputs, n_units, results = args
        magnitude = _ir.declare(builder, "llvm.fabs.v4f32", _FOUR, [_FOUR])
        zero = _ir.splat_constant(_FOUR, 0.0)
        # the last four begin with the last one of those before
        fresh = ir.Constant(_ir.vector(ir.IntType(1), 4), [0, 1, 1, 1])
        lanes = [ir.Constant(_ir.vector(_ir.I32, 4), list(range(first, 8, 2))) for first in (0, 1)]

        def folded(one, other):
            """Return the sums of neighbours in two vectors."""
            return builder.fadd(*(builder.shuffle_vector(one, other, pick) for pick in lanes))

        def added(four):
            """Add by halves: one after another they would wait for each other."""
            return builder.fadd(builder.fadd(*four[:2]), builder.fadd(*four[2:]))

        def body(u, carried):
            total, energy, largest = carried
            source = builder.add(inputs, builder.mul(u, _ir.index(60)))
            x = [
                _ir.load(builder, _ir.offset(builder, source, at), _FOUR, 4)
                for at in (0, 16, 32, 44)
            ]
            x[3] = builder.select(fresh, x[3], zero)
            squares = [builder.fmul(value, value) for value in x]
            total = builder.fadd(total, added(x))
            energy = builder.fadd(energy, added(squares))
            sizes = [builder.call(magnitude, [value]) for value in x]
            pairs = folded(builder.fadd(*sizes[:2]), builder.fadd(*sizes[2:]))
            pairs = folded(pairs, pairs)
            larger = builder.fcmp_ordered(">", pairs, largest)  # a NaN is not passed on
            return [total, energy, builder.select(larger, pairs, largest)]

        measured = _ir.counted_loop(builder, n_units, [zero, zero, zero], body)
        for i, value in enumerate(measured):
            _ir.store(builder, value, _ir.offset(builder, results, 16 * i), 4)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def measured_words(inputs, size):
    """Measure `scaled` inputs, of which the first `size` count.

    Returns the value of one step of the tables, the sum, and the roughness: 2.3 times the largest
    sum of two groups' magnitudes over the root mean square. So the error that belongs to it is that
    of ``lookup_int16.product_int16``.
    """
    results = np.empty(12, dtype=np.float32)
    _measure(inputs.ctypes.data, inputs.size // 15, results.ctypes.data)
    total, energy, largest = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for lane in range(4):
        total += results[lane]
        energy += results[4 + lane]
        largest = max(largest, results[8 + lane])
    roughness = np.float32(0.0)
    if largest > 0:
        # squares that leave the range of float32 tell nothing: as rough as can be
        roughness = np.float32(np.inf)
        if 0 < energy < np.inf:
            roughness = np.float32(2.3) * largest / np.sqrt(energy / np.float32(size))
    return np.float32(largest * np.float32(0.5 / LARGEST_SUM)), total, roughness


def make_mix_part_words(build, mix):
    """Return the function that does some tiles' rows, for a kind of look-up.

    ``build(inputs, n_units, half_inverse_step, tables)`` is `write_tables`; ``mix(tile, ahead,
    tables, n_units, sums)`` adds the look-ups of a tile's units to its 32 int32 sums, and fetches
    the tile ahead; all are addresses.
    """

    @njit(fastmath=False, cached=False)
    def mix_part(inputs, step, tiles, start, stop, offset, weight, addend, scale, out):
        """Write ``scale * ((B - 1/2) inputs + offset + weight * addend)``."""
        n_units = tiles.shape[1]
        block = block_size(n_units, BLOCK_UNITS)
        tables = np.empty(UNIT // 4 * block + 16, dtype=np.int32)
        sums = np.zeros(32 * (stop - start), dtype=np.int32)
        half_inverse_step = np.float32(0.5) / step if step > 0 else np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            # asked for in the loop: Numba frees an array after the last use of its name
            table = (tables.ctypes.data + 63) // 64 * 64
            build(inputs.ctypes.data + 60 * u, width, half_inverse_step, table)
            for t in range(start, stop):
                tile = tiles.ctypes.data + 64 * (n_units * t + u)
                ahead = tile + 64 * n_units * min(1, stop - 1 - t)
                mix(tile, ahead, table, width, sums.ctypes.data + 128 * (t - start))
        finish_rounded(sums, step, 32 * start, offset, weight, addend, scale, out)

    return mix_part
