"""Rounding and coordinate descent over the values that a coded diagonal may take."""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def _nearest(values, wanted, up):
    """Return the nearest of ascending values; of two as near the greater one if `up`."""
    at = np.searchsorted(values, wanted)
    above = values[min(at, values.size - 1)]
    below = values[max(at - 1, 0)]
    to_below = abs(below - wanted)
    to_above = abs(above - wanted)
    return above if to_above < to_below or (up and to_above == to_below) else below


@njit(fastmath=False)
def round_each(values, vector):
    """Round every entry to the nearest value, the lesser of two as near.

    Parameters
    ----------
    values : (count,) float64, ascending
    vector : (k,) float64, modified in place

    Notes
    -----
    Time O(k log count). naive: ``tests/naive.py::round_each``.
    """
    for j in range(vector.size):
        vector[j] = _nearest(values, vector[j], False)


@njit(fastmath=False)
def round_in_order(M, best, values):
    """Round one entry after the other, each from its best value given those before it.

    Parameters
    ----------
    M : (k, k) float64, C-order, lower triangular
        ``M^T M`` is the quadratic form, its rows and columns in the order of rounding.
    best : (k,) float64, overwritten by the rounded entries
        The minimum while nothing is rounded.
    values : (count,) float64, ascending

    Notes
    -----
    Time O(k (k + log count)). naive: ``tests/naive.py::round_in_order``.
    """
    error = np.zeros(best.size)
    for j in range(best.size):
        moved = 0.0
        for l in range(j):
            moved += M[j, l] * error[l]
        rounded = _nearest(values, best[j] - moved / M[j, j], False)
        error[j] = rounded - best[j]
        best[j] = rounded


@njit(fastmath=False)
def descend_codes(H, gradient, d, values, sweeps):
    """Minimise ``d^T H d - 2 r^T d`` over a grid, one entry after the other.

    Parameters
    ----------
    H : (k, k) float64, C-order
        Symmetric; an entry with ``H[j, j] <= 0`` is left alone.
    gradient : (k,) float64, modified in place
        ``H d - r``.
    d : (k,) float64, modified in place
        Any numbers on entry; an entry moves only to a strictly better value.
    values : (count,) float64, ascending
    sweeps : int
        Most sweeps over the entries; ends when none moves.

    Returns
    -------
    int
        Moves made.

    Notes
    -----
    Time O(k (k + count)) a sweep. naive: ``tests/naive.py::descend_codes``.
    """
    moves = 0
    for _ in range(sweeps):
        found = 0
        for j in range(d.size):
            if H[j, j] <= 0.0:
                continue
            wanted = d[j] - gradient[j] / H[j, j]
            best = _nearest(values, wanted, True)
            # the slack keeps rounding from moving an entry to and fro
            if abs(best - wanted) < abs(d[j] - wanted) * (1.0 - 1e-9):
                change = best - d[j]
                d[j] = best
                for l in range(d.size):
                    gradient[l] += change * H[j, l]
                found += 1
        moves += found
        if found == 0:
            break
    return moves
