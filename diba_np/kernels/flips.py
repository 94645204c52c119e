"""One-bit improvement tests and walks for one side of a factorization, exact and incremental.

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

from diba_np.kernels._flips import flip_fixed, flip_joint  # _flips.py ead85482bef7
from diba_np.kernels._jit import njit

# signature of sweep_fixed: (bits u1[:,::1], h f8[:,::1], G f8[:,::1], C f8[:,::1], scale f8[::1],
#                            slack f8[::1], passes i8, flips i8[::1])
# sweep_joint takes shift f8 after these; sweep_tabu moves i8 for passes, patience i8 after these


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
        flips[i] = flip_fixed(bits[i], h[i], G, C[i], scale[i], slack[i], passes)


@njit(fastmath=False, parallel=True)
def sweep_fixed_par(bits, h, G, C, scale, slack, passes, flips):
    """`sweep_fixed` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        flips[i] = flip_fixed(bits[i], h[i], G, C[i], scale[i], slack[i], passes)


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
        flips[i], p, q = flip_joint(bits[i], h[i], G, C[i], shift, slack[i], passes)
        if q > 0.0:
            scale[i] = p / q


@njit(fastmath=False, parallel=True)
def sweep_joint_par(bits, h, G, C, scale, slack, passes, flips, shift):
    """`sweep_joint` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        flips[i], p, q = flip_joint(bits[i], h[i], G, C[i], shift, slack[i], passes)
        if q > 0.0:
            scale[i] = p / q


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
def _row_tabu(bits, h, G, c, s, slack, moves, patience):
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


@njit(fastmath=False)
def sweep_tabu(bits, h, G, C, scale, slack, moves, flips, patience):
    """Walk every row by the best flip, uphill too, at fixed scales; keep the best bits met.

    A bit that was flipped is closed for 11 to 15 moves unless it leads to a new best, so the walk
    leaves a local minimum. Rows never get worse.

    Parameters
    ----------
    bits, h, G, C, scale, slack
        As in `sweep_fixed`, except that h is left as it was on entry.
    moves : int
        Most moves of a row.
    flips : (m,) int64, overwritten
        Moves that led to the best bits of each row; 0 where nothing better was met.
    patience : int
        Moves without a new best after which a row is left.

    Notes
    -----
    Time O(k) a move. naive: ``tests/naive.py::sweep_tabu``. Two flips of opposite sign leave the
    row's mean in place, which a single 0/1 flip cannot (METHODS 1.3); a walk makes longer chains.
    """
    for i in range(bits.shape[0]):
        if scale[i] != 0.0:
            flips[i] = _row_tabu(bits[i], h[i], G, C[i], scale[i], slack[i], moves, patience)
        else:
            flips[i] = 0


@njit(fastmath=False, parallel=True)
def sweep_tabu_par(bits, h, G, C, scale, slack, moves, flips, patience):
    """`sweep_tabu` with the rows spread over threads; the same bits."""
    for i in prange(bits.shape[0]):
        if scale[i] != 0.0:
            flips[i] = _row_tabu(bits[i], h[i], G, C[i], scale[i], slack[i], moves, patience)
        else:
            flips[i] = 0
