"""Layer mode of the MESA family: centroids, sparsity and blocks chosen for one matrix.

Every `choose_*` yields candidates from the best to the safest; the caller takes the first
whose stored bytes fit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve

from diba_np.errors import BudgetError
from diba_np.matrix.base import Array
from diba_np.methods.fitting import Problem, gram


def nothing_fits(method: str, bits: float, shape: tuple[int, int]) -> BudgetError:
    """Return the error of a budget that no candidate fits.

    No least budget is told: what codes take depends on the entries.
    """
    return BudgetError(f"bits must be larger for {method} on shape {shape}, got {bits}")


def nearest(values: Array, centroids: Array) -> Array:
    """Return the index of the nearest of the increasing `centroids`, int64, shape of values."""
    edges = 0.5 * (centroids[1:] + centroids[:-1])
    return np.searchsorted(edges, values).astype(np.int64)


class SortedEntries:
    """Entries sorted once, where the nearest of many sets of centroids is asked for.

    Parameters
    ----------
    values : array
    """

    def __init__(self, values: Array) -> None:
        self.values = values
        self._order = np.argsort(values, axis=None)
        self._sorted = values.ravel()[self._order]

    @cached_property
    def bulk(self) -> tuple[float, float]:
        """Between what almost all entries are; of few entries all."""
        if self._sorted.size <= 1000:
            return self._sorted[0], self._sorted[-1]
        low, high = np.quantile(self._sorted, [0.002, 0.998])
        return low, high

    def nearest(self, centroids: Array) -> Array:
        """Return the same as `nearest`, in O(N + r log N)."""
        edges = 0.5 * (centroids[1:] + centroids[:-1])
        ends = np.searchsorted(self._sorted, edges, side="right")
        counts = np.diff(ends, prepend=0, append=self._sorted.size)
        codes = np.empty(self._sorted.size, np.int64)
        codes[self._order] = np.repeat(np.arange(len(centroids)), counts)
        return codes.reshape(self.values.shape)


def kmeans(values: ArrayLike, r: int, rounds: int = 50) -> Array:
    """Return the sorted centroids of 1-D k-means from an even start, (r,) float64.

    The even start keeps the rare large weights, as S. Han et al. recommend. O(rounds N).
    """
    values = np.sort(np.asarray(values, np.float64).ravel())
    low, high = (values[0], values[-1]) if values.size else (0.0, 0.0)
    centroids = np.linspace(low, high, r) if high > low else low + 1e-3 * np.arange(r)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(rounds):
        edges = np.searchsorted(values, 0.5 * (centroids[1:] + centroids[:-1]))
        start = np.concatenate([[0], edges])
        stop = np.concatenate([edges, [values.size]])
        count = stop - start
        new = np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), centroids)
        if np.allclose(new, centroids, rtol=0, atol=1e-9 * max(high - low, 1e-300)):
            break
        centroids = np.sort(new)
    return centroids


def member_means(values: Array, codes: Array, centroids: Array) -> Array:
    """Return the mean of the members of every centroid (the centroid itself where none)."""
    r = len(centroids)
    count = np.bincount(codes.ravel(), minlength=r)
    total = np.bincount(codes.ravel(), values.ravel(), r)
    return np.where(count > 0, total / np.maximum(count, 1), centroids)


def difference_penalty(blocks: Array, weight: float) -> tuple[float, Array]:
    """Return ``weight / (count - 1) sum_j |B_{j+1} - B_j|^2`` and its gradient.

    Parameters
    ----------
    blocks : (count, rows, columns) float
        At least two.
    weight : float
    """
    difference = np.diff(blocks, axis=0)
    factor = weight / (len(blocks) - 1)
    gradient = np.zeros_like(blocks)
    gradient[1:] += difference
    gradient[:-1] -= difference
    gradient *= blocks.dtype.type(2.0 * factor)
    return factor * float(np.sum(difference.astype(np.float64) ** 2)), gradient


def choose_blocks(shape: tuple[int, int], budget: int) -> list[tuple[int, int, int]]:
    """List the ``(count, rows, columns)`` whose blocks can be stored at about a bit or more."""
    m, n = shape
    found = []
    for count in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 32):
        rows, columns = m // count, n // count
        if rows and columns and 0.3 * count * rows * columns <= budget:
            found.append((count, rows, columns))
    return found[:4] or [(1, m, n)]


def fit_blocks(
    problem: Problem,
    row_order: Array,
    column_order: Array,
    count: int,
    alpha: float,
) -> tuple[Array, Callable[[Array], float]]:
    """Fit coupled diagonal blocks to the outputs of A; a block-tridiagonal solve.

    ``(H_j + w c_j I) B_j^T - w B_{j-1}^T - w B_{j+1}^T = (H A^T)_j``, with
    ``w = alpha mean(diag H) / (count - 1)``, c = 1 at the ends and 2 between.

    Parameters
    ----------
    problem : Problem
    row_order, column_order : (count, rows), (count, columns) int
    alpha : float

    Returns
    -------
    blocks : (count, rows, columns) float64
    error_of : callable
        Blocks -> ``tr(E H E^T)`` of the whole matrix, up to a constant.

    Notes
    -----
    O(count (columns^3 + rows columns^2)).
    """
    n = problem.shape[1]
    if problem.X is None:
        H, HA = np.eye(n), problem.W.T
    else:
        H = gram(problem.X, n)
        HA = H @ problem.W.T
    w = alpha * float(np.trace(H)) / n / max(count - 1, 1)
    diagonal, right = [], []
    for j, (r, c) in enumerate(zip(row_order, column_order, strict=True)):
        ends = 0 if count == 1 else (1 if j in (0, count - 1) else 2)
        diagonal.append(H[np.ix_(c, c)] + w * ends * np.eye(len(c)))
        right.append(HA[np.ix_(c, r)])
    factors: list[Any] = []
    reduced: list[Array] = []
    for j in range(count):
        D, R = diagonal[j], right[j]
        if j and w:
            D = D - w * w * cho_solve(factors[-1], np.eye(len(D)))
            R = R + w * cho_solve(factors[-1], reduced[-1])
        factors.append(cho_factor(D))
        reduced.append(R)
    solution: list[Any] = [None] * count
    for j in range(count - 1, -1, -1):
        R = reduced[j] if j == count - 1 or not w else reduced[j] + w * solution[j + 1]
        solution[j] = cho_solve(factors[j], R)
    blocks = np.stack([B.T for B in solution])
    grams = [H[np.ix_(c, c)] for c in column_order]

    def error_of(values: Array) -> float:
        return sum(
            float(np.sum((B @ G) * B) - 2.0 * np.sum(B.T * R))
            for B, G, R in zip(values, grams, right, strict=True)
        )

    return blocks, error_of
