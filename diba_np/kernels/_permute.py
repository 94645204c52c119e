"""Look-ups inside vector registers (AVX-512 and AVX2), for products of one column and of several.

For a group of inputs all partial sums fill a register (AVX-512: 5 inputs, 32 sums, two registers,
`vpermi2ps`; AVX2: 3 inputs, 8 sums, `vpermps`). One permutation then adds the right partial sum to
16 (8) rows at once. The permutations ignore the upper index bits, so the groups of a unit need a
shift and no mask. Tables hold plain sums of the set bits, so that a zero row gives exactly zero and
a huge input touches only the rows that use it.

Above, plain Python that runs at compile time; at the end what ``_stages.py`` and ``_stack.py`` ask
of a kind of look-up. Compiled into the kernels of other files, which carry a digest of this one, as
of ``_ir.py``.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit


class Isa:
    """An instruction set, and the intrinsics made of it."""

    def __init__(self, lanes, bits):
        self.lanes = lanes
        self.bits = bits
        self.groups = 15 // bits
        self.registers = 2**bits // lanes  # registers a table
        self.table_bytes = self.registers * lanes * 4
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

    def _shifted_down(self, builder, value, count):
        return builder.lshr(value, _ir.splat_constant(self.v_int, count))

    def upper_half(self, builder, value, picks):
        """Bring the upper 16 bits of each lane to the bottom; those above are ignored."""
        if self.lanes == 8:
            return self._shifted_down(builder, value, 16)
        # a sum of products, 0 * lower + 1 * upper: like shifts, permutations need other ports
        name = "llvm.x86.avx512.pmaddw.d.512"
        multiply = _ir.declare(builder, name, self.v_int, [self.v_word, self.v_word])
        return builder.call(multiply, [builder.bitcast(value, self.v_word), picks])

    def shifted(self, builder, value, group, multipliers):
        """Bring a group's bits to the bottom of each 16-bit half; those above are ignored."""
        if group == 0:
            return value
        # value >> (bits * group) as the high half of a product: the multiplier's ports are free,
        # the shifter's are not; on Zen 3 they are in part, and every other one is faster
        if self.lanes == 8 and group % 2:
            return self._shifted_down(builder, value, self.bits * group)
        name = "llvm.x86.avx512.pmulhu.w.512" if self.lanes == 16 else "llvm.x86.avx2.pmulhu.w"
        multiply = _ir.declare(builder, name, self.v_word, [self.v_word, self.v_word])
        words = builder.bitcast(value, self.v_word)
        return builder.bitcast(builder.call(multiply, [words, multipliers[group - 1]]), self.v_int)

    def make_build_tables(self):
        """Return an intrinsic that writes the tables of a block of units for one column."""

        @intrinsic
        def build_tables(typingctx, inputs, n_units, tables, table_step):
            """Write the tables of ``15 * n_units`` float32 inputs; return the inputs' sum.

            From a table to the next are `table_step` bytes.
            """
            signature = types.float32(types.intp, types.intp, types.intp, types.intp)

            def codegen(context, builder, signature, args):
                inputs, n_units, tables, table_step = args
                masks = [
                    ir.Constant(
                        _ir.vector(ir.IntType(1), self.lanes),
                        [(e >> j) & 1 for e in range(self.lanes)],
                    )
                    for j in range(self.bits)
                ]
                zero = _ir.splat_constant(self.v_float, 0.0)
                n_groups = builder.mul(n_units, _ir.index(self.groups))

                def body(i, carried):
                    source = builder.add(inputs, builder.mul(i, _ir.index(4 * self.bits)))
                    x = [
                        _ir.load(builder, _ir.offset(builder, source, 4 * j), _ir.F32, 4)
                        for j in range(self.bits)
                    ]
                    x = [_ir.broadcast(builder, value, self.v_float) for value in x]
                    low = zero
                    in_register = self.lanes.bit_length() - 1
                    for j in range(in_register):
                        low = builder.select(masks[j], builder.fadd(low, x[j]), low)
                    table = [low]
                    for j in range(in_register, self.bits):
                        table += [builder.fadd(register, x[j]) for register in table]
                    target = builder.add(tables, builder.mul(i, table_step))
                    for r, register in enumerate(table):
                        _ir.store(
                            builder, register, _ir.offset(builder, target, 4 * self.lanes * r), 32
                        )
                    # the last entry is the group's sum
                    return [builder.fadd(carried[0], table[-1])]

                (total,) = _ir.counted_loop(builder, n_groups, [zero], body)
                return builder.extract_element(total, ir.Constant(_ir.I32, self.lanes - 1))

            return signature, codegen

        return build_tables

    def make_mix_tiles(self, n_tiles, n_columns=1):
        """Return an intrinsic that adds the look-ups of a block of units, some tiles and columns.

        The indices of the look-ups are made once for all columns; `n_tiles` share every table that
        is loaded. More of both than registers have room for is several times slower.
        """
        parts = 16 // self.lanes  # registers a unit of a tile

        @intrinsic
        def mix_tiles(typingctx, tiles, tile_stride, tables, n_units, sums, sum_stride):
            """Add the look-ups of `n_units` units to the 32 sums of each of the tiles.

            Addresses and strides in bytes: `tile_stride` from a tile to the next, `sum_stride` from
            a column to the next. The tables of all columns for a group of inputs lie together.
            """
            signature = types.void(*[types.intp] * 6)

            def codegen(context, builder, signature, args):
                tiles, tile_stride, tables, n_units, sums, sum_stride = args

                def steps(start, stride, count):
                    return [
                        builder.add(start, builder.mul(stride, _ir.index(i))) for i in range(count)
                    ]

                starts = steps(tiles, tile_stride, n_tiles)
                keys = [(t, p, h) for t in range(n_tiles) for p in range(parts) for h in range(2)]
                addresses = [
                    _ir.offset(builder, column, 4 * (32 * t + 16 * h + self.lanes * p))
                    for column in steps(sums, sum_stride, n_columns)
                    for t, p, h in keys
                ]
                first = [_ir.load(builder, address, self.v_float, 4) for address in addresses]
                multipliers = [
                    _ir.opaque(builder, _ir.splat_constant(self.v_word, 2 ** (16 - self.bits * g)))
                    for g in range(1, self.groups)
                ]
                upper = _ir.opaque(builder, ir.Constant(self.v_word, [0, 1] * self.lanes))
                # the next tiles lie far apart, and the hardware does not guess
                ahead = builder.mul(tile_stride, _ir.index(n_tiles))

                def body(u, carried):
                    here = builder.mul(u, _ir.index(64))
                    halves = {}
                    for t, start in enumerate(starts):
                        for p in range(parts):
                            address = _ir.offset(
                                builder, builder.add(start, here), 4 * self.lanes * p
                            )
                            halves[t, p, 0] = _ir.load(builder, address, self.v_int, 4)
                            if p == 0:
                                _ir.prefetch(builder, builder.add(address, ahead))
                            halves[t, p, 1] = self.upper_half(builder, halves[t, p, 0], upper)
                    unit = builder.mul(u, _ir.index(self.groups * n_columns * self.table_bytes))
                    table = builder.add(tables, unit)
                    for g in range(self.groups):
                        indices = [
                            self.shifted(builder, halves[key], g, multipliers) for key in keys
                        ]
                        for c in range(n_columns):
                            registers = []
                            for r in range(self.registers):
                                register = _ir.offset(builder, table, 4 * self.lanes * r)
                                registers.append(_ir.load(builder, register, self.v_float, 32))
                            table = _ir.offset(builder, table, self.table_bytes)
                            for i, index in enumerate(indices, c * len(keys)):
                                found = self.look_up(builder, registers, index)
                                carried[i] = builder.fadd(carried[i], found)
                    return carried

                final = _ir.counted_loop(builder, n_units, first, body)
                for value, address in zip(final, addresses, strict=True):
                    _ir.store(builder, value, address, 4)
                return context.get_dummy_value()

            return signature, codegen

        return mix_tiles


