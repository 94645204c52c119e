"""Matrix x vector for packed 0/1 matrices with look-ups inside vector registers (AVX-512 and AVX2).

For a group of inputs all partial sums fill a register (AVX-512: 5 inputs, 32 sums, two registers,
`vpermi2ps`; AVX2: 3 inputs, 8 sums, `vpermps`). One permutation then adds the right partial sum to
16 (8) rows at once. The permutations ignore the upper index bits, so the groups of a unit need a
shift and no mask. float32 throughout; every row adds its groups in the same order, whatever the
number of threads. Tables hold plain sums of the set bits, so that a zero row gives exactly zero and
a huge input touches only the rows that use it.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py 2f24896001fa
from diba_np.kernels._barrier import arrive, barrier, take  # _barrier.py 49b3f4047764
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import padded, scaled, zero_if_finite  # _lookup.py 7840b5cf56e6

BLOCK_UNITS = 512  # units whose tables are built at a time: 192 KiB (AVX-512), 80 KiB (AVX2)
FETCH_AHEAD = 1024  # bytes; a fifth of the time where the bits come from memory, else nothing


class _Isa:
    """What differs between the instruction sets."""

    def __init__(self, lanes, bits):
        self.lanes = lanes
        self.bits = bits
        self.groups = 15 // bits
        self.registers = 2**bits // lanes  # registers a table
        self.unit_bytes = self.groups * self.registers * lanes * 4
        self.v_float = _ir.vector(_ir.F32, lanes)
        self.v_int = _ir.vector(_ir.I32, lanes)
        self.v_word = _ir.vector(_ir.I16, 2 * lanes)

    def look_up(self, builder, table, lanes_index):
        v_float, v_int = self.v_float, self.v_int
        if self.lanes == 16:
            name = "llvm.x86.avx512.vpermi2var.ps.512"
            permute = _ir.declare(builder, name, v_float, [v_float, v_int, v_float])
            return builder.call(permute, [table[0], lanes_index, table[1]])
        permute = _ir.declare(builder, "llvm.x86.avx2.permps", v_float, [v_float, v_int])
        return builder.call(permute, [table[0], lanes_index])

    def upper_half(self, builder, value, picks):
        """Bring the upper 16 bits of each lane to the bottom; those above are ignored."""
        # a sum of products, 0 * lower + 1 * upper: like shifts, permutations need other ports
        name = "llvm.x86.avx512.pmaddw.d.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        multiply = _ir.declare(builder, name, self.v_int, [self.v_word, self.v_word])
        return builder.call(multiply, [builder.bitcast(value, self.v_word), picks])

    def shifted(self, builder, value, group, multipliers):
        """Bring a group's bits to the bottom of each 16-bit half; those above are ignored."""
        if group == 0:
            return value
        # value >> (bits * group) as the high half of a product: the multiplier's ports are free,
        # the shifter's are not
        name = "llvm.x86.avx512.pmulhu.w.512" if self.lanes == 16 else "llvm.x86.avx2.pmulhu.w"
        multiply = _ir.declare(builder, name, self.v_word, [self.v_word, self.v_word])
        words = builder.bitcast(value, self.v_word)
        return builder.bitcast(builder.call(multiply, [words, multipliers[group - 1]]), self.v_int)


