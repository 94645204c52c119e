"""Exact flips where a Gram matrix couples columns of B2: one column after another, in blocks.

Rows of B1 that weights of the outputs couple are the columns of the transposed problem.

With the Gram matrix H (n, n) of the inputs, ``P = D2 U^T W U D2`` (k, k) and V = D3 (B2 - shift)^T
(n, k) the objective is, but for a constant,

    E = sum_ij H_ij v_i^T P v_j - 2 sum_j v_j . c_j,      c_j the row j of (D2 U^T W A H)^T.

For column j alone, with values ``y = b - shift``, scale s (``v_j = s y``) and the running
``r_j = c_j - P sum_i H_ij v_i`` (minus half the gradient with respect to v_j), it is the error of
a single independent row with gram P and target ``r_j / H_jj + s P y``, times H_jj. A search over
that row keeps ``h = P y`` current at O(k) a flip; what it changed, ``P (v_new - v_old)``, is then
free and goes to the columns of the block that are still to come. Between blocks r is made afresh
by matrix products.

Columns depend on those before them, so these kernels have no parallel twins. No fast-math where
comparisons decide.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._flips import flip, flip_fixed, flip_joint  # _flips.py ead85482bef7
from diba_np.kernels._jit import njit

# signature of sweep_columns_fixed: (bits u1[:,::1], h f8[:,::1], P f8[:,::1], R f8[:,::1],
#                      H f8[:,::1], scale f8[::1], slack f8[::1], passes i8, flips i8[::1])
# sweep_columns_joint takes shift f8 after these; tabu_columns moves i8 for passes, and after these
# shift f8, tenure i8, patience i8


@njit(fastmath=False)
def _explained(bits, h, c, shift):
    """Return ``p = y.c`` and ``q = y^T P y`` of one column."""
    p = 0.0
    q = 0.0
    for j in range(bits.size):
        p += (bits[j] - shift) * c[j]
        q += (bits[j] - shift) * h[j]
    return p, q


@njit(fastmath=False)
def _tabu(bits, h, P, c, s, slack, moves, tenure, patience):
    """Tabu search of one column at a fixed scale; leaves the best bits found, returns its flips.

    Every move flips the bit that does best, even if the error rises, and holds it for a while;
    a held bit may move where that beats the best error so far.
    """
    k = bits.size
    delta = np.empty(k)  # what a flip of l would add to the error
    weight = np.empty(k)  # s step_l
    held = np.zeros(k, np.int64)  # first move at which l is free again
    trail = np.empty(moves, np.int64)
    for l in range(k):
        weight[l] = s * (1.0 - 2.0 * bits[l])
        delta[l] = 2.0 * weight[l] * (s * h[l] - c[l]) + s * s * P[l, l]
    now = 0.0
    best = 0.0
    kept = 0  # moves of the trail that led to the best
    t = 0
    while t < moves and t - kept < patience:
        pick = -1
        least = np.inf
        for l in range(k):
            if delta[l] < least and (held[l] <= t or now + delta[l] < best - slack):
                least = delta[l]
                pick = l
        if pick < 0:
            break
        factor = 2.0 * weight[pick]
        for l in range(k):
            delta[l] += factor * weight[l] * P[pick, l]
        delta[pick] = -least
        weight[pick] = -weight[pick]
        now += least
        held[pick] = t + tenure + 1 + (7 * t + pick) % 5
        trail[t] = pick
        t += 1
        if now < best - slack:
            best = now
            kept = t
    for i in range(kept):
        flip(bits, h, P, trail[i])
    return kept


@njit(fastmath=False)
def _floor(P):
    """Return the ``y^T P y`` up to which a column counts as empty."""
    largest = 0.0
    for l in range(P.shape[0]):
        largest = max(largest, P[l, l])
    return 1e-12 * largest


@njit(fastmath=False)
def _target(R, h, diagonal, s, c):
    """Write the target of one column alone, ``r / H_jj + s P y``, into c."""
    for l in range(c.size):
        c[l] = R[l] / diagonal + s * h[l]


@njit(fastmath=False)
def _pass_on(R, H, j, h, s, old):
    """Subtract ``H_ij P (v_new - v_old)`` from the columns i of the block after j."""
    for l in range(h.size):
        old[l] = s * h[l] - old[l]
    for i in range(j + 1, R.shape[0]):
        coupling = H[i, j]
        for l in range(h.size):
            R[i, l] -= coupling * old[l]


@njit(fastmath=False)
def sweep_columns_fixed(bits, h, P, R, H, scale, slack, passes, flips):
    """Flip single bits of a block of columns, at fixed scales, while that lowers the error.

    Parameters
    ----------
    bits : (b, k) uint8, C-order, modified in place
        The block's columns of B2, one a row.
    h : (b, k) float64, C-order, modified in place
        ``(bits - shift) @ P`` on entry and on return.
    P : (k, k) float64, C-order
        ``D2 U^T W U D2`` with U = D1 (B1 - shift).
    R : (b, k) float64, C-order, modified in place
        ``(D2 U^T W (A - A_hat) H)^T`` of the block on entry; used up.
    H : (b, b) float64, C-order
        The block of the Gram matrix; its diagonal must be positive.
    scale : (b,) float64
        d3 of the block.
    slack : (b,) float64
        A flip must lower the error by more than this.
    passes : int
        Most passes over the bits of a column; it is left when a pass flips nothing.
    flips : (b,) int64, overwritten
        Flips made in each column.

    Notes
    -----
    Time O(b k) a pass, O(k) a flip, O(b k) a column that changed. METHODS 1.5.
    naive: ``tests/naive.py::sweep_columns_fixed``.
    """
    c = np.empty(P.shape[0])
    old = np.empty(P.shape[0])
    for j in range(bits.shape[0]):
        s = scale[j]
        _target(R[j], h[j], H[j, j], s, c)
        old[:] = s * h[j]
        flips[j] = flip_fixed(bits[j], h[j], P, c, s, slack[j] / H[j, j], passes)
        if flips[j]:
            _pass_on(R, H, j, h[j], s, old)


@njit(fastmath=False)
def sweep_columns_joint(bits, h, P, R, H, scale, slack, passes, flips, shift):
    """Flip single bits of a block of columns while that lowers the error at the best scale.

    Parameters
    ----------
    bits, h, P, R, H, slack, passes, flips
        As in `sweep_columns_fixed`.
    scale : (b,) float64, modified in place
        Set to the best value of each column, the others given; kept where the column is empty.
    shift : float
        Alphabet shift: the bits stand for ``-shift`` and ``1 - shift``.

    Notes
    -----
    Time O(b k) a pass, O(k) a flip, O(b k) a column.
    naive: ``tests/naive.py::sweep_columns_joint``.
    """
    c = np.empty(P.shape[0])
    old = np.empty(P.shape[0])
    floor = _floor(P)
    for j in range(bits.shape[0]):
        s = scale[j]
        _target(R[j], h[j], H[j, j], s, c)
        old[:] = s * h[j]
        flips[j], p, q = flip_joint(bits[j], h[j], P, c, shift, slack[j] / H[j, j], passes)
        if q > floor:
            scale[j] = p / q
        _pass_on(R, H, j, h[j], scale[j], old)


@njit(fastmath=False)
def tabu_columns(bits, h, P, R, H, scale, slack, moves, flips, shift, tenure, patience):
    """Search each column of a block by tabu moves, its scale at the optimum before and after.

    Parameters
    ----------
    bits, h, P, R, H, slack, flips
        As in `sweep_columns_fixed`.
    scale : (b,) float64, modified in place
        As in `sweep_columns_joint`.
    moves : int
        Most moves a column.
    shift : float
        Alphabet shift.
    tenure : int
        Moves for which a flipped bit is held, up to 5 more.
    patience : int
        Moves without a new best after which a column is left.

    Notes
    -----
    Time O(k) a move, O(k^2) where a scale moves, O(b k) a column.
    naive: ``tests/naive.py::tabu_columns``.
    """
    c = np.empty(P.shape[0])
    old = np.empty(P.shape[0])
    floor = _floor(P)
    for j in range(bits.shape[0]):
        s = scale[j]
        _target(R[j], h[j], H[j, j], s, c)
        old[:] = s * h[j]
        p, q = _explained(bits[j], h[j], c, shift)
        if q > floor and p != 0.0:
            s = p / q
        least = slack[j] / H[j, j]
        flips[j] = _tabu(bits[j], h[j], P, c, s, least, moves, tenure, patience)
        p, q = _explained(bits[j], h[j], c, shift)
        if q > floor:
            s = p / q
        scale[j] = s
        _pass_on(R, H, j, h[j], s, old)