AVX512 = Isa(16, 5)
AVX2 = Isa(8, 3)

_build_tables_avx512 = AVX512.make_build_tables()
_build_tables_avx2 = AVX2.make_build_tables()
_mix_4_tiles_avx512 = AVX512.make_mix_tiles(4)
_mix_3_tiles_avx512 = AVX512.make_mix_tiles(3)
_mix_2_tiles_avx512 = AVX512.make_mix_tiles(2)
_mix_1_tile_avx512 = AVX512.make_mix_tiles(1)
_mix_2_tiles_avx2 = AVX2.make_mix_tiles(2)
_mix_1_tile_avx2 = AVX2.make_mix_tiles(1)


@njit(fastmath=False)
def build_avx512(inputs, n_units, tables):
    """Write the tables of some units, 96 float32 each; return the inputs' sum; addresses."""
    return _build_tables_avx512(inputs, n_units, tables, 128)


@njit(fastmath=False)
def mix_avx512(tiles, n_tiles, stride, tables, n_units, sums):
    """Add the look-ups of `n_units` units to the sums of all tiles; addresses, `stride` in bytes.

    Tiles go by fours and threes: a single one waits for its own additions.
    """
    while n_tiles > 0:
        if n_tiles == 4 or n_tiles > 6:
            _mix_4_tiles_avx512(tiles, stride, tables, n_units, sums, 0)
            size = 4
        elif n_tiles == 3 or n_tiles > 4:
            _mix_3_tiles_avx512(tiles, stride, tables, n_units, sums, 0)
            size = 3
        elif n_tiles == 2:
            _mix_2_tiles_avx512(tiles, stride, tables, n_units, sums, 0)
            size = 2
        else:
            _mix_1_tile_avx512(tiles, stride, tables, n_units, sums, 0)
            size = 1
        tiles += size * stride
        sums += size * 128
        n_tiles -= size


@njit(fastmath=False)
def build_avx2(inputs, n_units, tables):
    """Do what `build_avx512` does, 40 float32 a unit."""
    return _build_tables_avx2(inputs, n_units, tables, 32)


@njit(fastmath=False)
def mix_avx2(tiles, n_tiles, stride, tables, n_units, sums):
    """Do what `mix_avx512` does."""
    while n_tiles > 0:
        size = min(2, n_tiles)
        if size == 2:
            _mix_2_tiles_avx2(tiles, stride, tables, n_units, sums, 0)
        else:
            _mix_1_tile_avx2(tiles, stride, tables, n_units, sums, 0)
        tiles += size * stride
        sums += size * 128
        n_tiles -= size
