"""Products of float32 matrices rounded to bfloat16: twice as fast where the CPU has such dots.

Both operands are rounded to bfloat16 (8 bits of mantissa, to nearest, ties to even), products and
sums are float32. One instruction (AVX512-BF16) adds the products of 16 pairs of neighbours to 16
sums. The right operand is packed once, `WIDTH` columns side by side, each pair of its rows in one
word; of the left one `ROWS` rows at a time, and `PAIRS` pairs of what is summed over, so that a
block of it stays in the second cache while all panels pass by.
"""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit

WIDTH = 32  # columns of a panel of the right operand: two registers of sums
PAIRS = 1040  # of rows of the right operand that are multiplied at a time: 130 KiB of a panel
ROWS = 120  # of the left operand that are rounded at a time: 490 KiB
_TILE = 12  # rows whose sums are in registers together

_SUMS, _WORDS = _ir.vector(_ir.F32, 16), _ir.vector(_ir.I32, 16)
_LINE = 64  # bytes of 16 words


class _BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite ships no types
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


# before LLVM 16 the instruction's operands were words
_WIDE = _WORDS if llvmlite.binding.llvm_version_info[0] < 16 else ir.VectorType(_BFloat16(), 32)


def _rounded(builder, words):
    """Round the float32 numbers of a vector of words; the result is in the upper halves."""
    one, half = _ir.splat_constant(_WORDS, 1), _ir.splat_constant(_WORDS, 0x7FFF)
    sixteen = _ir.splat_constant(_WORDS, 16)
    odd = builder.and_(builder.lshr(words, sixteen), one)
    return builder.add(builder.add(words, half), odd)


