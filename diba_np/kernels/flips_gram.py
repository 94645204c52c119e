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

from diba_np.kernels._flips import flip_fixed, flip_joint, walk  # _flips.py 72041db610ec
from diba_np.kernels._jit import njit

# signature of sweep_columns_fixed: (bits u1[:,::1], h f8[:,::1], P f8[:,::1], R f8[:,::1],
#                      H f8[:,::1], scale f8[::1], slack f8[::1], passes i8, flips i8[::1])
# sweep_columns_joint takes shift f8 after these; tabu_columns moves i8 for passes, and after these
# shift f8, patience i8


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
    Time O(b k) a pass, O(k) a flip, O(b k) a column that changed.
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
def tabu_columns(bits, h, P, R, H, scale, slack, moves, flips, shift, patience):
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
    patience : int
        Moves without a new best after which a column is left.

    Notes
    -----
    Time O(k) a move, O(k^2) where a scale moves, O(b k) a column.
    naive: ``tests/naive.py::tabu_columns``.
    """
    c = np.empty(P.shape[0])
    old = np.empty(P.shape[0])
    before = np.empty(P.shape[0], np.uint8)
    floor = _floor(P)
    for j in range(bits.shape[0]):
        s = scale[j]
        _target(R[j], h[j], H[j, j], s, c)
        old[:] = s * h[j]
        p, q = _explained(bits[j], h[j], c, shift)
        if q > floor and p != 0.0:
            s = p / q
        least = slack[j] / H[j, j]
        before[:] = bits[j]
        flips[j] = 0
        if s != 0.0:
            flips[j] = walk(bits[j], h[j], P, c, s, least, moves, patience)
        for l in range(before.size):
            if before[l] != bits[j, l]:
                step = 1.0 - 2.0 * before[l]
                for at in range(before.size):
                    h[j, at] += step * P[l, at]
        p, q = _explained(bits[j], h[j], c, shift)
        if q > floor:
            s = p / q
        scale[j] = s
        _pass_on(R, H, j, h[j], s, old)
