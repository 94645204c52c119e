"""What products by tables share beside their tables: inputs, results, a check for infinities.

Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath={"reassoc"})
def zero_if_finite(values):
    """Return 0, or NaN if a value is not finite; a sum of some that overflows may count as one."""
    zero = values.dtype.type(0)
    total = zero
    for i in range(values.size):  # over the values themselves it would not be vectorized
        total += zero * values[i]
    return total


@njit(fastmath=False)
def cache_lines(n_rows, n_lines, like):
    """Return uninitialized (n_rows, n_lines, entries a line) of a type, from a cache line on."""
    entries = 64 // like.itemsize
    size = n_rows * n_lines * entries
    memory = np.empty(size + entries, dtype=like.dtype)
    skip = (-memory.ctypes.data) % 64 // like.itemsize
    return memory[skip : skip + size].reshape(n_rows, n_lines, entries)


@njit(fastmath=False)
def block_size(n, most):
    """Return into blocks of what size to cut `n`: as few as can be of `most`, and all as large."""
    return -(-n // max(1, -(-n // most)))


@njit(fastmath=False)
def padded(used, n_units, dtype):
    """Return ``15 * n_units`` entries, zeros from `used` on, to be filled.

    A function of its own: in a parallel one Numba would start its threads just for the zeros.
    """
    out = np.empty(15 * n_units, dtype=dtype)
    out[used:] = 0
    return out


@njit(fastmath=False)
def scaled(x, scale, n_units):
    """Return ``scale * x`` followed by zeros, ``15 * n_units`` in all."""
    out = padded(x.size, n_units, x.dtype)
    for j in range(x.size):
        out[j] = scale[j] * x[j]
    return out


@njit(fastmath=False)
def finish(sums, first, shift, total, scale, before, out):
    """Write ``out[first + i] = scale * (sums[i] - shift * total) + before``.

    The difference is left in `sums`, where it can be seen whether it is finite.
    """
    # 0 * total would be NaN where the total, which no row asked for, overflows
    offset = shift * total if shift != 0 else shift
    # slices: with offsets in the indices the loops would not be vectorized
    last = min(first + sums.size, scale.size)
    part, scale = out[first:last], scale[first:last]
    if before.size:
        before = before[first:last]
        for i in range(part.size):
            sums[i] -= offset
            part[i] = scale[i] * sums[i] + before[i]
    else:
        for i in range(part.size):
            sums[i] -= offset
            part[i] = scale[i] * sums[i]


@njit(fastmath=False)
def finish_rounded(sums, step, first, offset, weight, addend, scale, out):
    """Write ``out[first + i] = scale * (step * sums[i] + offset + weight * addend)``."""
    # slices: with offsets in the indices the loops would not be vectorized
    last = min(first + sums.size, scale.size)
    part, scale = out[first:last], scale[first:last]
    for i in range(part.size):
        part[i] = scale[i] * (step * np.float32(sums[i]) + offset)
    if addend.size:
        addend = addend[first:last]
        for i in range(part.size):
            part[i] += scale[i] * (weight * addend[i])
