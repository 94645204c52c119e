"""The fast Walsh-Hadamard transform, and rotations of a vector by it."""

import numpy as np

from diba_np.kernels._jit import njit

# entries whose rounds are done while they are in the cache
_BLOCK = 1 << 12


@njit(fastmath=False)
def _rounds(x, span):
    """Do the rounds from a span on, two at once."""
    size = x.size
    while 4 * span <= size:
        for start in range(0, size, 4 * span):
            p, q = x[start : start + span], x[start + span : start + 2 * span]
            r, s = x[start + 2 * span : start + 3 * span], x[start + 3 * span : start + 4 * span]
            for i in range(span):
                a, b, c, d = p[i] + q[i], p[i] - q[i], r[i] + s[i], r[i] - s[i]
                p[i], q[i], r[i], s[i] = a + c, b + d, a - c, b - d
        span *= 4
    if span < size:
        upper, lower = x[:span], x[span:]
        for i in range(span):
            a, b = upper[i], lower[i]
            upper[i], lower[i] = a + b, a - b


@njit(fastmath=False)
def hadamard(x, columns):
    """Multiply with the Hadamard matrix of order P, entries 1 and -1 (Sylvester's), in place.

    Parameters
    ----------
    x : (P N,) float32 or float64, modified in place
        A (P, N) matrix, row after row; P is a power of two.
    columns : int
        N.

    Notes
    -----
    ``N P log2 P`` additions.
    """
    size = x.size
    if size == 0:
        return
    span = columns
    if columns == 1 and size >= 8:
        for at in range(0, size, 8):  # three rounds at once, in registers
            a0 = x[at] + x[at + 1]
            a1 = x[at] - x[at + 1]
            a2 = x[at + 2] + x[at + 3]
            a3 = x[at + 2] - x[at + 3]
            a4 = x[at + 4] + x[at + 5]
            a5 = x[at + 4] - x[at + 5]
            a6 = x[at + 6] + x[at + 7]
            a7 = x[at + 6] - x[at + 7]
            b0, b2 = a0 + a2, a0 - a2
            b1, b3 = a1 + a3, a1 - a3
            b4, b6 = a4 + a6, a4 - a6
            b5, b7 = a5 + a7, a5 - a7
            x[at], x[at + 4] = b0 + b4, b0 - b4
            x[at + 1], x[at + 5] = b1 + b5, b1 - b5
            x[at + 2], x[at + 6] = b2 + b6, b2 - b6
            x[at + 3], x[at + 7] = b3 + b7, b3 - b7
        span = 8
    near = span
    while 2 * near <= min(size, _BLOCK):
        near *= 2
    for start in range(0, size, near):
        _rounds(x[start : start + near], span)
    _rounds(x, near)


@njit(fastmath=False)
def _mix(source, factor, target):
    """Write the rows of (q, P), flat, mixed by the transpose of a factor (q, q)."""
    q = len(factor)
    steps = source.size // q
    for i in range(q):
        row = target[i * steps : (i + 1) * steps]
        row[:] = 0
        j = 0
        while j + 3 <= q:  # three at once
            a, b, c = source[j * steps :], source[(j + 1) * steps :], source[(j + 2) * steps :]
            f, g, h = factor[j, i], factor[j + 1, i], factor[j + 2, i]
            for p in range(steps):
                row[p] = ((row[p] + f * a[p]) + g * b[p]) + h * c[p]
            j += 3
        while j < q:
            a, f = source[j * steps :], factor[j, i]
            for p in range(steps):
                row[p] += f * a[p]
            j += 1


@njit(fastmath=False)
def rotate_vector(x, signs, factor, back, room, out):
    """Multiply a vector with ``(H x Q) diag(signs)``, or with the transpose of that.

    Parameters
    ----------
    x : (n,) float32 or float64
    signs : (n,) of the same type
    factor : (q, q) of the same type, C-order
        ``Q^T``; to go back Q. H is the Hadamard matrix of order n / q, a power of two.
    back : bool
        Whether to multiply with the transpose.
    room, out : (n,) of the same type, overwritten

    Notes
    -----
    ``n (log2(n / q) + 2 q)`` flops.
    """
    q = len(factor)
    steps = x.size // q
    if 1 < q < steps:  # as (q, P), because rows of few entries are not vectorised
        for i in range(q):
            row = out[i * steps : (i + 1) * steps]
            for p in range(steps):
                row[p] = x[p * q + i] if back else signs[p * q + i] * x[p * q + i]
        _mix(out, factor, room)
        for i in range(q):
            row = room[i * steps : (i + 1) * steps]
            hadamard(row, 1)
            for p in range(steps):
                out[p * q + i] = signs[p * q + i] * row[p] if back else row[p]
        return
    if back:
        out[:] = x
    else:
        for i in range(x.size):
            out[i] = signs[i] * x[i]
    if q == 1:
        for i in range(x.size):
            out[i] *= factor[0, 0]
    else:
        mixed = np.empty(q, x.dtype)
        for start in range(0, x.size, q):
            part = out[start : start + q]
            mixed[:] = 0
            for j in range(q):
                value = part[j]
                for i in range(q):
                    mixed[i] += value * factor[j, i]
            part[:] = mixed
    hadamard(out, q)
    if back:
        for i in range(x.size):
            out[i] *= signs[i]
