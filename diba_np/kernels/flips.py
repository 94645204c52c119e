"""One-bit and two-bit improvement tests for one side of a factorization, exact and incremental.

One side is a set of independent rows. Row i holds bits b, values ``y = b - shift`` and a scale s;
with ``G = M M^T`` (k, k) and ``c = M a_i`` (k,) its squared error is

    E_i = |a_i|^2 - 2 s y.c + s^2 y^T G y.

The gradient part ``h = G y`` is kept current: a flip of bit j changes y_j by
``step = 1 - 2 b_j`` and h by ``step G[j]``, so a test costs O(1) and an accepted flip O(k).
Rows are spread over threads and share nothing that is written, so every number of threads gives
the same bits. No fast-math here but what leaves each result as it is: comparisons decide.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from diba_np.kernels._jit import njit

# signature of all three: (bits u1[:,::1], h f8[:,::1], G f8[:,::1], C f8[:,::1], scale f8[::1],
#                          slack f8[::1], passes i8, flips i8[::1])


@njit(fastmath=False)
def _flip(bits, h, G, j):
    """Flip bit j of one row and bring ``h = G y`` up to date; O(k)."""
    step = 1.0 - 2.0 * bits[j]
    bits[j] = 1 - bits[j]
    for l in range(h.size):
        h[l] += step * G[j, l]


@njit(fastmath=False)
def _row_fixed(bits, h, G, c, s, slack, passes):
    """Single flips of one row at a fixed scale until none lowers its error; returns the flips."""
    total = 0
    for _ in range(passes):
        found = 0
        for j in range(bits.size):
            step = 1.0 - 2.0 * bits[j]
            # E(flipped) - E = s^2 (2 step h_j + G_jj) - 2 s step c_j
            if s * (s * (2.0 * step * h[j] + G[j, j]) - 2.0 * step * c[j]) < -slack:
                _flip(bits, h, G, j)
                found += 1
        total += found
        if found == 0:
            break
    return total


@njit(fastmath=False)
def sweep_fixed(bits, h, G, C, scale, slack, passes, flips):
    """Flip single bits of every row, at fixed scales, while that lowers the error.

    Parameters
    ----------
    bits : (m, k) uint8, C-order, modified in place
    h : (m, k) float64, C-order, modified in place
        ``(bits - shift) @ G`` on entry and on return.
    G : (k, k) float64, C-order
        Gram matrix ``M M^T``.
    C : (m, k) float64, C-order
        ``A M^T``.
    scale : (m,) float64
        The row scales s.
    slack : (m,) float64
        A flip must lower the row's squared error by more than this.
    passes : int
        Most passes over the bits of a row; a row is left when a pass flips nothing.
    flips : (m,) int64, overwritten
        Flips made in each row.

    Notes
    -----
    Time O(m k) a pass and O(k) a flip. naive: ``tests/naive.py::sweep_fixed``.
    METHODS: "fixed scale".
    """
    for i in range(bits.shape[0]):
        flips[i] = _row_fixed(bits[i], h[i], G, C[i], scale[i], slack[i], passes)


@njit(fastmath=False, parallel=True)
def sweep_fixed_par(bits, h, G, C, scale, slack, passes, flips):
    """`sweep_fixed` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        flips[i] = _row_fixed(bits[i], h[i], G, C[i], scale[i], slack[i], passes)


@njit(fastmath=False)
def _row_joint(bits, h, G, c, shift, slack, passes):
    """Single flips of one row, the scale optimal before and after; returns (flips, p, q)."""
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
                _flip(bits, h, G, j)
                p = p_new
                q = q_new
                found += 1
        total += found
        if found == 0:
            break
    return total, p, q


