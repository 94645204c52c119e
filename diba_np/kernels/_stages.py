"""The two stages of a product by tables, written once for every kind of look-up.

A kind brings two functions of addresses: ``build(inputs, n_units, tables)`` writes the tables of
some units and returns the inputs' sum, ``mix(tiles, n_tiles, stride, tables, n_units, sums)`` adds
their look-ups to the sums of tiles that lie `stride` bytes apart. `make_mix_part` makes of them the
function that does the output rows of some tiles, `make_stages` and `make_term_stages` make of that,
or of one written otherwise, what a kernel calls: for one factorization and for a sum of several
(``kernels/_terms.py``), at once and in pieces for threads; `make_rounded_stages` likewise for
16-bit tables. Numba can keep no function that was made so: each is compiled into its kernel, which
is kept, under a name of its own (``_jit.py``). The kernels' files carry a digest of this one, as of
``_ir.py``.
"""

from __future__ import annotations

import functools

import numpy as np

from diba_np.kernels._barrier import arrive, barrier, take  # _barrier.py eaafea187351
from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import (  # _lookup.py baa33a2a7297
    block_size,
    finish,
    padded,
    scaled,
    zero_if_finite,
)
from diba_np.kernels._terms import (  # _terms.py eb4c554a8480
    first_tiles,
    second_tiles,
    term_inner,
    term_inputs,
)

BLOCK_UNITS = 28  # units whose tables are built at a time: at most 10.5 KiB


def make_mix_part(build, mix, unit_floats):
    """Return the function that does some tiles' rows; a unit's tables take `unit_floats` floats."""

    @njit(fastmath=False, cached=False)
    def mix_part(inputs, tiles, start, stop, shift, scale, before, out):
        """Do the output rows of the tiles ``start ... stop - 1``; return the sum of `inputs`.

        It is NaN where a row's sum is not finite.
        """
        n_units = tiles.shape[1]
        block = block_size(n_units, BLOCK_UNITS)
        tables = np.empty(unit_floats * block + 16, dtype=np.float32)
        sums = np.zeros(32 * (stop - start), dtype=np.float32)
        total = np.float32(0.0)
        for u in range(0, n_units, block):
            width = min(block, n_units - u)
            # asked for in the loop: Numba frees an array after the last use of its name
            table = (tables.ctypes.data + 63) // 64 * 64
            total += build(inputs.ctypes.data + 60 * u, width, table)
            first = tiles.ctypes.data + 64 * (n_units * start + u)
            mix(first, stop - start, 64 * n_units, table, width, sums.ctypes.data)
        finish(sums, 32 * start, shift, total, scale, before, out)
        return total + zero_if_finite(sums)

    return mix_part


@njit(fastmath=False)
def start_pieces(x, d3, tiles2, d2, tiles1, n_parts, out):
    """Return what the pieces of `make_stages` share.

    Inputs, inner vector, totals of the pieces, counters of the barrier.
    """
    two = tiles1.shape[0] > 0
    z = padded(d2.size, tiles1.shape[1], x.dtype) if two else out
    totals = np.empty(n_parts, dtype=x.dtype)
    return scaled(x, d3, tiles2.shape[1]), z, totals, barrier()


def make_stages(mix_part):
    """Return (product, piece): both stages at once, and for one of several threads."""

    @njit(fastmath=False, cached=False)
    def product(x, d3, tiles2, d2, tiles1, d1, shift, out):
        """Do what ``lookup_simd.product_avx512`` does."""
        inputs = scaled(x, d3, tiles2.shape[1])
        none = inputs[:0]
        if tiles1.shape[0] == 0:
            return mix_part(inputs, tiles2, 0, tiles2.shape[0], shift, d2, none, out)
        z = padded(d2.size, tiles1.shape[1], x.dtype)
        total = mix_part(inputs, tiles2, 0, tiles2.shape[0], shift, d2, none, z)
        total += mix_part(z, tiles1, 0, tiles1.shape[0], shift, d1, none, out)
        return total

    @njit(fastmath=False, cached=False)
    def piece(p, shared, tiles2, d2, tiles1, d1, shift, n_parts, out):
        """Do piece `p` of the first stage and, once all are done, pieces of the second.

        Of all pieces' totals the first, and NaN where another is not finite, is what `product`
        returns.
        """
        inputs, z, totals, counters = shared
        none = inputs[:0]
        n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
        start, stop = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        totals[p] = mix_part(inputs, tiles2, start, stop, shift, d2, none, z)
        if n_tiles1 > 0 and arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                start, stop = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                totals[q] += mix_part(z, tiles1, start, stop, shift, d1, none, out)
                q = take(counters)

    return product, piece


