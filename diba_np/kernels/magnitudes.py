"""Passes of the sign relaxation over a factor: points, blending, rank-one magnitudes.

One array Q holds two: the projection ``Z = sign(Q) * outer(p, q)`` and the scaled dual ``Q - Z``.

All arrays are (rows, k) float32 in C-order and read once a pass. Sums over the rows are made block
by block, `BLOCK` rows each, and added up in the order of the blocks, so that runs of whole blocks
can be handed to threads and give the same bits. Fast-math only reorders sums; no comparison here
decides about more than a sign of the relaxation.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit

# rows of a block; fixed, because the order of summation follows from it
BLOCK = 64

_SUMS = {"reassoc", "contract", "nsz"}


@njit(fastmath=False)
def _point_row(Q, p, q, rho, Y, out):
    for j in range(q.size):
        z = np.copysign(p * q[j], Q[j])
        out[j] = rho * (z - (Q[j] - z)) + Y[j]


@njit(fastmath=False)
def regression_point(Q, p, q, rho, Y, out):
    """Form ``rho (Z - U) + Y``, what a regression is solved for.

    Parameters
    ----------
    Q : (rows, k) float32
        Stands for ``Z = sign(Q) * outer(p, q)`` and the scaled dual ``U = Q - Z``.
    p : (rows,) float32, not negative
    q : (k,) float32, not negative
    rho : float32
    Y : (rows, k) float32
    out : (rows, k) float32, overwritten

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::regression_point``.
    """
    for i in range(p.size):
        _point_row(Q[i], p[i], q, rho, Y[i], out[i])


@njit(fastmath=_SUMS)
def _blend_rows(X, Q, theta, q, p, part, start, stop):
    part[:] = 0
    for i in range(start, stop):
        a = np.float32(0.0)
        for j in range(q.size):
            # U + theta X + (1 - theta) Z with U = Q - Z
            z = np.copysign(p[i] * q[j], Q[i, j])
            u = Q[i, j] + theta * (X[i, j] - z)
            Q[i, j] = u
            a += abs(u) * q[j]
        p[i] = a
        for j in range(q.size):
            part[j] += a * abs(Q[i, j])


@njit(fastmath=_SUMS)
def blend_magnitudes(X, Q, theta, q, p, parts):
    """Form the new ``Q = theta X + (1 - theta) Z + U``, with the first power step on ``|Q|``.

    Parameters
    ----------
    X : (rows, k) float32
    Q : (rows, k) float32, modified in place
        On entry it stands for ``Z = sign(Q) * outer(p, q)`` and ``U = Q - Z``.
    theta : float32
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
        _blend_rows(X, Q, theta, q, p, parts[b], b * BLOCK, stop)


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


@njit(fastmath=_SUMS)
def _soften_rows(Q, p, q, c, X, part, start, stop):
    part[:] = 0
    keep = np.float32(1.0) - c
    for i in range(start, stop):
        for j in range(part.size):
            v = keep * np.copysign(p[i] * q[j], Q[i, j]) + c * X[i, j]
            X[i, j] = v
            part[j] += v * v


@njit(fastmath=_SUMS)
def soften(Q, p, q, c, X, parts):
    """Form ``(1 - c) Z + c X`` with ``Z = sign(Q) * outer(p, q)``, and the squares of its columns.

    Parameters
    ----------
    Q : (rows, k) float32
    p : (rows,) float32, not negative
    q : (k,) float32, not negative
    c : float32
    X : (rows, k) float32, overwritten by the result
    parts : (ceil(rows / BLOCK), k) float32, overwritten
        Sums of squares over each block of rows.

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::soften``.
    """
    for b in range(parts.shape[0]):
        _soften_rows(Q, p, q, c, X, parts[b], b * BLOCK, min(len(X), (b + 1) * BLOCK))


@njit(fastmath=_SUMS)
def _fit_row(X, Y, Q, p, q, weight):
    total = 0.0
    for j in range(X.size):
        z = np.copysign(p * q[j], Q[j])
        total += X[j] * (Y[j] - (z - (Q[j] - z)) + weight * X[j])
    return total


@njit(fastmath=_SUMS)
def explained(X, Y, Q, p, q, weight, out):
    """Give each row's share of ``<X, Y - (Z - U) + weight X>``.

    For ``X (G + weight I) = Y + Z - U`` with ``Y = A N`` and ``G = N^T N`` this is how much less
    than ``|A|^2`` the squared error ``|A - X N^T|^2`` is, without another product.

    Parameters
    ----------
    X, Y, Q : (rows, k) float32
        Q stands for ``Z = sign(Q) * outer(p, q)`` and ``U = Q - Z``.
    p : (rows,) float32, not negative
    q : (k,) float32, not negative
    weight : float32
    out : (rows,) float64, overwritten

    Notes
    -----
    O(rows k). naive: ``tests/naive.py::explained``.
    """
    for i in range(out.size):
        out[i] = _fit_row(X[i], Y[i], Q[i], p[i], q, weight)