@njit(fastmath=False)
def sweep_joint(bits, h, G, C, scale, slack, passes, flips, shift):
    """Flip single bits of every row while that lowers the error at the row's best scale.

    Stronger than `sweep_fixed`: a flip is judged by ``max_s`` of the explained energy,
    ``p^2 / q`` with ``p = y.c`` and ``q = y^T G y``.

    Parameters
    ----------
    bits, h, G, C, slack, passes, flips
        As in `sweep_fixed`.
    scale : (m,) float64, modified in place
        Set to ``p / q``; kept where q vanishes.
    shift : float
        Alphabet shift: the bits stand for ``-shift`` and ``1 - shift``.

    Notes
    -----
    Time O(m k) a pass and O(k) a flip. naive: ``tests/naive.py::sweep_joint``. METHODS: "joint".
    """
    for i in range(bits.shape[0]):
        flips[i], p, q = _row_joint(bits[i], h[i], G, C[i], shift, slack[i], passes)
        if q > 0.0:
            scale[i] = p / q


@njit(fastmath=False, parallel=True)
def sweep_joint_par(bits, h, G, C, scale, slack, passes, flips, shift):
    """`sweep_joint` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        flips[i], p, q = _row_joint(bits[i], h[i], G, C[i], shift, slack[i], passes)
        if q > 0.0:
            scale[i] = p / q


@njit(fastmath={"nnan", "nsz"})
def _smallest(delta, weight, G_row, factor):
    """Return ``min_l delta_l + factor weight_l G_row_l``; a plain reduction, so it vectorizes."""
    best = np.inf
    for l in range(delta.size):
        best = min(best, delta[l] + factor * weight[l] * G_row[l])
    return best


@njit(fastmath=False)
def _row_pairs(bits, h, G, c, s, slack, passes):
    """Single flips, else the best partner flip, at a fixed scale; returns the flips of one row."""
    k = bits.size
    delta = np.empty(k)  # what a flip of l alone would add to the error
    weight = np.empty(k)  # s step_l
    for l in range(k):
        weight[l] = s * (1.0 - 2.0 * bits[l])
        delta[l] = 2.0 * weight[l] * (s * h[l] - c[l]) + s * s * G[l, l]
    total = 0
    for _ in range(passes):
        found = 0
        for j in range(k):
            partner = -1
            if delta[j] >= -slack:
                # E changes by delta_j + delta_l + 2 w_j w_l G_jl when j and l flip together;
                # j itself is put out of reach while its partner is sought
                own = delta[j]
                delta[j] = np.inf
                best = _smallest(delta, weight, G[j], 2.0 * weight[j])
                if own + best < -slack:
                    for l in range(k):
                        if delta[l] + 2.0 * weight[j] * weight[l] * G[j, l] == best:
                            partner = l
                            break
                delta[j] = own
                if partner < 0:
                    continue
            flip = j
            while flip >= 0:
                factor = 2.0 * weight[flip]
                own = delta[flip]
                for l in range(k):
                    delta[l] += factor * weight[l] * G[flip, l]
                delta[flip] = -own
                weight[flip] = -weight[flip]
                _flip(bits, h, G, flip)
                found += 1
                flip, partner = partner, -1
        total += found
        if found == 0:
            break
    return total


@njit(fastmath=False)
def sweep_pairs(bits, h, G, C, scale, slack, passes, flips):
    """Flip single bits, or pairs where no single flip helps, at fixed scales.

    Every bit is tried once a pass. If its own flip does not lower the row's error, the partner
    that does best together with it is sought among all other bits.

    Parameters
    ----------
    bits, h, G, C, scale, slack, passes, flips
        As in `sweep_fixed`.

    Notes
    -----
    Time O(m k^2) a pass. naive: ``tests/naive.py::sweep_pairs``. Two flips of opposite sign leave
    the row's mean in place, which a single 0/1 flip cannot (METHODS 1.3).
    """
    for i in range(bits.shape[0]):
        flips[i] = _row_pairs(bits[i], h[i], G, C[i], scale[i], slack[i], passes)


@njit(fastmath=False, parallel=True)
def sweep_pairs_par(bits, h, G, C, scale, slack, passes, flips):
    """`sweep_pairs` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        flips[i] = _row_pairs(bits[i], h[i], G, C[i], scale[i], slack[i], passes)
