"""The fast Walsh-Hadamard transform, and rotations of a vector by it."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit

# entries whose rounds are done while they are in the cache
_BLOCK = 1 << 12

_LANES = 16  # entries of a line, whose first rounds are done in registers


@intrinsic
def _rounds_in_lines(typingctx, address, n_lines, zero):
    """Do the rounds of spans 1 to 8 in lines of 16 entries, of the type of `zero`."""
    signature = types.void(types.intp, types.intp, zero)
    element, size = (_ir.F32, 4) if zero == types.float32 else (_ir.F64, 8)
    line = _ir.vector(element, _LANES)

    def codegen(context, builder, signature, args):
        start, n_lines, _ = args

        def body(i, carried):
            here = builder.add(start, builder.mul(i, _ir.index(size * _LANES)))
            x = _ir.load(builder, here, line, size)
            for span in (1, 2, 4, 8):
                order = [lane ^ span for lane in range(_LANES)]
                signs = [-1.0 if lane & span else 1.0 for lane in range(_LANES)]
                pairs = ir.Constant(_ir.vector(_ir.I32, _LANES), order)
                other = builder.shuffle_vector(x, x, pairs)
                x = builder.fadd(other, builder.fmul(x, ir.Constant(line, signs)))
            _ir.store(builder, x, here, size)
            return carried

        _ir.counted_loop(builder, n_lines, [], body)
        return context.get_dummy_value()

    return signature, codegen


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
    if columns == 1 and size >= _LANES:
        _rounds_in_lines(x.ctypes.data, size // _LANES, x.dtype.type(0))
        span = _LANES
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
def _part(x, q, out):
    """Write (P, q), flat, as (q, P)."""
    steps = x.size // q
    if q == 3:  # a distance that is known is vectorised
        a, b, c = out[:steps], out[steps : 2 * steps], out[2 * steps :]
        for p in range(steps):
            a[p] = x[3 * p]
            b[p] = x[3 * p + 1]
            c[p] = x[3 * p + 2]
        return
    for i in range(q):
        row = out[i * steps : (i + 1) * steps]
        for p in range(steps):
            row[p] = x[p * q + i]


@njit(fastmath=False)
def _join(x, q, out):
    """Write (q, P), flat, as (P, q)."""
    steps = x.size // q
    if q == 3:
        a, b, c = x[:steps], x[steps : 2 * steps], x[2 * steps :]
        for p in range(steps):
            out[3 * p] = a[p]
            out[3 * p + 1] = b[p]
            out[3 * p + 2] = c[p]
        return
    for i in range(q):
        row = x[i * steps : (i + 1) * steps]
        for p in range(steps):
            out[p * q + i] = row[p]


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
        if back:
            _part(x, q, out)
        else:
            for p in range(x.size):
                room[p] = signs[p] * x[p]
            _part(room, q, out)
        _mix(out, factor, room)
        for i in range(q):
            hadamard(room[i * steps : (i + 1) * steps], 1)
        _join(room, q, out)
        if back:
            for p in range(x.size):
                out[p] *= signs[p]
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
