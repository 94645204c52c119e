"""Circular filters between the sums of packed bits and the outputs that they stand for.

Bit r of a step has a plane of sums, flat over (T steps, N columns). Output v of step t is
``sum_jr taps[v, j * bits + r] * sums[r, t - j]``, steps counted modulo T.
"""

import numpy as np

from diba_np.kernels._jit import njit

_SUMS = {"reassoc", "contract", "nsz"}

# entries worked on at a time: a few planes of them stay in the first cache
_CHUNK = 1024


@njit(fastmath=_SUMS)
def _add(target, tap, source):
    for p in range(target.size):
        target[p] += tap * source[p]


@njit(fastmath=_SUMS)
def _add3(target, tap0, source0, tap1, source1, tap2, source2):
    for p in range(target.size):
        target[p] += tap0 * source0[p] + tap1 * source1[p] + tap2 * source2[p]


@njit(fastmath=_SUMS)
def _add_scaled(rows, columns, scales, source, every):
    """Add (steps, columns), flat, times a scale for each step, to one row of so many.

    `rows` is flat from the first step's row on; return the sum of those that were added to.
    """
    total = rows.dtype.type(0)
    if columns == 1 and every == 1:  # as is, because a step of one row is then vectorised
        for p in range(scales.size):
            rows[p] += scales[p] * source[p]
            total += rows[p]
    elif columns == 1:
        for p in range(scales.size):
            rows[p * every] += scales[p] * source[p]
            total += rows[p * every]
    else:
        for t in range(scales.size):
            at = t * every * columns
            row, part = rows[at : at + columns], source[t * columns : (t + 1) * columns]
            scale = scales[t]
            for c in range(columns):
                row[c] += scale * part[c]
                total += row[c]
    return total


@njit(fastmath=_SUMS)
def filter_sums(sums, taps, scales, columns, more, out):
    """Write the filtered sums, each times its row's scale, or add them; return the sum of all.

    Parameters
    ----------
    sums : (bits, T N) float32 or float64, C-order
    taps : (V, width) of the same type, C-order
        Newest step first, within it bit 0 first.
    scales : (V, T) of the same type, C-order
    columns : int
        N.
    more : bool
        Whether to add to what `out` holds.
    out : (m N,) of the same type
        Rows of N, output v of step t at row ``t V + v``; ``m <= T V``.

    Returns
    -------
    float
        Of the entries of `out`. Not finite if one is not.

    Notes
    -----
    ``2 T N V width`` flops.
    """
    bits, size = sums.shape
    V, width = taps.shape
    rows = max(1, _CHUNK // columns)
    steps = size // columns
    last = (width - 1) // bits * columns
    work = np.empty((V, rows * columns), out.dtype)
    total = 0.0
    for first in range(0, steps, rows):
        start = first * columns
        stop = min(first + rows, steps) * columns
        work[:, : stop - start] = 0
        i = 0
        if start >= last:  # nothing turns: three taps at once
            while i + 3 <= width:
                a = sums[i % bits, start - i // bits * columns :]
                b = sums[(i + 1) % bits, start - (i + 1) // bits * columns :]
                c = sums[(i + 2) % bits, start - (i + 2) // bits * columns :]
                for v in range(V):
                    target = work[v, : stop - start]
                    _add3(target, taps[v, i], a, taps[v, i + 1], b, taps[v, i + 2], c)
                i += 3
        while i < width:
            plane = sums[i % bits]
            lag = (i // bits) * columns % size
            turn = min(max(lag, start), stop)
            for v in range(V):
                tap = taps[v, i]
                # slices, because an index that might be negative is not vectorised
                _add(work[v, : turn - start], tap, plane[start + size - lag :])
                _add(work[v, turn - start : stop - start], tap, plane[turn - lag :])
            i += 1
        if not more:
            out[start * V : stop * V] = 0
        for v in range(V):
            left = (out.size // columns - v + V - 1) // V - first
            part = scales[v, first : first + min(rows, left)]
            total += _add_scaled(out[start * V + v * columns :], columns, part, work[v], V)
    return total


@njit(fastmath=_SUMS)
def _planes_of(y, scales, columns, more):
    """Return rows times their scales by output, (V, T N), and so many of each's first entries."""
    V, steps = scales.shape
    size, N = steps * columns, columns
    planes = np.zeros((V, size + more), y.dtype)
    for v in range(V):
        plane = planes[v]
        if N == 1:
            for t in range((y.size - v + V - 1) // V):
                plane[t] = scales[v, t] * y[t * V + v]
        else:
            for t in range((y.size // N - v + V - 1) // V):
                scale, at = scales[v, t], (t * V + v) * N
                part, row = plane[t * N : (t + 1) * N], y[at : at + N]
                for c in range(N):
                    part[c] = scale * row[c]
        for p in range(more):
            plane[size + p] = plane[p]
    return planes


@njit(fastmath=_SUMS)
def filter_back(y, taps, scales, columns, sums):
    """Write the sums that the transposed filter makes of rows, each times its scale.

    Parameters
    ----------
    y : (m N,) float32 or float64
        As `out` of `filter_sums`, of which this is the adjoint.
    taps : (V, width) of the same type, C-order
    scales : (V, T) of the same type, C-order
    columns : int
        N.
    sums : (bits, T N) of the same type, C-order, overwritten

    Notes
    -----
    ``2 T N V width`` flops.
    """
    bits, size = sums.shape
    V, width = taps.shape
    y = _planes_of(y, scales, columns, (width - 1) // bits * columns)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for r in range(bits):
            target = sums[r, start:stop]
            target[:] = 0
            i = r
            while i + 2 * bits < width:  # three taps at once
                at = start + i // bits * columns
                second, third = at + columns, at + 2 * columns
                for v in range(V):
                    a, b, c = y[v, at:], y[v, second:], y[v, third:]
                    _add3(target, taps[v, i], a, taps[v, i + bits], b, taps[v, i + 2 * bits], c)
                i += 3 * bits
            while i < width:
                at = start + i // bits * columns
                for v in range(V):
                    _add(target, taps[v, i], y[v, at:])
                i += bits
