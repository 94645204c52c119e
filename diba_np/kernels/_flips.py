"""Flips and walks over one row's bits, exact and incremental, for the search of rows and columns.

A row holds bits b, values ``y = b - shift`` and a scale s. With a gram G (k, k), a target c (k,)
and ``h = G y`` its error is ``s^2 y.h - 2 s y.c`` but for a constant. No fast-math: comparisons
decide.

Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np

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


# a bit that was flipped stays for this many moves, and up to `_SPREAD` - 1 more
_TENURE, _SPREAD = 11, 5


@njit(fastmath={"nnan", "nsz"})
def _move(delta, weight, closed, G_row, factor):
    """Bring `delta` up to date with a flip; return the least of those that are open."""
    best = np.inf
    for l in range(delta.size):
        d = delta[l] + factor * weight[l] * G_row[l]
        delta[l] = d
        best = min(best, d + closed[l])
    return best


@njit(fastmath=False)
def walk(bits, h, G, c, s, slack, moves, patience):
    """Walk one row's bits by the best open flip and keep the best point; returns its moves."""
    k = bits.size
    delta = np.empty(k)  # what a flip of l would add to the error
    weight = np.empty(k)  # s step_l
    closed = np.zeros(k)  # 0 for a bit that may flip, inf for one that did lately
    until = np.zeros(k, np.int64)
    ring = np.empty(_TENURE + _SPREAD, np.int64)  # the bits that may still be closed
    least = np.inf
    for l in range(k):
        weight[l] = s * (1.0 - 2.0 * bits[l])
        delta[l] = 2.0 * weight[l] * (s * h[l] - c[l]) + s * s * G[l, l]
        least = min(least, delta[l])
    size = 0
    now = 0.0  # error relative to the start
    best = 0.0
    best_at = 0
    made = 0
    while made < moves and made - best_at < patience:
        pick = -1
        # a closed bit is taken only for a new best
        for at in range(size):
            l = ring[at]
            if delta[l] < least and now + delta[l] < best - slack:
                pick = l
                least = delta[l]
        if pick < 0:
            if least == np.inf:
                break
            for l in range(k):
                if delta[l] + closed[l] == least:
                    pick = l
                    break
        made += 1
        # bits whose time is over open again
        kept = 0
        for at in range(size):
            l = ring[at]
            if until[l] > made and l != pick:
                ring[kept] = l
                kept += 1
            else:
                closed[l] = 0.0
        size = kept
        ring[size] = pick
        size += 1
        closed[pick] = np.inf
        until[pick] = made + _TENURE + (7 * made + pick) % _SPREAD
        now += least
        own = delta[pick]
        wanted = 2.0 * weight[pick]
        least = _move(delta, weight, closed, G[pick], wanted)
        delta[pick] = -own
        weight[pick] = -weight[pick]
        if now < best - slack:
            best = now
            best_at = made
            for l in range(k):
                bits[l] = 1 if (weight[l] < 0) != (s < 0) else 0
    return best_at
