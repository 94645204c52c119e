"""Look-ups inside the vector registers of 64-bit Arm (NEON), as code for the kernels to hold.

`tbl` looks up 16 bytes at once, in a table of 16 or 32 bytes. So a table of numbers is kept as its
bytes: all lowest ones, all second ones, and so on. *float32*: 5 inputs, 32 sums, four tables of 32
bytes; what they give for 16 rows is zipped to 16 floats and added. *16-bit tables*: those of
``_words.py``.

Plain Python that runs at compile time, for any LLVM, on any machine: a test lowers it for three
systems. At the end what ``_stages.py`` and ``_stack.py`` ask of a kind of look-up. Compiled into
the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._words import UNIT, joined, moved, write_tables  # _words.py 81254ded4302

BITS = 5  # inputs of a float32 table; three tables a unit
FLOAT_UNIT = 3 * 32 * 4  # bytes of a unit's tables

_BYTES = _ir.vector(ir.IntType(8), 16)
_HALF = _ir.vector(ir.IntType(8), 8)
_WORDS = _ir.vector(_ir.I16, 8)
_INTS = _ir.vector(_ir.I32, 4)
_FLOATS = _ir.vector(_ir.F32, 4)


def _shuffle(builder, one, other, picks):
    """Return the chosen lanes of two vectors."""
    return builder.shuffle_vector(one, other, ir.Constant(_ir.vector(_ir.I32, len(picks)), picks))


def _zipped(builder, one, other):
    """Return the lanes of two vectors in turns: the lower halves, the upper halves."""
    count = one.type.count
    for start in (0, count // 2):
        picks = [lane for i in range(start, start + count // 2) for lane in (i, count + i)]
        yield _shuffle(builder, one, other, picks)


def _unzipped(builder, one, other):
    """Return the even lanes of two vectors, and the odd ones."""
    for first in (0, 1):
        yield _shuffle(builder, one, other, list(range(first, 2 * one.type.count, 2)))


def _bytes(builder, value):
    return builder.bitcast(value, _BYTES)


def _look_up(builder, table, indices):
    """Return the entries of a table of one or two registers of bytes; indices are in range."""
    name = f"llvm.aarch64.neon.tbl{len(table)}.v16i8"
    permute = _ir.declare(builder, name, _BYTES, [_BYTES] * (len(table) + 1))
    return builder.call(permute, [*table, indices])


def _loaded(builder, address, type_, count):
    """Return so many vectors one after another."""
    size = 16
    return [
        _ir.load(builder, _ir.offset(builder, address, size * i), type_, 4) for i in range(count)
    ]


def _rows_loaded(builder, address, type_, blocks):
    """Return the numbers of rows in the order of a tile: row r beside row 16 + r.

    Of each half there are so many blocks of four rows; every block gives two vectors.
    """
    halves = (_loaded(builder, _ir.offset(builder, address, 64 * h), type_, blocks) for h in (0, 1))
    return [value for pair in zip(*halves, strict=True) for value in _zipped(builder, *pair)]


def _rows_stored(builder, values, address):
    """Do the reverse of `_rows_loaded`."""
    for b in range(len(values) // 2):
        for h, half in enumerate(_unzipped(builder, values[2 * b], values[2 * b + 1])):
            _ir.store(builder, half, _ir.offset(builder, address, 64 * h + 16 * b), 4)


def build_float_tables(builder, inputs, n_units, tables):
    """Write the tables of ``15 * n_units`` float32 inputs; return the inputs' sum."""
    flag = ir.IntType(1)
    masks = [
        ir.Constant(_ir.vector(flag, 4), [(entry >> j) & 1 for entry in range(4)]) for j in range(2)
    ]
    zero = _ir.splat_constant(_FLOATS, 0.0)

    def body(i, carried):
        source = builder.add(inputs, builder.mul(i, _ir.index(4 * BITS)))
        x = [
            _ir.broadcast(
                builder, _ir.load(builder, _ir.offset(builder, source, 4 * j), _ir.F32, 4), _FLOATS
            )
            for j in range(BITS)
        ]
        low = zero
        for j in range(2):
            low = builder.select(masks[j], builder.fadd(low, x[j]), low)
        table = [low]
        for j in range(2, BITS):
            table += [builder.fadd(entries, x[j]) for entries in table]
        target = builder.add(tables, builder.mul(i, _ir.index(FLOAT_UNIT // 3)))
        for half in range(2):
            raw = [_bytes(builder, entries) for entries in table[4 * half : 4 * half + 4]]
            even, odd = zip(*(_unzipped(builder, raw[p], raw[p + 1]) for p in (0, 2)), strict=True)
            planes = [*_unzipped(builder, *even), *_unzipped(builder, *odd)]  # bytes 0, 2, 1, 3
            for plane, value in zip((0, 2, 1, 3), planes, strict=True):
                _ir.store(builder, value, _ir.offset(builder, target, 32 * plane + 16 * half), 4)
        return [builder.fadd(carried[0], table[-1])]  # the last entry is the group's sum

    n_groups = builder.mul(n_units, _ir.index(3))
    (total,) = _ir.counted_loop(builder, n_groups, [zero], body)
    return builder.extract_element(total, ir.Constant(_ir.I32, 3))


def _fives(builder, one, other):
    """Return the three indices of 5 bits, as bytes, of two vectors of 16-bit lanes."""
    mask = _ir.splat_constant(_BYTES, 31)
    low, high = _unzipped(builder, _bytes(builder, one), _bytes(builder, other))
    five = _ir.splat_constant(_WORDS, 5)
    middle = [builder.trunc(builder.lshr(value, five), _HALF) for value in (one, other)]
    return (
        builder.and_(low, mask),
        builder.and_(joined(builder, middle), mask),
        builder.lshr(high, _ir.splat_constant(_BYTES, 2)),  # the highest bit is zero
    )


def mix_float_tile(builder, tile, ahead, tables, n_units, sums):
    """Add the look-ups of `n_units` units of a tile to its 32 float32 sums; all are addresses.

    `ahead` is the address of a tile to fetch meanwhile.
    """

    def half_tile(half, nothing):
        """Do 16 of the rows: more sums than registers have room for would go through memory."""
        start = builder.add(tile, builder.mul(half, _ir.index(32)))
        target = builder.add(sums, builder.mul(half, _ir.index(32)))

        def unit(u, carried):
            here = builder.mul(u, _ir.index(64))
            words = _loaded(builder, builder.add(start, here), _WORDS, 2)
            _ir.prefetch(builder, builder.add(ahead, here))
            table = builder.add(tables, builder.mul(u, _ir.index(FLOAT_UNIT)))
            for index in _fives(builder, *words):
                planes = _loaded(builder, table, _BYTES, 8)
                table = _ir.offset(builder, table, FLOAT_UNIT // 3)
                parts = [_look_up(builder, planes[2 * p : 2 * p + 2], index) for p in range(4)]
                lower, upper = (list(_zipped(builder, parts[p], parts[p + 1])) for p in (0, 2))
                for h in range(2):
                    halves = [builder.bitcast(part[h], _WORDS) for part in (lower, upper)]
                    for at, raw in enumerate(_zipped(builder, *halves), 2 * h):
                        found = builder.bitcast(raw, _FLOATS)
                        carried[at] = builder.fadd(carried[at], found)
            return carried

        carried = _rows_loaded(builder, target, _FLOATS, 2)
        carried = _ir.counted_loop(builder, n_units, carried, unit)
        _rows_stored(builder, carried, target)
        return []

    _ir.counted_loop(builder, _ir.index(2), [], half_tile)


def build_word_tables(builder, inputs, n_units, half_inverse_step, tables):
    """Write the tables of ``15 * n_units`` float32 inputs, centred and rounded on one step."""
    write_tables(builder, inputs, n_units, half_inverse_step, tables, lanes=4)


def _fours(builder, one, other):
    """Return the four indices of 4 bits, as bytes, of two vectors of 16-bit lanes."""
    mask, four = (_ir.splat_constant(_BYTES, value) for value in (15, 4))
    indices = []
    for half in _unzipped(builder, _bytes(builder, one), _bytes(builder, other)):
        indices += [builder.and_(half, mask), builder.lshr(half, four)]
    return indices


def mix_word_tile(builder, tile, ahead, tables, n_units, sums):
    """Add the look-ups of up to 128 units of a tile to its 32 int32 sums; all are addresses.

    `ahead` is the address of a tile to fetch meanwhile.
    """
    none = _ir.splat_constant(_WORDS, 0)

    def body(u, carried):
        here = builder.mul(u, _ir.index(64))
        words = _loaded(builder, builder.add(tile, here), _WORDS, 4)
        _ir.prefetch(builder, builder.add(ahead, here))
        indices = [_fours(builder, words[0], words[1]), _fours(builder, words[2], words[3])]
        unit = builder.add(tables, builder.mul(u, _ir.index(UNIT)))
        for g in (0, 2):
            registers = _loaded(builder, _ir.offset(builder, unit, 32 * g), _BYTES, 4)
            for pair in range(2):
                for p in range(2):
                    both = builder.add(
                        _look_up(builder, [registers[p]], indices[pair][g]),
                        _look_up(builder, [registers[2 + p]], indices[pair][g + 1]),
                    )
                    for h in range(2):
                        half = _shuffle(builder, both, both, list(range(8 * h, 8 * h + 8)))
                        at = 4 * p + 2 * pair + h
                        carried[at] = builder.add(carried[at], builder.zext(half, _WORDS))
        return carried

    found = _ir.counted_loop(builder, n_units, [none] * 8, body)
    wide, seven = _ir.vector(_ir.I32, 8), _ir.splat_constant(_ir.vector(_ir.I32, 8), 7)
    excess = moved(builder, n_units, wide)
    before = _rows_loaded(builder, sums, _INTS, 4)
    after = []
    for low, high in zip(found[:4], found[4:], strict=True):
        total = builder.add(builder.zext(low, wide), builder.shl(builder.zext(high, wide), seven))
        total = builder.sub(total, excess)
        for h in range(2):
            part = _shuffle(builder, total, total, list(range(4 * h, 4 * h + 4)))
            after.append(builder.add(before[len(after)], part))
    _rows_stored(builder, after, sums)


@intrinsic
def build_float_tables_neon(typingctx, inputs, n_units, tables):
    """Write the tables of ``15 * n_units`` float32 inputs; return the inputs' sum."""
    signature = types.float32(types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        return build_float_tables(builder, *args)

    return signature, codegen


@intrinsic
def mix_float_tile_neon(typingctx, tile, ahead, tables, n_units, sums):
    """Add the look-ups of a tile's units to its 32 float32 sums, and fetch another one's."""
    signature = types.void(*[types.intp] * 5)

    def codegen(context, builder, signature, args):
        mix_float_tile(builder, *args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def build_word_tables_neon(typingctx, inputs, n_units, half_inverse_step, tables):
    """Write the centred 16-bit tables of ``15 * n_units`` float32 inputs."""
    signature = types.void(types.intp, types.intp, types.float32, types.intp)

    def codegen(context, builder, signature, args):
        build_word_tables(builder, *args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def mix_word_tile_neon(typingctx, tile, ahead, tables, n_units, sums):
    """Add the look-ups of a tile's units to its 32 int32 sums, and fetch another one's."""
    signature = types.void(*[types.intp] * 5)

    def codegen(context, builder, signature, args):
        mix_word_tile(builder, *args)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def mix_neon(tiles, n_tiles, stride, tables, n_units, sums):
    """Add the look-ups of some units to the sums of all tiles; addresses, `stride` in bytes."""
    for t in range(n_tiles):
        tile = tiles + stride * t
        ahead = tile + stride * min(1, n_tiles - 1 - t)
        mix_float_tile_neon(tile, ahead, tables, n_units, sums + 128 * t)
