"""Single flips of one row's bits, exact and incremental, for the search of rows and of columns.

A row holds bits b, values ``y = b - shift`` and a scale s. With a gram G (k, k), a target c (k,)
and ``h = G y`` its error is ``s^2 y.h - 2 s y.c`` but for a constant. No fast-math: comparisons
decide.

Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def flip(bits, h, G, j):
    """Flip bit j of a row and bring ``h = G y`` up to date; O(k)."""
    step = 1.0 - 2.0 * bits[j]
    bits[j] = 1 - bits[j]
    for l in range(h.size):
        h[l] += step * G[j, l]


@njit(fastmath=False)
def flip_fixed(bits, h, G, c, s, slack, passes):
    """Single flips of a row at a fixed scale until none lowers its error; returns the flips."""
    total = 0
    for _ in range(passes):
        found = 0
        for j in range(bits.size):
            step = 1.0 - 2.0 * bits[j]
            # E(flipped) - E = s^2 (2 step h_j + G_jj) - 2 s step c_j
            if s * (s * (2.0 * step * h[j] + G[j, j]) - 2.0 * step * c[j]) < -slack:
                flip(bits, h, G, j)
                found += 1
        total += found
        if found == 0:
            break
    return total


@njit(fastmath=False)
def flip_joint(bits, h, G, c, shift, slack, passes):
    """Single flips of a row, the scale optimal before and after; returns (flips, p, q)."""
    # not by a function of its own: LLVM inlines that in another order
    p = 0.0
    q = 0.0
    for j in range(bits.size):
        p += (bits[j] - shift) * c[j]
        q += (bits[j] - shift) * h[j]
    total = 0
    for _ in range(passes):
        found = 0
        for j in range(bits.size):
            step = 1.0 - 2.0 * bits[j]
            q_new = q + 2.0 * step * h[j] + G[j, j]
            p_new = p + step * c[j]
            # the error is |a|^2 - p^2/q; a row whose q vanishes explains nothing
            now = p * p / q if q > 1e-12 * G[j, j] else 0.0
            then = p_new * p_new / q_new if q_new > 1e-12 * G[j, j] else 0.0
            if then > now + slack:
                flip(bits, h, G, j)
                p = p_new
                q = q_new
                found += 1
        total += found
        if found == 0:
            break
    return total, p, q
