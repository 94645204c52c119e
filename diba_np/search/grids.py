"""Rounding a diagonal to a grid under a quadratic objective: errors go where they can be undone."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.kernels.grids import descend_codes, round_each, round_in_order

Floats = NDArray[np.float64]

_SWEEPS = 20


def _one_by_one(H: Floats, r: Floats, values: Floats) -> Floats:
    """Round the minimum of ``d^T H d - 2 r^T d``, the largest entries first.

    Each entry is rounded from its best value given those before it, all later ones still free.
    With ``H = M^T M`` and M lower triangular that value is one dot product.
    """
    own = np.diag(H)  # entries may be in units of their own
    ridge = np.where(own > 0, 1e-6 * own, 1e-9 * float(own.mean()) + np.finfo(float).tiny)
    regular = H + np.diag(ridge)
    solved = scipy.linalg.cho_solve((scipy.linalg.cholesky(regular, lower=True), True), r)
    order = np.argsort(-np.abs(solved), kind="stable")
    flipped = regular[np.ix_(order[::-1], order[::-1])]
    M = scipy.linalg.cholesky(flipped, lower=True)[::-1, ::-1].T
    M = np.ascontiguousarray(M)
    best = solved[order]
    round_in_order(M, best, values)
    rounded: Floats = np.empty_like(best)
    rounded[order] = best
    return rounded


def round_diagonal(H: Floats, r: Floats, old: Floats, values: Floats, anew: bool = True) -> Floats:
    """Return grid values d with a small ``d^T H d - 2 r^T d``, not above that of the old ones.

    Parameters
    ----------
    H : (k, k) float64
        Symmetric, positive semidefinite.
    r : (k,) float64
    old : (k,) float64
        Kept, as far as it lies on the grid, where nothing better is found.
    values : (count,) float64, ascending
        The grid.
    anew : bool
        Whether a solution of H d = r is rounded as well, O(k^3), or the old values are only moved
        while that pays, O(k^2).
    """
    near = old.copy()
    round_each(values, near)
    starts = [near]
    try:
        if anew and r.any():
            starts.insert(0, _one_by_one(H, r, values))
    except np.linalg.LinAlgError:  # not positive definite in float64
        pass
    best: Floats = near
    least = np.inf
    for d in starts:
        descend_codes(H, H @ d - r, d, values, _SWEEPS)
        error = float(d @ (H @ d) - 2.0 * (r @ d))
        if error < least:
            best, least = d, error
    return best
