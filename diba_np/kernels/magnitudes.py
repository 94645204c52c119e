"""Passes of the sign relaxation over a factor: blending, rank-one magnitudes, projection.

All arrays are (rows, k) float32 in C-order and read once a pass. Sums over the rows are made block
by block, `BLOCK` rows each, and added up in the order of the blocks, so every number of threads
gives the same bits. Fast-math only reorders sums; no comparison here decides about more than a
sign of the relaxation.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from diba_np.kernels._jit import njit

# rows of a block; fixed, because the order of summation follows from it
BLOCK = 64

_SUMS = {"reassoc", "contract", "nsz"}


@njit(fastmath=_SUMS)
def _blend_rows(X, Z, theta, U, q, p, part, start, stop):
    part[:] = 0
    rest = np.float32(1.0) - theta
    for i in range(start, stop):
        a = np.float32(0.0)
        for j in range(q.size):
            u = U[i, j] + theta * X[i, j] + rest * Z[i, j]
            U[i, j] = u
            a += abs(u) * q[j]
        p[i] = a
        for j in range(q.size):
            part[j] += a * abs(U[i, j])


@njit(fastmath=_SUMS)
def blend_magnitudes(X, Z, theta, U, q, p, parts):
    """Form ``Q = theta X + (1 - theta) Z + U`` in `U`, with the first power step on ``|Q|``.

    Parameters
    ----------
    X, Z : (rows, k) float32
    theta : float32
    U : (rows, k) float32, the scaled dual on entry, Q on return
    q : (k,) float32
    p : (rows,) float32, overwritten
        ``|Q| q``.
    parts : (ceil(rows / BLOCK), k) float32, overwritten
        ``|Q|^T p`` over each block of rows; their sum is the new q times ``|p|^2``.

    Notes
    -----
    One pass, O(rows k). naive: ``tests/naive.py::blend_magnitudes``.
    """
    for b in range(parts.shape[0]):
        stop = min(p.size, (b + 1) * BLOCK)
        _blend_rows(X, Z, theta, U, q, p, parts[b], b * BLOCK, stop)


@njit(fastmath=_SUMS, parallel=True)
def blend_magnitudes_par(X, Z, theta, U, q, p, parts):
    """`blend_magnitudes` with the blocks spread over threads; the same bits."""
    for b in prange(parts.shape[0]):
        stop = min(p.size, (b + 1) * BLOCK)
        _blend_rows(X, Z, theta, U, q, p, parts[b], b * BLOCK, stop)


@njit(fastmath=_SUMS)
def _power_rows(Q, q, p, part, start, stop):
    part[:] = 0
    for i in range(start, stop):
        a = np.float32(0.0)
        for j in range(q.size):
            a += abs(Q[i, j]) * q[j]
        p[i] = a
        for j in range(q.size):
            part[j] += a * abs(Q[i, j])


@njit(fastmath=_SUMS)
def power_magnitudes(Q, q, p, parts):
    """Make one power step on ``|Q|``.

    Parameters
    ----------
    Q : (rows, k) float32
    q, p, parts
        As in `blend_magnitudes`.

    Notes
    -----
    One pass, O(rows k). naive: ``tests/naive.py::power_magnitudes``.
    """
    for b in range(parts.shape[0]):
        _power_rows(Q, q, p, parts[b], b * BLOCK, min(p.size, (b + 1) * BLOCK))


@njit(fastmath=_SUMS, parallel=True)
def power_magnitudes_par(Q, q, p, parts):
    """`power_magnitudes` with the blocks spread over threads; the same bits."""
    for b in prange(parts.shape[0]):
        _power_rows(Q, q, p, parts[b], b * BLOCK, min(p.size, (b + 1) * BLOCK))


@njit(fastmath=False)
def _project_row(U, p, q, Z):
    for j in range(q.size):
        z = np.copysign(p * q[j], U[j])
        Z[j] = z
        U[j] -= z


@njit(fastmath=False)
def project_signs(U, p, q, Z):
    """Project Q: ``Z = sign(Q) * outer(p, q)``, dual ``U = Q - Z``.

    Parameters
    ----------
    U : (rows, k) float32, Q on entry, the scaled dual on return
    p : (rows,) float32, not negative
    q : (k,) float32, not negative
    Z : (rows, k) float32, overwritten

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::project_signs``.
    """
    for i in range(p.size):
        _project_row(U[i], p[i], q, Z[i])


@njit(fastmath=False, parallel=True)
def project_signs_par(U, p, q, Z):
    """`project_signs` with the rows spread over threads; the same bits."""
    for i in prange(p.size):
        _project_row(U[i], p[i], q, Z[i])


@njit(fastmath=_SUMS)
def _soften_rows(Z, X, c, N, part, start, stop):
    part[:] = 0
    keep = np.float32(1.0) - c
    for i in range(start, stop):
        for j in range(part.size):
            v = keep * Z[i, j] + c * X[i, j]
            N[i, j] = v
            part[j] += v * v


@njit(fastmath=_SUMS)
def soften(Z, X, c, N, parts):
    """Form ``N = (1 - c) Z + c X`` and the squares of its columns.

    Parameters
    ----------
    Z, X : (rows, k) float32
    c : float32
    N : (rows, k) float32, overwritten
    parts : (ceil(rows / BLOCK), k) float32, overwritten
        Sums of squares over each block of rows.

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::soften``.
    """
    for b in range(parts.shape[0]):
        _soften_rows(Z, X, c, N, parts[b], b * BLOCK, min(len(Z), (b + 1) * BLOCK))


@njit(fastmath=_SUMS, parallel=True)
def soften_par(Z, X, c, N, parts):
    """`soften` with the blocks spread over threads; the same bits."""
    for b in prange(parts.shape[0]):
        _soften_rows(Z, X, c, N, parts[b], b * BLOCK, min(len(Z), (b + 1) * BLOCK))


@njit(fastmath=_SUMS)
def _fit_row(X, Y, Z, U, weight):
    total = 0.0
    for j in range(X.size):
        total += X[j] * (Y[j] - (Z[j] - U[j]) + weight * X[j])
    return total


@njit(fastmath=_SUMS)
def explained(X, Y, Z, U, weight, out):
    """Give each row's share of ``<X, Y - (Z - U) + weight X>``.

    For ``X (G + weight I) = Y + Z - U`` with ``Y = A N`` and ``G = N^T N`` this is how much less
    than ``|A|^2`` the squared error ``|A - X N^T|^2`` is, without another product.

    Parameters
    ----------
    X, Y, Z, U : (rows, k) float32
    weight : float32
    out : (rows,) float64, overwritten

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::explained``.
    """
    for i in range(out.size):
        out[i] = _fit_row(X[i], Y[i], Z[i], U[i], weight)


@njit(fastmath=_SUMS, parallel=True)
def explained_par(X, Y, Z, U, weight, out):
    """`explained` with the rows spread over threads; the same bits."""
    for i in prange(out.size):
        out[i] = _fit_row(X[i], Y[i], Z[i], U[i], weight)