def _make_build_tables(isa):
    @intrinsic
    def build_tables(typingctx, inputs, n_units, tables):
        """Write the tables of ``15 * n_units`` float32 inputs; return the inputs' sum."""
        signature = types.float32(types.intp, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            inputs, n_units, tables = args
            masks = [
                ir.Constant(
                    _ir.vector(ir.IntType(1), isa.lanes), [(e >> j) & 1 for e in range(isa.lanes)]
                )
                for j in range(isa.bits)
            ]
            zero = _ir.splat_constant(isa.v_float, 0.0)
            total_bytes = isa.registers * isa.lanes * 4
            n_groups = builder.mul(n_units, _ir.index(isa.groups))

            def body(i, carried):
                source = builder.add(inputs, builder.mul(i, _ir.index(4 * isa.bits)))
                x = [
                    _ir.load(builder, _ir.offset(builder, source, 4 * j), _ir.F32, 4)
                    for j in range(isa.bits)
                ]
                x = [_ir.broadcast(builder, value, isa.v_float) for value in x]
                low = zero
                in_register = isa.lanes.bit_length() - 1
                for j in range(in_register):
                    low = builder.select(masks[j], builder.fadd(low, x[j]), low)
                table = [low]
                for j in range(in_register, isa.bits):
                    table += [builder.fadd(register, x[j]) for register in table]
                target = builder.add(tables, builder.mul(i, _ir.index(total_bytes)))
                for r, register in enumerate(table):
                    _ir.store(builder, register, _ir.offset(builder, target, 4 * isa.lanes * r), 32)
                return [builder.fadd(carried[0], table[-1])]  # the last entry is the group's sum

            (total,) = _ir.counted_loop(builder, n_groups, [zero], body)
            return builder.extract_element(total, ir.Constant(_ir.I32, isa.lanes - 1))

        return signature, codegen

    return build_tables


def _make_mix_tiles(isa, n_tiles):
    parts = 16 // isa.lanes  # registers a unit of a tile

    @intrinsic
    def mix_tiles(typingctx, tiles, tile_stride, tables, n_units, sums):
        """Add the look-ups of `n_units` units to the 32 sums of each of the tiles.

        Addresses and strides in bytes.
        """
        signature = types.void(*[types.intp] * 5)

        def codegen(context, builder, signature, args):
            tiles, tile_stride, tables, n_units, sums = args
            starts = [
                builder.add(tiles, builder.mul(tile_stride, _ir.index(t))) for t in range(n_tiles)
            ]
            keys = [(t, p, h) for t in range(n_tiles) for p in range(parts) for h in range(2)]
            addresses = [
                _ir.offset(builder, sums, 4 * (32 * t + 16 * h + isa.lanes * p)) for t, p, h in keys
            ]
            first = [_ir.load(builder, address, isa.v_float, 4) for address in addresses]
            multipliers = [
                _ir.opaque(builder, _ir.splat_constant(isa.v_word, 2 ** (16 - isa.bits * g)))
                for g in range(1, isa.groups)
            ]
            upper = _ir.opaque(builder, ir.Constant(isa.v_word, [0, 1] * isa.lanes))

            def body(u, carried):
                here = builder.mul(u, _ir.index(64))
                table = builder.add(tables, builder.mul(u, _ir.index(isa.unit_bytes)))
                halves = {}
                for t, start in enumerate(starts):
                    for p in range(parts):
                        address = _ir.offset(builder, builder.add(start, here), 4 * isa.lanes * p)
                        halves[t, p, 0] = _ir.load(builder, address, isa.v_int, 4)
                        if p == 0:
                            _ir.prefetch(builder, _ir.offset(builder, address, FETCH_AHEAD))
                        halves[t, p, 1] = isa.upper_half(builder, halves[t, p, 0], upper)
                for g in range(isa.groups):
                    registers = [
                        _ir.load(
                            builder,
                            _ir.offset(builder, table, 4 * isa.lanes * (g * isa.registers + r)),
                            isa.v_float,
                            32,
                        )
                        for r in range(isa.registers)
                    ]
                    for a, key in enumerate(keys):
                        lanes_index = isa.shifted(builder, halves[key], g, multipliers)
                        carried[a] = builder.fadd(
                            carried[a], isa.look_up(builder, registers, lanes_index)
                        )
                return carried

            final = _ir.counted_loop(builder, n_units, first, body)
            for value, address in zip(final, addresses, strict=True):
                _ir.store(builder, value, address, 4)
            return context.get_dummy_value()

        return signature, codegen

    return mix_tiles


_AVX512 = _Isa(16, 5)
_AVX2 = _Isa(8, 3)
_build_tables_avx512 = _make_build_tables(_AVX512)
_build_tables_avx2 = _make_build_tables(_AVX2)
_mix_4_tiles_avx512 = _make_mix_tiles(_AVX512, 4)
_mix_1_tile_avx512 = _make_mix_tiles(_AVX512, 1)
_mix_2_tiles_avx2 = _make_mix_tiles(_AVX2, 2)
_mix_1_tile_avx2 = _make_mix_tiles(_AVX2, 1)


@njit(fastmath=False)
def _mix_part_avx512(inputs, tiles, start, stop, alpha, scale, bias, out):
    """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

    It is NaN where a row's sum is not finite.
    """
    n_units = tiles.shape[1]
    block = min(n_units, BLOCK_UNITS)
    tables = np.empty(96 * block + 16, dtype=np.float32)
    sums = np.zeros(32 * (stop - start), dtype=np.float32)
    total = np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        total += _build_tables_avx512(inputs.ctypes.data + 60 * u, width, table)
        t = start
        while t < stop:
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            if t + 4 <= stop:
                _mix_4_tiles_avx512(source, 64 * n_units, table, width, target)
                t += 4
            else:
                _mix_1_tile_avx512(source, 64 * n_units, table, width, target)
                t += 1
    _finish(sums, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(sums)


@njit(fastmath=False)
def _mix_part_avx2(inputs, tiles, start, stop, alpha, scale, bias, out):
    """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

    It is NaN where a row's sum is not finite.
    """
    n_units = tiles.shape[1]
    block = min(n_units, BLOCK_UNITS)
    tables = np.empty(40 * block + 16, dtype=np.float32)
    sums = np.zeros(32 * (stop - start), dtype=np.float32)
    total = np.float32(0.0)
    for u in range(0, n_units, block):
        width = min(block, n_units - u)
        # asked for in the loop: Numba frees an array after the last use of its name
        table = (tables.ctypes.data + 63) // 64 * 64
        total += _build_tables_avx2(inputs.ctypes.data + 60 * u, width, table)
        t = start
        while t < stop:
            source = tiles.ctypes.data + 64 * (n_units * t + u)
            target = sums.ctypes.data + 128 * (t - start)
            if t + 2 <= stop:
                _mix_2_tiles_avx2(source, 64 * n_units, table, width, target)
                t += 2
            else:
                _mix_1_tile_avx2(source, 64 * n_units, table, width, target)
                t += 1
    _finish(sums, 32 * start, alpha, total, scale, bias, out)
    return total + zero_if_finite(sums)


@njit(fastmath=False)
def _finish(sums, first, alpha, total, scale, bias, out):
    """Write ``out[first + i] = scale * (sums[i] - alpha * total) + bias``."""
    # 0 * total would be NaN where the total, which no row asked for, overflows
    shift = np.float32(alpha * total) if alpha != 0 else np.float32(0)
    # slices: with offsets in the indices the loops would not be vectorized
    last = min(first + sums.size, scale.size)
    part, scale = out[first:last], scale[first:last]
    if bias.size:
        bias = bias[first:last]
        for i in range(part.size):
            part[i] = scale[i] * (sums[i] - shift) + bias[i]
    else:
        for i in range(part.size):
            part[i] = scale[i] * (sums[i] - shift)


@njit(fastmath=False)
def product_avx512(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a vector.

    ``z = d2 * ((B2 - alpha) (d3 * x))``, then ``out = d1 * ((B1 - alpha) z) + bias``. With `tiles1`
    of no tiles only the first stage runs: ``out = d2 * ((B2 - alpha) (d3 * x)) + bias``.

    Parameters
    ----------
    x, d3 : (n,) float32
    tiles2 : (ceil(k / 32), ceil(n / 15), 16) uint32, C-order
    d2 : (k,) float32
    tiles1 : (ceil(m / 32), ceil(k / 15), 16) uint32, C-order, or no tiles at all
    d1 : (m,) float32
    alpha : float32
    bias : (m,) or (k,) or (0,) float32
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) or (k,) float32, overwritten

    Returns
    -------
    float32
        Sum of ``d3 * x`` and z; not finite if any term is not finite, or any row's sum.

    Notes
    -----
    Time k (m + n) / 44 cycles, extra memory O(k) and 192 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_avx512``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part_avx512(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part_avx512(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part_avx512(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_avx512_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx512` does, the output rows cut into `n_parts` pieces for the threads."""
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    two = tiles1.shape[0] > 0
    z = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    bias2 = none if two else bias
    totals = np.empty(n_parts, dtype=np.float32)
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    counters = barrier()
    for p in numba.prange(n_parts):
        start, stop = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        totals[p] = _mix_part_avx512(inputs, tiles2, start, stop, alpha, d2, bias2, z)
        if two and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += _mix_part_avx512(z, tiles1, start, stop, alpha, d1, bias, out)
                q = take(counters)
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_avx2(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx512` does, with AVX2 alone and 3 inputs a look-up.

    naive: ``tests/naive.py::product_avx2``.
    """
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    if tiles1.shape[0] == 0:
        return _mix_part_avx2(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, bias, out)
    z = padded(d2.size, tiles1.shape[1], x.dtype)
    total = _mix_part_avx2(inputs, tiles2, 0, tiles2.shape[0], alpha, d2, none, z)
    total += _mix_part_avx2(z, tiles1, 0, tiles1.shape[0], alpha, d1, bias, out)
    return total


@njit(fastmath=False, parallel=True)
def product_avx2_par(x, d3, tiles2, d2, tiles1, d1, alpha, bias, n_parts, out):
    """Do what `product_avx2` does, the output rows cut into `n_parts` pieces for the threads."""
    none = np.empty(0, dtype=np.float32)
    inputs = scaled(x, d3, tiles2.shape[1])
    two = tiles1.shape[0] > 0
    z = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    bias2 = none if two else bias
    totals = np.empty(n_parts, dtype=np.float32)
    n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
    counters = barrier()
    for p in numba.prange(n_parts):
        start, stop = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        totals[p] = _mix_part_avx2(inputs, tiles2, start, stop, alpha, d2, bias2, z)
        if two and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += _mix_part_avx2(z, tiles1, start, stop, alpha, d1, bias, out)
                q = take(counters)
    return totals[0] + zero_if_finite(totals)