@njit(fastmath=False)
def start_term_pieces(x, d3, tiles2, starts, n_parts):
    """Return what the pieces of `make_term_stages` share.

    Inputs and inner vectors of the terms, totals of the pieces, counters of the barrier.
    """
    inputs = term_inputs(x, d3, tiles2.shape[1])
    return inputs, term_inner(starts, x.dtype), np.empty(n_parts, dtype=x.dtype), barrier()


def make_term_stages(mix_part):
    """Return (product, piece) of a sum of several factorizations, as `make_stages` of one."""

    @njit(fastmath=False, cached=False)
    def first_stages(inputs, tiles2, p, n_parts, shift, d2, starts, z):
        """Do a piece of the first stage of every term; return the sum of the inputs, or NaN."""
        none = np.empty(0, dtype=inputs.dtype)
        total = zero_if_finite(none)
        for t in range(inputs.shape[0]):
            tiles = first_tiles(tiles2, starts, t)
            start, stop = len(tiles) * p // n_parts, len(tiles) * (p + 1) // n_parts
            scale, part = d2[starts[t, 0] : starts[t + 1, 0]], z[starts[t, 3] : starts[t + 1, 3]]
            total += mix_part(inputs[t], tiles, start, stop, shift, scale, none, part)
        return total

    @njit(fastmath=False, cached=False)
    def second_stages(z, tiles1, p, n_parts, shift, d1, starts, out):
        """Do a piece of the second stage of every term, each added to those before it.

        Returns the sum of `z`, or NaN where a row's sum is not finite, with its scale or without.
        """
        total = zero_if_finite(out[:0])
        start, stop = 0, 0
        before = out[:0]
        for t in range(d1.shape[0]):
            tiles = second_tiles(tiles1, starts, t)
            start, stop = len(tiles) * p // n_parts, len(tiles) * (p + 1) // n_parts
            part = z[starts[t, 3] : starts[t + 1, 3]]
            total += mix_part(part, tiles, start, stop, shift, d1[t], before, out)
            before = out
        return total + zero_if_finite(out[32 * start : 32 * stop])

    @njit(fastmath=False, cached=False)
    def product(x, d3, tiles2, d2, tiles1, d1, starts, shift, out):
        """Do what ``lookup_simd.product_terms_avx512`` does."""
        inputs = term_inputs(x, d3, tiles2.shape[1])
        z = term_inner(starts, x.dtype)
        total = first_stages(inputs, tiles2, 0, 1, shift, d2, starts, z)
        return total + second_stages(z, tiles1, 0, 1, shift, d1, starts, out)

    @njit(fastmath=False, cached=False)
    def piece(p, shared, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
        """Do piece `p` of all first stages and, once all are done, pieces of the second."""
        inputs, z, totals, counters = shared
        totals[p] = first_stages(inputs, tiles2, p, n_parts, shift, d2, starts, z)
        if arrive(counters, n_parts):
            q = take(counters)
            while q < n_parts:
                totals[q] += second_stages(z, tiles1, q, n_parts, shift, d1, starts, out)
                q = take(counters)

    return product, piece


@functools.cache  # kinds that share how inputs are measured share these too
def _make_rounded_start(measured, multiple):
    """Return (whole, start) of `make_rounded_stages`."""

    @njit(fastmath=False, cached=False)
    def whole(n_units):
        return -(-n_units // multiple) * multiple

    @njit(fastmath=False, cached=False)
    def start(x, d3, tiles2, d2, tiles1, out):
        """Return what the pieces share.

        Inputs, inner vector, what is measured (of the inputs three numbers, of the inner vector its
        sum and its roughness), counters of the barrier.
        """
        inputs = scaled(x, d3, whole(tiles2.shape[1]))
        two = tiles1.shape[0] > 0
        w = padded(d2.size, whole(tiles1.shape[1]), x.dtype) if two else out
        measures = np.empty(5, dtype=np.float32)
        measures[0], measures[1], measures[2] = measured(inputs, x.size)
        return inputs, w, measures, barrier()

    return whole, start


def make_rounded_stages(measured, mix_part, multiple):
    """Return (product, start, piece, end) by 16-bit tables, on inputs of whole `multiple` units.

    ``measured(inputs, size)`` returns the step of the tables, the sum and the roughness of inputs;
    ``mix_part(inputs, step, tiles, start, stop, offset, weight, addend, scale, out)`` does
    some tiles' rows.
    """

    whole, start = _make_rounded_start(measured, multiple)

    @njit(fastmath=False, cached=False)
    def product(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, out):
        """Do what ``lookup_int16.product_int16`` does."""
        none, zero = np.empty(0, dtype=np.float32), np.float32(0.0)
        inputs = scaled(x, d3, whole(tiles2.shape[1]))
        step, total, rough = measured(inputs, x.size)
        centre = np.float32(np.float32(0.5) - shift)
        c = np.float32(centre * total)
        if tiles1.shape[0] == 0:
            mix_part(inputs, step, tiles2, 0, tiles2.shape[0], c, zero, none, d2, out)
            return total, rough
        w = padded(d2.size, whole(tiles1.shape[1]), x.dtype)
        mix_part(inputs, step, tiles2, 0, tiles2.shape[0], zero, zero, none, d2, w)
        step, inner, rough1 = measured(w, d2.size)
        offset = np.float32(centre * inner)
        mix_part(w, step, tiles1, 0, tiles1.shape[0], offset, c, mixed_d2, d1, out)
        return total + inner, np.sqrt(rough * rough + rough1 * rough1)

    @njit(fastmath=False, cached=False)
    def piece(p, shared, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
        """Do piece `p` of the first stage and, once all are done, pieces of the second."""
        inputs, w, measures, counters = shared
        step, total = measures[0], measures[1]
        none, zero = np.empty(0, dtype=np.float32), np.float32(0.0)
        centre = np.float32(np.float32(0.5) - shift)
        c = np.float32(centre * total)
        n_tiles2, n_tiles1 = tiles2.shape[0], tiles1.shape[0]
        first, last = n_tiles2 * p // n_parts, n_tiles2 * (p + 1) // n_parts
        offset = zero if n_tiles1 > 0 else c
        mix_part(inputs, step, tiles2, first, last, offset, zero, none, d2, w)
        if n_tiles1 > 0 and arrive(counters, n_parts):
            step1, inner, rough1 = measured(w, d2.size)
            offset1 = np.float32(centre * inner)
            q = take(counters)
            while q < n_parts:
                first, last = n_tiles1 * q // n_parts, n_tiles1 * (q + 1) // n_parts
                mix_part(w, step1, tiles1, first, last, offset1, c, mixed_d2, d1, out)
                if q == 0:
                    measures[3], measures[4] = inner, rough1
                q = take(counters)

    @njit(fastmath=False, cached=False)
    def end(shared, tiles1):
        """Return the sum and the roughness of both stages, as `product` does."""
        measures = shared[2]
        total, rough, inner, rough1 = measures[1], measures[2], measures[3], measures[4]
        if tiles1.shape[0] == 0:
            return total, rough
        return total + inner, np.sqrt(rough * rough + rough1 * rough1)

    return product, start, piece, end
