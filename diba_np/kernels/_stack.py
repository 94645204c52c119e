"""What stacks of factorizations share beside their look-ups: the plan, what it points to, the ends.

A row of the plan (int64) is one factorization or linear trellis: addresses of tiles, sizes, and
offsets into two arrays of float32, each part from a cache line on. The constants, filled up to a
cache line with zeros, are diagonals, shifts and biases. The room is for what lies between x and the
result; calls of all stacks use the same, which stays in the cache, so that nothing in it is as an
earlier call of this stack left it. Who fills plan and constants: ``products/plan.py``. Compiled
into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import block_size  # _lookup.py baa33a2a7297
from diba_np.kernels._stages import BLOCK_UNITS  # _stages.py 2ab30e42ec6b
from diba_np.kernels.few_columns import few_columns  # few_columns.py ae12638c5c78
from diba_np.kernels.filters import filter_sums  # filters.py ff7fe394c5d1
from diba_np.kernels.hadamard import rotate_vector  # hadamard.py 4948f28d2cdb

COLUMNS = 37  # entries of a row of the plan
# What they are, in order. "At": an offset into the constants, "room": into the room, in float32.
# Stage 1 is B2, from the inputs to k; stage 2 is B1, from k to the rows, or the filter of a linear
# trellis.
(
    TILES_1,  # address of the first tile of B2
    N_TILES_1,  # how many of them, 32 rows each
    N_UNITS_1,  # units of 15 columns in each
    TILES_2,  # the same of B1
    N_TILES_2,
    N_UNITS_2,
    D3,  # at: the diagonals, n, k and m entries
    D2,
    D1,
    SHIFT,  # at: one entry
    BIAS,  # at: m entries; -1 if there is none
    K,  # k
    ROWS,  # m
    OUT,  # the first row in `out`
    ADDS,  # 1: the result is added to that of the row before, another term of the same matrix
    N_TERMS,  # of the matrix that this is a term of
    INPUTS,  # room: d3 * x, for all rows of the plan the same place, as the next two
    TABLES,  # room: of a block of units
    TOTALS,  # room: sums of the inputs of the second stages, one a row of the plan
    SUMS_1,  # room: look-ups of the first stage added up
    INNER,  # room: what comes out of it
    SUMS_2,  # room: look-ups of the second stage added up, or what the filter makes
    TAPS,  # at: (N_WEIGHTS, N_TAPS), of a linear trellis; -1 if this is none
    N_WEIGHTS,  # weights a step
    N_TAPS,  # sums that a weight is made of
    STEPS,  # steps of the trellis
    SCALES,  # at: of the rows, (N_WEIGHTS, STEPS)
    FEW,  # how many columns are decoded instead of packed
    FEW_PLACES,  # at: which entries of x they read
    FEW_WEIGHTS,  # at: (FEW, m)
    FEW_INPUTS,  # room: those entries of x
    TURN_IN,  # at: a rotation of the inputs, n signs and then the odd factor; -1 if there is none
    ODD_IN,  # order of that factor
    TURNED_IN,  # room: the rotated x, and as much more
    TURN_OUT,  # the same three of the outputs
    ODD_OUT,
    TURNED_OUT,
) = range(COLUMNS)

UNIT_FLOATS = 96  # of tables, for AVX-512 and NEON; AVX2 takes 40
LANES = 16  # a cache line
_LINE = _ir.vector(_ir.F32, LANES)


def _make_finish(n_addends):
    """Return an intrinsic that ends a stage for whole cache lines of rows."""

    @intrinsic
    def finish_lines(typingctx, sums, scale, offset, first, second, n_lines, target):
        """Write ``scale * (sums - offset)`` plus the addends that there are; addresses.

        Returns 0, or NaN where a sum is not finite. What is added may lie at the target.
        """
        address = types.intp
        signature = types.float32(
            *(address, address, types.float32, address, address, address, address)
        )

        def codegen(context, builder, signature, args):
            sums, scale, offset, first, second, n_lines, target = args
            offsets = _ir.broadcast(builder, offset, _LINE)
            zero = _ir.splat_constant(_LINE, 0.0)

            def body(i, carried):
                here = builder.mul(i, _ir.index(4 * LANES))

                def line(start):
                    return _ir.load(builder, builder.add(start, here), _LINE, 4)

                value = line(sums)
                check = builder.fadd(carried[0], builder.fmul(zero, value))
                value = builder.fmul(line(scale), builder.fsub(value, offsets))
                for addend in (first, second)[:n_addends]:
                    value = builder.fadd(value, line(addend))
                _ir.store(builder, value, builder.add(target, here), 4)
                return [check]

            (check,) = _ir.counted_loop(builder, n_lines, [zero], body)
            return _total(builder, check)

        return signature, codegen

    return finish_lines


def _total(builder, line):
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    add_up = _ir.declare(builder, name, _ir.F32, [_ir.F32, _LINE])
    return builder.call(add_up, [ir.Constant(_ir.F32, 0.0), line], fastmath=("reassoc",))


@intrinsic
def _zero_if_finite(typingctx, sums, offset, n_pairs):
    """Return 0, or NaN if ``sums - offset`` is not finite on some pairs of cache lines."""
    signature = types.float32(types.intp, types.float32, types.intp)

    def codegen(context, builder, signature, args):
        sums, offset, n_pairs = args
        offsets = _ir.broadcast(builder, offset, _LINE)
        zero = _ir.splat_constant(_LINE, 0.0)

        def body(i, carried):
            here = builder.add(sums, builder.mul(i, _ir.index(8 * LANES)))
            lines = [
                _ir.load(builder, _ir.offset(builder, here, 4 * LANES * h), _LINE, 4)
                for h in range(2)
            ]
            return [
                builder.fadd(total, builder.fmul(zero, builder.fsub(line, offsets)))
                for total, line in zip(carried, lines, strict=True)
            ]

        totals = _ir.counted_loop(builder, n_pairs, [zero, zero], body)
        return _total(builder, builder.fadd(*totals))

    return signature, codegen


@intrinsic
def _zero_if_finite_scaled(typingctx, sums, scale, offset, factor, n_lines):
    """Return 0, or NaN if ``factor * scale * (sums - offset)`` is not finite on some lines."""
    signature = types.float32(types.intp, types.intp, types.float32, types.float32, types.intp)

    def codegen(context, builder, signature, args):
        sums, scale, offset, factor, n_lines = args
        offsets, factors = (_ir.broadcast(builder, value, _LINE) for value in (offset, factor))
        zero = _ir.splat_constant(_LINE, 0.0)

        def body(i, carried):
            here = builder.mul(i, _ir.index(4 * LANES))
            value, scales = (
                _ir.load(builder, builder.add(start, here), _LINE, 4) for start in (sums, scale)
            )
            value = builder.fmul(factors, builder.fmul(scales, builder.fsub(value, offsets)))
            return [builder.fadd(carried[0], builder.fmul(zero, value))]

        (check,) = _ir.counted_loop(builder, n_lines, [zero], body)
        return _total(builder, check)

    return signature, codegen


_finish = _make_finish(0)
_finish_adding = _make_finish(1)
_finish_adding_both = _make_finish(2)


@njit(fastmath=False)
def turned_inputs(x, row, room):
    """Return where x is as a matrix reads it: rotated, if its inputs are."""
    return room[row[TURNED_IN] :][: x.size] if row[TURN_IN] >= 0 else x


@njit(fastmath=False)
def rotate_inputs(x, row, constants, room):
    """Write the rotated x to the room, if inputs are rotated."""
    if row[TURN_IN] >= 0:
        _rotate(x, row[TURN_IN], row[ODD_IN], False, constants, room[row[TURNED_IN] :])


@njit(fastmath=False)
def _rotate(x, turn, odd, back, constants, room):
    signs, factor = constants[turn:][: x.size], constants[turn + x.size :][: odd * odd]
    turned, more = room[: x.size], room[x.size :][: x.size]
    rotate_vector(x, signs, factor.reshape(odd, odd), back, more, turned)


@njit(fastmath=False)
def filter_stage(x, row, constants, room):
    """Write what the filter of a linear trellis makes of the first stage, to the second sums.

    Returns a number that is finite only if all of them are.
    """
    m, size, steps = row[ROWS], row[N_WEIGHTS] * row[N_TAPS], row[STEPS]
    found = room[row[SUMS_2] :][:m]
    if row[FEW]:
        source, inputs = turned_inputs(x, row, room), room[row[FEW_INPUTS] :][: row[FEW]]
        for c in range(row[FEW]):
            inputs[c] = source[np.int64(constants[row[FEW_PLACES] + c])]
        weights = constants[row[FEW_WEIGHTS] :][: row[FEW] * m].reshape(row[FEW], m)
        few_columns(weights, inputs.reshape(-1, 1), found.reshape(-1, 1))
    sums = room[row[INNER] :][: row[K]].reshape(row[K] // steps, steps)
    taps = constants[row[TAPS] :][:size].reshape(row[N_WEIGHTS], row[N_TAPS])
    scales = constants[row[SCALES] :][: row[N_WEIGHTS] * steps].reshape(row[N_WEIGHTS], steps)
    filter_sums(sums, taps, scales, 1, row[FEW] > 0, found)
    if row[TURN_OUT] >= 0:
        _rotate(found, row[TURN_OUT], row[ODD_OUT], True, constants, room[row[TURNED_OUT] :])
        found[:] = room[row[TURNED_OUT] :][:m]
    return _zero_if_finite(room.ctypes.data + 4 * row[SUMS_2], np.float32(0.0), row[N_TILES_2])


@njit(fastmath=False)
def start_first_stages(x, plan, first, after, constants, room):
    """Write ``d3 * x`` to the room, and zeros to the first sums of some factorizations."""
    inputs, scale = room[plan[first, INPUTS] :], constants[plan[first, D3] :][: x.size]
    source = turned_inputs(x, plan[first], room)
    for j in range(x.size):
        inputs[j] = scale[j] * source[j]
    inputs[x.size : 15 * plan[first, N_UNITS_1]] = 0
    for i in range(first, after):
        room[plan[i, SUMS_1] :][: 32 * plan[i, N_TILES_1]] = 0


@njit(fastmath=False)
def finish_first_stage(row, total, constants, room):
    """Write ``d2 * (sums - shift * total)``; return a number that is finite if all of these are.

    Write zeros to what the second stage reads beyond it, and to the second sums.
    """
    shift, lines = constants[row[SHIFT]], (row[K] + LANES - 1) // LANES
    # 0 * total would be NaN where the total, which no row asked for, overflows
    offset = shift * total if shift != 0 else shift
    room[row[INNER] :][LANES * lines : 15 * row[N_UNITS_2]] = 0
    room[row[SUMS_2] :][: 32 * row[N_TILES_2]] = 0
    return total + _finish(
        room.ctypes.data + 4 * row[SUMS_1],
        constants.ctypes.data + 4 * row[D2],
        offset,
        room.ctypes.data,
        room.ctypes.data,
        lines,
        room.ctypes.data + 4 * row[INNER],
    )


@njit(fastmath=False)
def finish_second_stage(row, total, constants, room):
    """Return a number that is finite if the inputs' total is, and ``sums - shift * total``.

    And, of several terms, if the results are that will be added up, in whatever order.
    """
    shift = constants[row[SHIFT]]
    offset = shift * total if shift != 0 else shift
    if row[N_TERMS] == 1:
        return total + _zero_if_finite(room.ctypes.data + 4 * row[SUMS_2], offset, row[N_TILES_2])
    factor = np.float32(row[N_TERMS])
    n_lines = (row[ROWS] + LANES - 1) // LANES
    return total + _zero_if_finite_scaled(
        room.ctypes.data + 4 * row[SUMS_2],
        constants.ctypes.data + 4 * row[D1],
        offset,
        factor,
        n_lines,
    )


@njit(fastmath=False)
def write_results(plan, constants, room, added, out):
    """Write ``d1 * (sums - shift * total) + bias + added`` of every factorization."""
    start = constants.ctypes.data
    for i in range(plan.shape[0]):
        row = plan[i]
        shift = constants[row[SHIFT]]
        offset = shift * room[row[TOTALS] + i] if shift != 0 else shift
        rest = out if row[ADDS] else added
        whole, first = row[ROWS] // LANES, row[OUT]
        target = out.ctypes.data + 4 * first
        sums = room.ctypes.data + 4 * row[SUMS_2]
        scale, bias = start + 4 * row[D1], start + 4 * row[BIAS]
        addend = rest.ctypes.data + 4 * first
        if row[BIAS] < 0 and rest.size == 0:
            _finish(sums, scale, offset, sums, sums, whole, target)
        elif row[BIAS] < 0:
            _finish_adding(sums, scale, offset, addend, sums, whole, target)
        elif rest.size == 0:
            _finish_adding(sums, scale, offset, bias, sums, whole, target)
        else:
            _finish_adding_both(sums, scale, offset, bias, addend, whole, target)
        for j in range(LANES * whole, row[ROWS]):
            value = constants[row[D1] + j] * (room[row[SUMS_2] + j] - offset)
            if row[BIAS] >= 0:
                value += constants[row[BIAS] + j]
            if rest.size:
                value += rest[first + j]
            out[first + j] = value


def make_stack(build, mix):
    """Return what a kernel of stacks calls, for a kind of look-up; named as in ``_stages.py``.

    One function does both stages, because calls of others cost a small stack some hundredths.
    """

    @njit(fastmath=False, cached=False)
    def stack(x, plan, constants, room, added, out):
        """Do what ``stack_simd.stack_avx512`` does."""
        check = np.float32(0.0)
        total = np.float32(0.0)
        totals = room[plan[0, TOTALS] :]
        n_units = plan[0, N_UNITS_1]
        block = block_size(n_units, BLOCK_UNITS)
        # first stages, of rows that read the same inputs, scaled alike, together
        first, turn = 0, -1
        while first < plan.shape[0]:
            after = first + 1
            while (
                after < plan.shape[0]
                and plan[after, D3] == plan[first, D3]
                and plan[after, TURN_IN] == plan[first, TURN_IN]
            ):
                after += 1
            if plan[first, TURN_IN] != turn:  # else those before have rotated x likewise
                turn = plan[first, TURN_IN]
                rotate_inputs(x, plan[first], constants, room)
            start_first_stages(x, plan, first, after, constants, room)
            total = np.float32(0.0)
            for u in range(0, n_units, block):
                width = min(block, n_units - u)
                table = room.ctypes.data + 4 * plan[first, TABLES]
                inputs = room.ctypes.data + 4 * plan[first, INPUTS] + 60 * u
                total += build(inputs, width, table)
                for i in range(first, after):
                    tiles = plan[i, TILES_1] + 64 * u
                    sums = room.ctypes.data + 4 * plan[i, SUMS_1]
                    mix(tiles, plan[i, N_TILES_1], 64 * n_units, table, width, sums)
            for i in range(first, after):
                check += finish_first_stage(plan[i], total, constants, room)
            first = after
        # second stages, one after another
        for i in range(plan.shape[0]):
            if plan[i, TAPS] >= 0:
                totals[i] = 0
                check += filter_stage(x, plan[i], constants, room)
                continue
            n_units = plan[i, N_UNITS_2]
            block = block_size(n_units, BLOCK_UNITS)
            total = np.float32(0.0)
            for u in range(0, n_units, block):
                width = min(block, n_units - u)
                table = room.ctypes.data + 4 * plan[i, TABLES]
                inputs = room.ctypes.data + 4 * plan[i, INNER] + 60 * u
                total += build(inputs, width, table)
                tiles = plan[i, TILES_2] + 64 * u
                sums = room.ctypes.data + 4 * plan[i, SUMS_2]
                mix(tiles, plan[i, N_TILES_2], 64 * n_units, table, width, sums)
            totals[i] = total
            check += finish_second_stage(plan[i], total, constants, room)
        if np.isfinite(check):
            write_results(plan, constants, room, added, out)
        return check

    return stack
