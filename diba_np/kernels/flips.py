"""One-bit improvement tests and walks for one side of a factorization, exact and incremental.

One side is a set of independent rows. Row i holds bits b, values ``y = b - shift`` and a scale s;
with ``G = M M^T`` (k, k) and ``c = M a_i`` (k,) its squared error is

    E_i = |a_i|^2 - 2 s y.c + s^2 y^T G y.

The gradient part ``h = G y`` is kept current: a flip of bit j changes y_j by
``step = 1 - 2 b_j`` and h by ``step G[j]``, so a test costs O(1) and an accepted flip O(k).
Rows share nothing that is written: blocks of them may run side by side. No fast-math here but what
leaves each result as it is: comparisons decide.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._flips import flip_fixed, flip_joint, walk  # _flips.py 72041db610ec
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
    """
    for i in range(bits.shape[0]):
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
    Time O(m k) a pass and O(k) a flip. naive: ``tests/naive.py::sweep_joint``.
    """
    for i in range(bits.shape[0]):
        flips[i], p, q = flip_joint(bits[i], h[i], G, C[i], shift, slack[i], passes)
        if q > 0.0:
            scale[i] = p / q


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
    row's mean in place, which a single 0/1 flip cannot; a walk makes longer chains.
    """
    for i in range(bits.shape[0]):
        if scale[i] != 0.0:
            flips[i] = walk(bits[i], h[i], G, C[i], scale[i], slack[i], moves, patience)
        else:
            flips[i] = 0


@njit(fastmath=False)
def update_forms(before, bits, h, G, C, p, q):
    """Bring ``p = y.c`` and ``q = y^T G y`` of every row up to date with bits that have flipped.

    Parameters
    ----------
    before, bits : (m, k) uint8, C-order
        What the bits were, and what they are.
    h : (m, k) float64, C-order
        ``(before - shift) @ G``.
    G : (k, k) float64, C-order
    C : (m, k) float64, C-order
    p, q : (m,) float64, modified in place

    Notes
    -----
    Time O(k + F^2) a row with F flipped bits, where the forms themselves take O(k^2). naive:
    ``tests/naive.py::update_forms``.
    """
    flipped = np.empty(bits.shape[1], dtype=np.int64)
    for i in range(bits.shape[0]):
        size = 0
        for j in range(bits.shape[1]):
            if bits[i, j] != before[i, j]:
                flipped[size] = j
                size += 1
        for a in range(size):
            j = flipped[a]
            step = 1.0 - 2.0 * before[i, j]
            others = 0.0
            for b in range(a):
                others += (1.0 - 2.0 * before[i, flipped[b]]) * G[j, flipped[b]]
            p[i] += step * C[i, j]
            q[i] += 2.0 * step * (h[i, j] + others) + G[j, j]