@intrinsic
def _round_line(typingctx, source, target):
    """Write 16 float32 as bfloat16."""
    signature = types.void(types.intp, types.intp)

    def codegen(context, builder, signature, args):
        rounded = _rounded(builder, _ir.load(builder, args[0], _WORDS, 4))
        upper = builder.lshr(rounded, _ir.splat_constant(_WORDS, 16))
        _ir.store(builder, builder.trunc(upper, _ir.vector(_ir.I16, 16)), args[1], 2)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _round_pairs(typingctx, first, second, target):
    """Write 16 words: bfloat16 of a line in the lower halves, of another in the upper ones."""
    signature = types.void(types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        low, high = (
            _rounded(builder, _ir.load(builder, line, _WORDS, 4)) for line in (args[0], args[1])
        )
        low = builder.lshr(low, _ir.splat_constant(_WORDS, 16))
        high = builder.and_(high, _ir.splat_constant(_WORDS, 0xFFFF0000))
        _ir.store(builder, builder.or_(low, high), args[2], 4)
        return context.get_dummy_value()

    return signature, codegen


def _make_multiply(row_step, pair_step):
    """Return a kernel for a left operand whose rows and pairs lie so many bytes apart."""

    @intrinsic
    def multiply(typingctx, left, right, n_pairs, out, out_step):
        """Add the product of `_TILE` rows with a panel to `_TILE` lines of `out`, bytes apart."""
        signature = types.void(*[types.intp] * 5)

        def codegen(context, builder, signature, args):
            left, right, n_pairs, out, out_step = args
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            dot = _ir.declare(builder, name, _SUMS, [_SUMS, _WIDE, _WIDE])

            def step(i, sums):
                line = builder.add(right, builder.mul(i, _ir.index(2 * _LINE)))
                words = [
                    builder.bitcast(
                        _ir.load(builder, _ir.offset(builder, line, at), _WORDS, 64), _WIDE
                    )
                    for at in (0, _LINE)
                ]
                own = builder.add(left, builder.mul(i, _ir.index(pair_step)))
                results = []
                for row in range(_TILE):
                    pair = _ir.load(builder, _ir.offset(builder, own, row_step * row), _ir.I32, 4)
                    spread = builder.bitcast(_ir.broadcast(builder, pair, _WORDS), _WIDE)
                    for half, word in enumerate(words):
                        results.append(builder.call(dot, [sums[2 * row + half], spread, word]))
                return results

            zeros = [_ir.splat_constant(_SUMS, 0.0)] * (2 * _TILE)
            sums = iter(_ir.counted_loop(builder, n_pairs, zeros, step))
            for row in range(_TILE):
                line = builder.add(out, builder.mul(out_step, _ir.index(row)))
                for at in (0, _LINE):
                    place = _ir.offset(builder, line, at)
                    before = _ir.load(builder, place, _SUMS, 4)
                    _ir.store(builder, builder.fadd(before, next(sums)), place, 4)
            return context.get_dummy_value()

        return signature, codegen

    return multiply


_multiply_rows = _make_multiply(4 * PAIRS, 4)  # an odd number of cache lines apart
_multiply_columns = _make_multiply(4, 4 * _TILE)  # of rows that were columns

# words of a tile of such rows: lines of 16 are written for 12, which must not meet the next tile
_TILE_WORDS = _TILE * PAIRS + 16


@njit(fastmath=False)
def _round(words, i, j):
    """Return an entry as bfloat16, in the lower half of a word."""
    word = np.int64(words[i, j])
    return np.uint32((word + 0x7FFF + ((word >> 16) & 1)) >> 16)


@njit(fastmath=False)
def _pair(words, i, j, last):
    """Return an entry and the one below it, zero beyond the `last` row, as a word."""
    low = _round(words, i, j)
    return low | (_round(words, i + 1, j) << np.uint32(16)) if i + 1 < last else low


@njit(fastmath=False)
def pack_bfloat16(B, start, stop, out):
    """Round the panels ``start ... stop - 1`` of a product's right operand.

    Parameters
    ----------
    B : (n, k) float32, C-order, finite
    start, stop : int
        Panels of `WIDTH` columns; with the last one zeros for those that B lacks.
    out : (ceil(k / WIDTH), ceil(n / 2), WIDTH) uint32, at a cache line, overwritten there
        Two rows of a column in each word.

    Notes
    -----
    O(n k). naive: ``tests/naive.py::pack_bfloat16``.
    """
    n, k = B.shape
    words = B.view(np.uint32)
    for panel in range(start, stop):
        first = WIDTH * panel
        whole = first + (min(k - first, WIDTH) // 16) * 16
        for p in range((n + 1) // 2):
            lined = first
            if 2 * p + 1 < n:
                for j in range(first, whole, 16):
                    row = B.ctypes.data + 4 * (k * 2 * p + j)
                    target = out.ctypes.data + 4 * ((panel * out.shape[1] + p) * WIDTH + j - first)
                    _round_pairs(row, row + 4 * k, target)
                lined = whole
            for j in range(lined, first + WIDTH):
                out[panel, p, j - first] = _pair(words, 2 * p, j, n) if j < k else 0


@njit(fastmath=False)
def _round_rows(words, first, stop, start, end, block):
    """Round the columns ``start ... end - 1`` of some rows, zeros up to a pair; a row for each."""
    halves = block.view(np.uint16)
    whole = start + (end - start) // 16 * 16
    for i in range(first, stop):
        source = words.ctypes.data + 4 * words.shape[1] * i
        target = halves.ctypes.data + 2 * halves.shape[1] * (i - first)
        for j in range(start, whole, 16):
            _round_line(source + 4 * j, target + 2 * (j - start))
        for j in range(whole, end):
            halves[i - first, j - start] = _round(words, i, j)
        if (end - start) % 2:
            halves[i - first, end - start] = 0


@njit(fastmath=False)
def _round_columns(words, first, stop, start, end, block):
    """Round the rows ``start ... end - 1`` of some columns, two in a word.

    Of `_TILE` columns, a row of `block`, those of a pair of rows lie side by side.
    """
    n = words.shape[1]
    for p in range((end - start + 1) // 2):
        i = start + 2 * p
        for j in range(first, stop, _TILE):
            tile = (j - first) // _TILE
            if i + 1 < end and j + 16 <= n:
                row = words.ctypes.data + 4 * (n * i + j)
                target = block.ctypes.data + 4 * (_TILE_WORDS * tile + _TILE * p)
                _round_pairs(row, row + 4 * n, target)
            else:
                for r in range(min(_TILE, stop - j)):
                    block[tile, _TILE * p + r] = _pair(words, i, j + r, end)


@njit(fastmath=False)
def _add_tile(turned, left, right, n_pairs, out, out_step):
    if turned:
        _multiply_columns(left, right, n_pairs, out, out_step)
    else:
        _multiply_rows(left, right, n_pairs, out, out_step)


@njit(fastmath=False)
def product_bfloat16(A, turned, panels, first, start, stop, out):
    """Multiply with a packed right operand B (n, k), both rounded to bfloat16.

    Parameters
    ----------
    A : float32, C-order, finite
        (m, n); or (n, m), of which the transpose is meant.
    turned : bool
        Whether it is the transpose.
    panels : (ceil(k / WIDTH), ceil(n / 2), WIDTH) uint32, at a cache line
        As of `pack_bfloat16`.
    first : int
        Panels that are left out.
    start, stop : int
        Rows of the product.
    out : (m, k) float32, C-order, overwritten in these rows and in the columns of these panels

    Notes
    -----
    Time ``(stop - start) n k / 32`` cycles (Zen 4) where all panels are taken; a row's result does
    not depend on the others. naive: ``tests/naive.py::product_bfloat16``.
    """
    k = out.shape[1]
    n = A.shape[0] if turned else A.shape[1]
    words = A.view(np.uint32)
    apart = np.empty((_TILE, WIDTH), np.float32)  # for tiles that are not whole
    block = np.empty((ROWS // _TILE, _TILE_WORDS) if turned else (ROWS, PAIRS), np.uint32)
    tile_step = 4 * (_TILE_WORDS if turned else _TILE * PAIRS)
    out[start:stop, WIDTH * first :] = 0
    for top in range(start, stop, ROWS):
        bottom = min(stop, top + ROWS)
        for near in range(0, n, 2 * PAIRS):
            far = min(n, near + 2 * PAIRS)
            n_pairs = (far - near + 1) // 2
            if turned:
                _round_columns(words, top, bottom, near, far, block)
            else:
                _round_rows(words, top, bottom, near, far, block)
            for panel in range(first, panels.shape[0]):
                left = WIDTH * panel
                columns = min(WIDTH, k - left)
                place = 4 * WIDTH * (panel * panels.shape[1] + near // 2)
                for i in range(top, bottom, _TILE):
                    own = block.ctypes.data + tile_step * ((i - top) // _TILE)
                    right = panels.ctypes.data + place
                    rows = min(_TILE, bottom - i)
                    if rows == _TILE and columns == WIDTH:
                        target = out.ctypes.data + 4 * (k * i + left)
                        _add_tile(turned, own, right, n_pairs, target, 4 * k)
                        continue
                    apart[:] = 0
                    _add_tile(turned, own, right, n_pairs, apart.ctypes.data, 4 * WIDTH)
                    for r in range(rows):
                        for c in range(columns):
                            out[i + r, left + c] += apart[r, c]
